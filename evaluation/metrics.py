"""Metrics of detection and classification: pure functions of scores, logits and labels.

OOD is the positive class and a larger score means more likely OOD.
"""

from __future__ import annotations

import torch
from pytorch_ood.metrics import functional as ood_metrics
from torch import Tensor

from cli.errors import UserError

ACCEPTED = 0.95  # share of IND images at or below the threshold: 95 % TPR with IND as the positive class


def auroc(ind_scores: Tensor, ood_scores: Tensor) -> float:
    """Probability that an OOD image scores above an IND image, ties counting half: [N], [M] scores.

    Raises:
        UserError: a score is no finite number.
    """
    return ood_metrics.auroc(*_labelled(ind_scores, ood_scores)).item()


def detection_metrics(ind_scores: Tensor, ood_scores: Tensor) -> dict[str, float]:
    """Threshold-free and threshold metrics of [N] IND and [M] OOD scores.

    Returns:
        auroc; fpr95: share of IND images at or above the threshold that detects 95 % of the OOD images;
        aupr_out, aupr_in: average precision with OOD, or IND, as the positive class; images with the same score are
            found at once.

    Raises:
        UserError: a score is no finite number.
    """
    from sklearn.metrics import average_precision_score  # takes a second, which training does without

    scores, labels = _labelled(ind_scores, ood_scores)
    is_ood, values = (labels < 0).cpu().numpy(), scores.double().cpu().numpy()
    return {
        "auroc": ood_metrics.auroc(scores, labels).item(),
        "fpr95": ood_metrics.fpr_at_tpr(scores, labels, 0.95).item(),
        "aupr_out": float(average_precision_score(is_ood, values)),
        "aupr_in": float(average_precision_score(~is_ood, -values)),
    }


def acceptance_threshold(ind_scores: Tensor) -> float:
    """The least score that at least 95 % of the [N] IND scores do not exceed."""
    return ind_scores.kthvalue(max(1, -int(-ACCEPTED * len(ind_scores) // 1))).values.item()


def _labelled(ind_scores: Tensor, ood_scores: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.zeros(len(ind_scores) + len(ood_scores), dtype=torch.int64, device=ind_scores.device)
    labels[len(ind_scores) :] = -1
    scores = torch.cat([ind_scores, ood_scores])
    bad = int((~scores.isfinite()).sum())
    if bad:
        raise UserError(
            f"{bad:,} of {len(scores):,} scores are not finite: the network's values grow too large; train it anew, "
            "with a lower --lr or --precision fp32"
        )
    return scores, labels


def accuracy(logits: Tensor, labels: Tensor, num_ind: int) -> float:
    """Share of images whose largest logit among the `num_ind` IND classes is that of their label: [N, C], [N]."""
    return (logits[:, :num_ind].argmax(1) == labels).double().mean().item()


def expected_calibration_error(logits: Tensor, labels: Tensor, num_ind: int, bins: int = 15) -> float:
    """Mean over the images of |accuracy - confidence| of their bin: [N, C] logits, [N] labels.

    Confidence is the largest softmax probability among the IND classes, in `bins` equal bins that hold their
    upper end (Guo et al., ICML 2017, equation 3).
    """
    confidence, predicted = logits[:, :num_ind].double().softmax(1).max(1)
    bin_of = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    gap = (predicted == labels).double() - confidence
    return torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(
        0, bin_of, gap
    ).abs().sum().item() / len(labels)
