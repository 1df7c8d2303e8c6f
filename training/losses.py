"""The losses of stage 2 and their margins: pure functions of logits.

Leading dimensions are free, so that many heads are trained side by side: [..., B, C] logits and [..., B]
labels give a loss [...] for each head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.scores import energy


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(logits)[label]: [..., B, C], [..., B] -> [...]."""
    return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(-1)


def softmax_loss(ind_logits: Tensor, labels: Tensor, pseudo_logits: Tensor, num_ind: int) -> Tensor:
    """CMG-softmax: IND images to their class over all logits, pseudo-OOD images to the OOD slot over the first
    num_ind + 1 logits."""
    slot_logits = pseudo_logits[..., : num_ind + 1]
    slot = torch.full(slot_logits.shape[:-1], num_ind, device=slot_logits.device)
    return cross_entropy(ind_logits, labels) + cross_entropy(slot_logits, slot)


def energy_loss(
    ind_logits: Tensor,
    labels: Tensor,
    pseudo_logits: Tensor,
    m_in: Tensor,
    m_out: Tensor,
    mu: float,
    energy_logits: int | None = None,
) -> Tensor:
    """CMG-energy: cross-entropy + mu * [mean relu(E_ind - m_in)^2 + mean relu(m_out - E_pseudo)^2], with margins
    [...], one pair for each head, and E = -logsumexp of all logits, or of the first `energy_logits`."""
    ind_excess = F.relu(energy(ind_logits[..., :energy_logits]) - m_in.unsqueeze(-1))
    pseudo_lack = F.relu(m_out.unsqueeze(-1) - energy(pseudo_logits[..., :energy_logits]))
    return cross_entropy(ind_logits, labels) + mu * (ind_excess.square().mean(-1) + pseudo_lack.square().mean(-1))


def order_statistic(values: Tensor, quantile: float) -> Tensor:
    """The value below which a share `quantile` of the N values lies: number floor(quantile * N) of the ascending
    sort, counted from 0. [N] -> []."""
    k = min(math.floor(quantile * len(values)), len(values) - 1)
    return values.kthvalue(k + 1).values
