"""OOD scores of logits: a larger score means more likely OOD, everywhere.

`num_ind` is the number of IND classes; logit `num_ind` is the OOD slot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def energy(logits: Tensor) -> Tensor:
    """E(x) = -logsumexp of the logits: [..., C] -> [...] (Liu et al., NeurIPS 2020, equation 4 with T = 1)."""
    return -torch.logsumexp(logits, dim=-1)


def energy_score(logits: Tensor, num_ind: int) -> Tensor:
    """CMG-energy: the energy of the IND logits, [..., C] -> [...]."""
    return energy(logits[..., :num_ind])


def softmax_score(logits: Tensor, num_ind: int) -> Tensor:
    """CMG-softmax: probability of the OOD slot among the IND logits and itself, [..., C] -> [...].

    In fp64, as every probability here: in fp32 those of confident images all round to 1 and lose their order.
    """
    return logits[..., : num_ind + 1].double().softmax(dim=-1)[..., num_ind]


def msp_score(logits: Tensor) -> Tensor:
    """1 - the largest softmax probability, [..., C] -> [...] (Hendrycks and Gimpel, ICLR 2017)."""
    return 1 - logits.double().softmax(dim=-1).amax(dim=-1)


SCORES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "CMG-energy": energy_score,
    "CMG-energy over all logits": lambda logits, num_ind: energy(logits),
    "CMG-softmax": softmax_score,
}
