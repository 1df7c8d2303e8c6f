"""OOD scores of logits: a larger score means more likely OOD, everywhere.

The first `num_ind` logits are the IND classes; logit `num_ind` is the OOD slot. A new score is one function here and
one entry in `SCORES`; its name is then a value of `--score`.

Torch is not imported, since the command line reads the names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def energy(logits: Tensor) -> Tensor:
    """E(x) = -logsumexp of the logits: [..., C] -> [...] (Liu et al., NeurIPS 2020, equation 4 with T = 1)."""
    return -logits.logsumexp(-1)


def energy_ind(logits: Tensor, num_ind: int) -> Tensor:
    """CMG-energy: the energy of the IND logits, [..., C] -> [...]."""
    return energy(logits[..., :num_ind])


def energy_all(logits: Tensor, num_ind: int) -> Tensor:
    """The energy of all logits, which is the one that CMG-energy's loss sees: [..., C] -> [...]."""
    return energy(logits)


def ood_slot(logits: Tensor, num_ind: int) -> Tensor:
    """CMG-softmax: probability of the OOD slot among the IND logits and itself, [..., C] -> [...].

    In fp64, as every probability here: in fp32 those of confident images all round to 1 and lose their order.
    """
    return logits[..., : num_ind + 1].double().softmax(-1)[..., num_ind]


def msp_ind(logits: Tensor, num_ind: int) -> Tensor:
    """1 - the largest softmax probability among the IND logits, [..., C] -> [...]."""
    return msp(logits[..., :num_ind])


def msp(logits: Tensor) -> Tensor:
    """1 - the largest softmax probability, [..., C] -> [...] (Hendrycks and Gimpel, ICLR 2017)."""
    return 1 - logits.double().softmax(-1).amax(-1)


# Of the fine-tuned head: name -> (logits [..., C], num_ind) -> [...]. Each mode has its own; --score takes another.
SCORES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "energy-ind": energy_ind,
    "energy-all": energy_all,
    "ood-slot": ood_slot,
    "msp-ind": msp_ind,
}

# Of the classifier before fine-tuning, over all its logits: what CMG is always compared with.
PRETRAINED_SCORES: dict[str, Callable[[Tensor], Tensor]] = {"MSP": msp, "energy": energy}
