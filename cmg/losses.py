"""The losses that fine-tune the head, and the margins of CMG-energy: pure functions of logits.

A loss takes (ind_logits, labels, pseudo_logits, margins, config): logits [..., B, C], labels [..., B], and gives one
loss [...] for each head, so that many heads can be trained side by side. A new loss is one function here and one entry
in `MODES`; its name is then a value of `--mode`.

Torch is not imported, since the command line reads the names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from cmg.scores import energy

if TYPE_CHECKING:
    from torch import Tensor

    from cmg.config import FineTuneConfig


class Margins(NamedTuple):
    """Energies up to which IND images, and from which pseudo-OOD images, cost nothing: [...], one for each head."""

    m_in: Tensor
    m_out: Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(logits)[label]: [..., B, C], [..., B] -> [...]."""
    return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(-1)


def softmax_loss(
    ind_logits: Tensor, labels: Tensor, pseudo_logits: Tensor, margins: None, config: FineTuneConfig
) -> Tensor:
    """CMG-softmax: CE(IND images, their class; all logits) + CE(pseudo-OOD images, OOD slot; first num_ind + 1)."""
    slot = pseudo_logits[..., : config.num_ind + 1].log_softmax(-1)[..., config.num_ind]
    return cross_entropy(ind_logits, labels) - slot.mean(-1)


def energy_loss(
    ind_logits: Tensor, labels: Tensor, pseudo_logits: Tensor, margins: Margins, config: FineTuneConfig
) -> Tensor:
    """CMG-energy: CE + mu * [mean relu(E_ind - m_in)^2 + mean relu(m_out - E_pseudo)^2], with E = -logsumexp of all
    logits, or as `config.loss_energy` has it (the form of Liu et al., NeurIPS 2020, equation 8)."""
    ind, pseudo = loss_energy(ind_logits, config), loss_energy(pseudo_logits, config)
    ind_excess = (ind - margins.m_in.unsqueeze(-1)).relu()
    pseudo_lack = (margins.m_out.unsqueeze(-1) - pseudo).relu()
    return cross_entropy(ind_logits, labels) + config.mu * (
        ind_excess.square().mean(-1) + pseudo_lack.square().mean(-1)
    )


def loss_energy(logits: Tensor, config: FineTuneConfig) -> Tensor:
    """The energy that loss and margins see, over all logits or the IND classes' only: [..., C] -> [...]."""
    return energy(logits if config.loss_energy == "all" else logits[..., : config.num_ind])


def find_margins(ind_logits: Tensor, pseudo_logits: Tensor, config: FineTuneConfig) -> Margins:
    """m_in and m_out, [] each: the quantiles `config.margins` of the energies of the IND training images [N, C] and
    of pseudo-OOD images [M, C], under the head as it is before fine-tuning."""
    energies = loss_energy(ind_logits, config), loss_energy(pseudo_logits, config)
    return Margins(*map(order_statistic, energies, config.margins))


def order_statistic(values: Tensor, quantile: float) -> Tensor:
    """The value below which a share `quantile` of the N values lies: number floor(quantile * N) of the ascending
    sort, counted from 0. [N] -> []."""
    k = min(math.floor(quantile * len(values)), len(values) - 1)
    return values.kthvalue(k + 1).values


class Mode(NamedTuple):
    """A way to fine-tune and score.

    Attributes:
        loss: as above.
        score: the key of `cmg.scores.SCORES` with which its head is scored.
        uses_margins: whether the loss needs the margins, which are None otherwise.
        options: fields of the configuration that the loss reads and not every mode does: with other modes they are
            refused.
    """

    loss: Callable[[Tensor, Tensor, Tensor, Margins | None, FineTuneConfig], Tensor]
    score: str
    uses_margins: bool = False
    options: tuple[str, ...] = ()


MODES: dict[str, Mode] = {
    "CMG-energy": Mode(energy_loss, "energy-ind", uses_margins=True, options=("mu", "margins", "loss_energy")),
    "CMG-softmax": Mode(softmax_loss, "ood-slot"),
}
