"""How far the difference of two detectors' AUROCs depends on the images at hand: a paired bootstrap.

The images are resampled, IND and OOD apart, and both detectors are scored on the same resample: what is hard about
an image is hard for both and cancels. The interval speaks of other test images of the same kind, with the networks
as they are; it does not speak of other training runs or other partitions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils import generator

AT_ONCE = 250  # resamples whose counts are in memory together: 20 MB for 10,000 images


class Pair(NamedTuple):
    """OOD scores of two detectors on the same images: [N] of the IND images and [M] of the OOD images, twice."""

    ind_a: Tensor
    ood_a: Tensor
    ind_b: Tensor
    ood_b: Tensor


class Difference(NamedTuple):
    """AUROC of a minus AUROC of b on the images themselves, and the ends of its interval; from -1 to 1."""

    value: float
    low: float
    high: float


def paired_auroc_difference(
    pairs: Sequence[Pair],
    groups: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Percentile interval of the mean over `pairs` of AUROC_a - AUROC_b (Efron and Tibshirani 1993, chapter 13).

    Args:
        pairs: scores for each partition and seed.
        groups: for each pair, which images it is on; pairs of a group, such as the seeds of a partition, have the same
            images in the same order and share their resamples. None: each pair is on images of its own.
        resamples: how often the images are drawn, with replacement, as many as there are.
        level: share of the resampled means within the interval.
        seed: of the draws; those of a group depend on it and on the group's place among the groups alone.

    Raises:
        ValueError: there is no pair, the pairs of a group differ in their number of images, scores are missing or
            are no numbers, there is not one group for each pair, or `resamples` or `level` is out of range.
    """
    pairs = [Pair(*pair) for pair in pairs]
    groups = list(range(len(pairs)) if groups is None else groups)
    _check(pairs, groups, resamples, level)
    observed = torch.stack([_difference(pair, *(torch.ones(len(part), 1) for part in pair[:2])) for pair in pairs])
    total = torch.zeros(resamples, dtype=torch.float64)
    for place, group in enumerate(dict.fromkeys(groups)):
        members = [pair for pair, of in zip(pairs, groups, strict=True) if of == group]
        draw = generator(seed, "bootstrap", place)
        for part in total.split(AT_ONCE):
            counts = [resample_counts(len(scores), len(part), draw) for scores in members[0][:2]]
            part += torch.stack([_difference(pair, *counts) for pair in members]).sum(0)
    outside = (1 - level) / 2
    ends = torch.quantile(total / len(pairs), torch.tensor([outside, 1 - outside], dtype=torch.float64))
    return Difference(observed.mean().item(), *ends.tolist())


def resample_counts(images: int, resamples: int, draw: torch.Generator) -> Tensor:
    """How often each image is in each of `resamples` draws of `images` of them with replacement.

    Returns:
        fp64 [images, resamples]; every column sums to `images`.
    """
    drawn = torch.randint(images, (images, resamples), generator=draw)
    return torch.zeros(images, resamples, dtype=torch.float64).scatter_add_(
        0, drawn, torch.ones(1, 1, dtype=torch.float64).expand(images, resamples)
    )


def weighted_auroc(ind_scores: Tensor, ood_scores: Tensor, ind_weights: Tensor, ood_weights: Tensor) -> Tensor:
    """AUROC with weighted images, for many sets of weights at the price of one sort.

    sum_nm w_n v_m ([o_m > i_n] + [o_m = i_n] / 2) / (sum_n w_n sum_m v_m) for IND scores i and OOD scores o.

    Args:
        ind_scores, ood_scores: [N], [M].
        ind_weights, ood_weights: w [N, R] and v [M, R], at least 0 and not all 0.

    Returns:
        fp64 [R].
    """
    ranked, order = ind_scores.double().sort()
    # Row n: the weight of the n lowest IND scores.
    below = torch.zeros(len(ranked) + 1, ind_weights.shape[1], dtype=torch.float64)
    torch.cumsum(ind_weights.double()[order], 0, out=below[1:])
    ood = ood_scores.double()
    lower, not_higher = (below[torch.searchsorted(ranked, ood, right=right)] for right in (False, True))
    wins = (ood_weights * (lower + not_higher)).sum(0) / 2
    return wins / (below[-1] * ood_weights.double().sum(0))


def _difference(pair: Pair, ind_weights: Tensor, ood_weights: Tensor) -> Tensor:
    """AUROC_a - AUROC_b for weights [N, R] and [M, R]: [R]."""
    of_a = weighted_auroc(pair.ind_a, pair.ood_a, ind_weights, ood_weights)
    return of_a - weighted_auroc(pair.ind_b, pair.ood_b, ind_weights, ood_weights)


def _check(pairs: list[Pair], groups: list[Hashable], resamples: int, level: float) -> None:
    if not pairs:
        raise ValueError("no pairs: expected the scores of at least one partition and seed")
    if len(groups) != len(pairs):
        raise ValueError(f"{len(groups)} groups for {len(pairs)} pairs: expected one for each")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples {resamples}, level {level}: expected at least 1, and between 0 and 1")
    sizes: dict[Hashable, tuple[int, int]] = {}
    for pair, group in zip(pairs, groups, strict=True):
        expected = sizes.setdefault(group, (len(pair.ind_a), len(pair.ood_a)))
        for found in ((len(pair.ind_a), len(pair.ood_a)), (len(pair.ind_b), len(pair.ood_b))):
            if found != expected or 0 in found:
                raise ValueError(
                    f"scores of {found[0]} IND and {found[1]} OOD images beside {expected[0]} and {expected[1]}: "
                    f"all scores of group {group!r} must be of the same images, at least one of each kind"
                )
        if any(scores.isnan().any() for scores in pair):
            raise ValueError(f"scores of group {group!r} are not finite")
