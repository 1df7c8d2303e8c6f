"""OOD scores by hand: a larger score means more likely OOD."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cmg.config import FineTuneConfig
from cmg.losses import MODES
from cmg.scores import PRETRAINED_SCORES, SCORES, energy, energy_all, energy_ind, msp_ind, ood_slot

LOGITS = torch.tensor([0.0, math.log(2), math.log(5), math.log(8)])  # two IND classes, the OOD slot, a spare logit


def test_energy_by_hand():
    assert energy(LOGITS).item() == pytest.approx(-math.log(16), rel=1e-6)


def test_energy_score_takes_the_ind_logits_only():
    assert energy_ind(LOGITS, num_ind=2).item() == pytest.approx(-math.log(3), rel=1e-6)


def test_softmax_score_is_the_probability_of_the_slot_without_spare_logits():
    assert ood_slot(LOGITS, num_ind=2).item() == pytest.approx(5 / 8, rel=1e-6)


def test_the_other_scores_by_hand():
    assert energy_all(LOGITS, num_ind=2).item() == pytest.approx(-math.log(16), rel=1e-6)
    assert msp_ind(LOGITS, num_ind=2).item() == pytest.approx(1 - 2 / 3, rel=1e-6)


def test_every_mode_has_a_score_and_another_can_be_asked_for():
    config = FineTuneConfig(num_ind=2, sigma=1.0)
    assert (config.score_of("CMG-energy"), config.score_of("CMG-softmax")) == ("energy-ind", "ood-slot")
    assert {config.score_of(mode) for mode in MODES} <= set(SCORES)
    for name in SCORES:
        assert FineTuneConfig(num_ind=2, sigma=1.0, score=name).score_of("CMG-softmax") == name


def test_baselines_take_all_logits():
    assert PRETRAINED_SCORES["MSP"](LOGITS[None]).item() == pytest.approx(1 - 8 / 16, rel=1e-6)
    assert PRETRAINED_SCORES["energy"](LOGITS[None]).item() == pytest.approx(-math.log(16), rel=1e-6)


def test_scores_rise_with_the_slot_and_fall_with_an_ind_logit():
    more_ood = torch.tensor([[2.0, 0.0, 0.0, 0.0], [2.0, 0.0, 1.0, 0.0]])
    assert ood_slot(more_ood, 2)[0] < ood_slot(more_ood, 2)[1]
    more_ind = torch.tensor([[2.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    assert energy_ind(more_ind, 2)[0] > energy_ind(more_ind, 2)[1]


@given(arrays("float64", (3, 5, 11), elements=st.floats(-500, 500)))
def test_scores_of_stacked_heads_equal_plain_sums(values):
    logits = torch.from_numpy(values)
    shift = logits.amax(-1, keepdim=True)
    powers = (logits - shift).exp()
    torch.testing.assert_close(energy(logits), -shift[..., 0] - powers.sum(-1).log())
    slot_shift = logits[..., :7].amax(-1, keepdim=True)
    slot_powers = (logits[..., :7] - slot_shift).exp()
    torch.testing.assert_close(ood_slot(logits, 6), slot_powers[..., 6] / slot_powers.sum(-1))
