"""The paired bootstrap: weighted AUROC by hand, resamples against a plain loop, how often intervals hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import bootstrap
from evaluation.bootstrap import Pair, paired_auroc_difference, resample_counts, weighted_auroc
from evaluation.metrics import auroc
from utils import generator


def draw_pair(seed: int, ind: int, ood: int, ties: bool = False) -> Pair:
    """Scores of two detectors, the first the better one."""
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.randn(count, generator=draw) for count in (ind, ood, ind, ood)]
    scores[1], scores[3] = scores[1] + 1.5, scores[3] + 0.5
    return Pair(*(part.round() if ties else part for part in scores))


def test_weighted_auroc_by_hand():
    # (OOD, IND), product of weights: 2>1, 3; 2=2, 1 and half of it; 3>1, 6; 3>2, 2. Of 4 x 3 in all.
    ind, ood = torch.tensor([2.0, 1.0]), torch.tensor([2.0, 3.0])
    ind_weights, ood_weights = torch.tensor([[1.0, 1.0], [3.0, 1.0]]), torch.tensor([[1.0, 1.0], [2.0, 1.0]])
    found = weighted_auroc(ind, ood, ind_weights, ood_weights)
    assert found.tolist() == pytest.approx([11.5 / 12, 3.5 / 4], abs=1e-15)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_weights_are_repetitions_of_images(data):
    ind, ood = (torch.tensor(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=12))).float() for _ in range(2))
    counts = [
        torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))) for n in map(len, (ind, ood))
    ]
    for weights in counts:
        weights[0] += 1
    repeated = [scores.repeat_interleave(weights) for scores, weights in zip((ind, ood), counts, strict=True)]
    found = weighted_auroc(ind, ood, *(weights[:, None] for weights in counts))
    assert found.item() == pytest.approx(auroc(*repeated), abs=1e-6)


def test_every_resample_draws_as_many_images_as_there_are():
    counts = resample_counts(50, 400, torch.Generator().manual_seed(0))
    assert counts.shape == (50, 400) and torch.equal(counts.sum(0), torch.full((400,), 50.0, dtype=torch.float64))
    # Binomial(50, 1/50): mean 1, variance 49/50.
    assert counts.var().item() == pytest.approx(0.98, abs=0.05)


@pytest.mark.parametrize("ties", [False, True])
def test_interval_equals_a_plain_loop(monkeypatch, ties):
    monkeypatch.setattr(bootstrap, "AT_ONCE", 16)
    pairs = [draw_pair(0, 30, 20, ties), draw_pair(1, 30, 20, ties), draw_pair(2, 25, 40, ties)]
    groups = ["one", "one", "two"]
    means = np.zeros(40)
    for place, group in enumerate(["one", "two"]):
        draw = generator(7, "bootstrap", place)
        members = [pair for pair, of in zip(pairs, groups, strict=True) if of == group]
        for start in range(0, 40, 16):
            count = min(16, 40 - start)
            ind, ood = (torch.randint(len(part), (len(part), count), generator=draw) for part in members[0][:2])
            for r in range(count):
                for pair in members:
                    of_a = auroc(pair.ind_a[ind[:, r]], pair.ood_a[ood[:, r]])
                    means[start + r] += (of_a - auroc(pair.ind_b[ind[:, r]], pair.ood_b[ood[:, r]])) / 3
    found = paired_auroc_difference(pairs, groups, resamples=40, level=0.9, seed=7)
    observed = np.mean([auroc(p.ind_a, p.ood_a) - auroc(p.ind_b, p.ood_b) for p in pairs])
    assert found == pytest.approx((observed, *np.percentile(means, [5, 95])), abs=1e-6)


def test_scores_in_the_same_order_do_not_differ():
    pair = draw_pair(0, 40, 30)
    assert paired_auroc_difference([Pair(pair.ind_a, pair.ood_a, pair.ind_a.exp(), pair.ood_a.exp())]) == (0, 0, 0)
    assert paired_auroc_difference([Pair(torch.zeros(4), torch.zeros(3), torch.ones(4), torch.ones(3))]) == (0, 0, 0)


def test_a_group_shares_its_resamples():
    pair = draw_pair(0, 40, 30)
    swapped = Pair(pair.ind_b, pair.ood_b, pair.ind_a, pair.ood_a)
    assert paired_auroc_difference([pair, swapped], [0, 0]) == pytest.approx((0, 0, 0), abs=1e-15)
    apart = paired_auroc_difference([pair, swapped])
    assert apart.value == pytest.approx(0, abs=1e-15) and apart.low < -0.02 and apart.high > 0.02


def test_a_seed_repeats_and_another_differs():
    pair = draw_pair(0, 40, 30)
    first = paired_auroc_difference([pair], seed=1)
    assert first == paired_auroc_difference([pair], seed=1) != paired_auroc_difference([pair], seed=2)


def test_95_percent_intervals_hold_the_true_difference_about_95_times_of_100():
    # AUROC of N(d, 1) against N(0, 1): the normal distribution function at d / sqrt 2.
    true = math.erf(1.5 / 2) / 2 - math.erf(0.5 / 2) / 2
    held = 0
    for seed in range(200):
        _, low, high = paired_auroc_difference([draw_pair(seed, 60, 50)], resamples=200)
        held += low <= true <= high
    assert 180 <= held <= 198


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": []}, "no pairs: expected the scores of at least one partition and seed"),
        ({"groups": [0]}, "1 groups for 2 pairs: expected one for each"),
        ({"resamples": 0}, "resamples 0, level 0.95: expected at least 1, and between 0 and 1"),
        ({"level": 95}, "resamples 2000, level 95: expected at least 1, and between 0 and 1"),
        ({"groups": ["p", "p"]}, "scores of 5 IND and 3 OOD images beside 4 and 3: all scores of group 'p' must be of"),
        ({"pairs": [Pair(*map(torch.zeros, (4, 3, 4, 2)))]}, "4 IND and 2 OOD images beside 4 and 3"),
        ({"pairs": [Pair(*map(torch.zeros, (4, 0, 4, 0)))]}, "at least one of each kind"),
        ({"pairs": [draw_pair(0, 4, 3)._replace(ood_b=torch.full((3,), torch.nan))]}, "of group 0 are not finite"),
    ],
)
def test_what_has_no_interval_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        paired_auroc_difference(**{"pairs": [draw_pair(0, 4, 3), draw_pair(1, 5, 3)]} | changes)
