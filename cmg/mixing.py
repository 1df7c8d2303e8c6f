"""Class mixing: how the embeddings of two classes become the condition of one pseudo-OOD image.

    mixed_d = w_d * e_i,d + (1 - w_d) * e_j,d      for each dimension d of the embeddings of classes i and j

The method draws each w_d from a fair Bernoulli: every dimension is taken whole from one class or the other (Wang et
al., ECML PKDD 2022, class-mixed generation). A new mixing is one function here and one entry in `MIXINGS`; its name is
then a value of `--mixing`.

Torch is not imported, since the command line reads the names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def bernoulli(uniform: Tensor, probability: float) -> Tensor:
    """The method: each dimension from the first class with `probability`, else from the second."""
    return (uniform < probability).float()


def mixup(uniform: Tensor, probability: float) -> Tensor:
    """One weight for the whole embedding, uniform in [0, 1): a point on the line between the two classes."""
    return uniform[:, :1].expand_as(uniform)


def no_mixing(uniform: Tensor, probability: float) -> Tensor:
    """The first class alone."""
    return uniform.new_ones(uniform.shape)


PAIRS = ("independent", "distinct")  # whether the two classes may be one, as in the method


class Mixing(NamedTuple):
    """A way to mix.

    Attributes:
        weights: (numbers [N, z_dim] uniform in [0, 1), probability of the first class) -> weights w [N, z_dim].
        uses_probability: whether `--mixing-probability` changes anything.
        uses_second: whether the second class does.
    """

    weights: Callable[[Tensor, float], Tensor]
    uses_probability: bool = False
    uses_second: bool = True


MIXINGS: dict[str, Mixing] = {
    "bernoulli": Mixing(bernoulli, uses_probability=True),
    "mixup": Mixing(mixup),
    "none": Mixing(no_mixing, uses_second=False),
}


def mix_embeddings(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """w * first + (1 - w) * second, all [N, z_dim]: with weights of 0 and 1, a choice in each dimension."""
    return weight * first + (1 - weight) * second
