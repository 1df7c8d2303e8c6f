"""Figures of detection and calibration: by hand, against scikit-learn, against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from cli.errors import UserError
from evaluation.metrics import accuracy, auroc, detection_metrics, expected_calibration_error
from evaluation.report import aggregate, cells, mean_and_sd, means

scores = st.lists(st.integers(0, 12).map(float), min_size=2, max_size=30)  # few values, so many ties


def test_auroc_is_one_when_ood_scores_are_larger():
    low, high = torch.tensor([0.0, 0.1, 0.2]), torch.tensor([0.3, 0.9])
    assert auroc(low, high) == 1.0
    assert auroc(high, low) == 0.0


def test_auroc_counts_pairs_and_half_of_the_ties():
    # pairs (IND, OOD): 1<2, 1<3, 2=2, 2<3: 3.5 of 4
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])) == 0.875
    assert auroc(torch.zeros(5), torch.zeros(3)) == 0.5


@settings(max_examples=60, deadline=None)
@given(ind=scores, ood=scores)
def test_auroc_equals_the_count_over_all_pairs(ind, ood):
    wins = sum((o > i) + 0.5 * (o == i) for i in ind for o in ood)
    assert auroc(torch.tensor(ind), torch.tensor(ood)) == pytest.approx(wins / (len(ind) * len(ood)), abs=1e-6)


def test_fpr95_by_hand():
    # 20 OOD scores 1 … 20: 95 % of them lie at 2 or above, as do 2 and 30 of the IND scores.
    ood, ind = torch.arange(1.0, 21.0), torch.tensor([0.0, 1.0, 2.0, 30.0])
    assert detection_metrics(ind, ood)["fpr95"] == 0.5


@settings(max_examples=60, deadline=None)
@given(ind=scores, ood=scores)
def test_detection_metrics_equal_scikit_learn(ind, ood):
    labels = np.r_[np.zeros(len(ind)), np.ones(len(ood))]
    values = np.r_[ind, ood]
    figures = detection_metrics(torch.tensor(ind), torch.tensor(ood))
    false_positives, true_positives, _ = roc_curve(labels, values, drop_intermediate=False)
    assert figures["auroc"] == pytest.approx(roc_auc_score(labels, values), abs=1e-6)
    assert figures["fpr95"] == pytest.approx(false_positives[true_positives >= 0.95 - 1e-9].min(), abs=1e-6)
    for name, positive, score in (("aupr_out", labels, values), ("aupr_in", 1 - labels, -values)):
        assert figures[name] == pytest.approx(average_precision(positive, score), abs=1e-9)


def test_aupr_of_separated_scores_and_its_two_directions():
    figures = detection_metrics(torch.tensor([0.0, 0.1, 0.2, 0.3]), torch.tensor([0.9]))
    assert figures == {"auroc": 1.0, "fpr95": 0.0, "aupr_out": 1.0, "aupr_in": 1.0}
    swapped = detection_metrics(torch.tensor([0.9]), torch.tensor([0.0, 0.1, 0.2, 0.3]))
    # The IND image ranks last among the IND-most: precision 1/5 where it is found. The OOD images rank after it:
    # precision 1/2, 2/3, 3/4, 4/5 where each is found.
    assert swapped["aupr_in"] == pytest.approx(1 / 5)
    assert swapped["aupr_out"] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4 + 4 / 5) / 4)


def average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """Over the distinct scores from the largest, the precision down to there times the share of positives at it."""
    total = 0.0
    for score in set(scores):
        found, at = scores >= score, scores == score
        total += positive[found].mean() * positive[at].sum() / positive.sum()
    return total


def test_a_constant_score_finds_as_many_as_there_are():
    figures = detection_metrics(torch.zeros(4), torch.zeros(2))
    expected = {"auroc": 0.5, "fpr95": 1.0, "aupr_out": 1 / 3, "aupr_in": 2 / 3}
    assert figures == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_have_no_figures(bad):
    for figure in (auroc, detection_metrics):
        with pytest.raises(
            UserError, match="^1 of 5 scores are not finite: the network's values grow too large; train"
        ):
            figure(torch.tensor([0.0, bad]), torch.zeros(3))


# --- classification -----------------------------------------------------------------------------


def test_accuracy_ignores_the_slot_and_spare_logits():
    logits = torch.tensor([[1.0, 0.0, 9.0], [1.0, 0.0, 0.0], [0.0, 1.0, 5.0], [0.0, 1.0, 0.0]])
    assert accuracy(logits, torch.tensor([0, 0, 0, 1]), num_ind=2) == 0.75


def test_calibration_error_by_hand():
    # Confidence 3/4 four times, right three times: no gap. Confidence 9/10 twice, right once: a gap of 0.4.
    logits = torch.tensor([[math.log(3), 0.0]] * 4 + [[math.log(9), 0.0]] * 2, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 0, 1])
    assert expected_calibration_error(logits, labels, num_ind=2) == pytest.approx(2 / 6 * 0.4, abs=1e-12)


def test_a_bin_holds_its_upper_end():
    # Confidence 1/2 exactly, two bins: (0, 1/2] and (1/2, 1]. In one bin with 3/4 the two gaps would cancel in part.
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    assert expected_calibration_error(logits, torch.tensor([1, 0]), 2, bins=2) == pytest.approx((0.5 + 0.25) / 2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 60), bins=st.integers(1, 20))
def test_calibration_error_equals_a_plain_loop(seed, count, bins):
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 5, generator=draw, dtype=torch.float64)
    labels = torch.randint(3, (count,), generator=draw)
    confidence, predicted = logits[:, :3].softmax(1).max(1)
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            right = (predicted == labels)[inside].double().mean()
            total += inside.sum().item() * abs(right - confidence[inside].mean()).item() / count
    assert expected_calibration_error(logits, labels, 3, bins) == pytest.approx(total, abs=1e-9)


# --- table --------------------------------------------------------------------------------------


def test_mean_and_sample_deviation_in_per_cent():
    assert mean_and_sd([0.5]) == "50.00"
    assert mean_and_sd([0.1, 0.2, 0.3]) == "20.00 ± 10.00"
    assert mean_and_sd([]) == "-"


def test_seeds_of_a_group_become_one_line():
    rows = [{"method": m, "seed": s, "auroc": a} for m, s, a in [("x", 1, 0.1), ("y", 1, 0.4), ("x", 2, 0.3)]]
    found = aggregate(rows, ["method"], ["auroc", "ece"])
    assert found[0] == {"method": "x", "auroc": {"mean": 0.2, "sd": pytest.approx(0.02**0.5), "n": 2}}
    assert found[1] == {"method": "y", "auroc": {"mean": 0.4, "sd": 0.0, "n": 1}}
    assert cells(found, ["method"], ["auroc", "ece"]) == [["x", "20.00 ± 14.14", "-"], ["y", "40.00", "-"]]
    assert means(rows, ["method"], ["auroc", "ece"]) == [{"method": "x", "auroc": 0.2}, {"method": "y", "auroc": 0.4}]
