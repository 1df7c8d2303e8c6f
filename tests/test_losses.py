"""The losses of stage 2, its margins and the CVAE's loss against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cmg.config import FineTuneConfig
from cmg.losses import Margins, cross_entropy, energy_loss, find_margins, order_statistic, softmax_loss
from models.vae import ClassConditionalVAE
from training.train_cvae import CVAEObjective, kl_divergence


def config_with(**options: object) -> FineTuneConfig:
    """Two IND classes, unless told otherwise."""
    return FineTuneConfig(**{"num_ind": 2, "sigma": 3.0} | options)


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(3), 0.0, 0.0]])
    # -log(1/3) and -log(1/5)
    expected = (math.log(3) + math.log(5)) / 2
    assert cross_entropy(logits, torch.tensor([1, 2])).item() == pytest.approx(expected, rel=1e-6)


def test_softmax_loss_by_hand():
    # Two IND classes, the OOD slot, one spare logit. IND: over all four logits, -log(1/4).
    # Pseudo-OOD: over the first three, logits log 1, log 2, log 5, so -log(5/8); the spare logit does not count.
    ind, labels = torch.zeros(1, 4), torch.tensor([1])
    pseudo = torch.tensor([[0.0, math.log(2), math.log(5), 9.0]])
    expected = math.log(4) + math.log(8 / 5)
    assert softmax_loss(ind, labels, pseudo, None, config_with()).item() == pytest.approx(expected, rel=1e-6)


def test_energy_loss_by_hand():
    # E = -log 4 for logits 0, 0, 0, 0 and -log 8 for log 2 four times.
    ind, labels = torch.stack([torch.zeros(4), torch.full((4,), math.log(2))]), torch.tensor([0, 3])
    pseudo = torch.stack([torch.full((4,), math.log(2)), torch.zeros(4)])
    margins = Margins(torch.tensor(-math.log(6)), torch.tensor(-math.log(5)))
    # IND energies above m_in: -log 4 by log(6/4). Pseudo-OOD energies below m_out: -log 8 by log(8/5).
    expected = math.log(4) + 0.1 * (math.log(6 / 4) ** 2 / 2 + math.log(8 / 5) ** 2 / 2)
    assert energy_loss(ind, labels, pseudo, margins, config_with(mu=0.1)).item() == pytest.approx(expected, rel=1e-6)


def test_energy_loss_counts_every_logit():
    ind, pseudo, labels = torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([0])
    margins = Margins(torch.tensor(-10.0), torch.tensor(10.0))
    pseudo[0, 3] = math.log(5)  # a spare logit: E = -log 8 instead of -log 4
    expected = math.log(4) + (10 - math.log(4)) ** 2 + (10 + math.log(8)) ** 2
    assert energy_loss(ind, labels, pseudo, margins, config_with(mu=1.0)).item() == pytest.approx(expected, rel=1e-6)


def test_energy_loss_over_the_ind_logits_by_hand():
    ind, pseudo, labels = torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([0])
    margins = Margins(torch.tensor(-10.0), torch.tensor(10.0))
    expected = math.log(4) + (10 - math.log(2)) ** 2 + (10 + math.log(2)) ** 2  # E = -log 2, of two logits
    loss = energy_loss(ind, labels, pseudo, margins, config_with(mu=1.0, loss_energy="ind"))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_energy_loss_costs_nothing_beyond_the_margins():
    ind, pseudo, labels = torch.full((3, 4), 2.0), torch.full((3, 4), -2.0), torch.tensor([0, 1, 2])
    margins = Margins(torch.tensor(-3.0), torch.tensor(0.0))
    loss = energy_loss(ind, labels, pseudo, margins, config_with(mu=7.0))
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), heads=st.integers(1, 4), batch=st.integers(1, 6))
def test_stacked_heads_give_the_losses_of_each(seed, heads, batch):
    draw = torch.Generator().manual_seed(seed)
    ind, pseudo = 3 * torch.randn(2, heads, batch, 11, generator=draw)
    labels = torch.randint(6, (heads, batch), generator=draw)
    m_in, m_out = torch.randn(2, heads, generator=draw)
    energies = energy_loss(ind, labels, pseudo, Margins(m_in, m_out), config_with(num_ind=6))
    softmaxes = softmax_loss(ind, labels, pseudo, None, config_with(num_ind=6))
    assert energies.shape == softmaxes.shape == (heads,)
    for k in range(heads):
        excess = (
            F.relu(-ind[k].logsumexp(1) - m_in[k]).pow(2).mean()
            + F.relu(m_out[k] + pseudo[k].logsumexp(1)).pow(2).mean()
        )
        torch.testing.assert_close(energies[k], F.cross_entropy(ind[k], labels[k]) + 0.1 * excess)
        slot = F.cross_entropy(pseudo[k, :, :7], torch.full((batch,), 6))
        torch.testing.assert_close(softmaxes[k], F.cross_entropy(ind[k], labels[k]) + slot)


# --- margins ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantile", "expected"),
    [(0.0, 10.0), (0.2, 12.0), (0.25, 12.0), (0.8, 18.0), (0.99, 19.0)],
)
def test_order_statistics_of_ten_values(quantile, expected):
    values = torch.tensor([15, 10, 19, 11, 18, 12, 17, 13, 16, 14], dtype=torch.float32)
    assert order_statistic(values, quantile).item() == expected


def test_margins_by_hand():
    """Of energies -log 4, -log 8, … of four equal logits."""
    ind = torch.arange(5.0)[:, None].expand(5, 4)  # E = -log 4 - 0 … 4
    pseudo = 10 + torch.arange(10.0)[:, None].expand(10, 4)
    margins = find_margins(ind, pseudo, config_with(margins=(0.2, 0.8)))
    # Ascending: number 1 of -4 … 0 and number 8 of -19 … -10.
    assert margins.m_in.item() == pytest.approx(-3 - math.log(4)) and margins.m_out.item() == pytest.approx(
        -11 - math.log(4)
    )
    of_ind = find_margins(ind, pseudo, config_with(margins=(0.0, 0.0), loss_energy="ind"))
    assert of_ind.m_in.item() == pytest.approx(-4 - math.log(2)) and of_ind.m_out.item() == pytest.approx(
        -19 - math.log(2)
    )


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40),
    quantile=st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75]),  # exact in binary, so that the product is too
)
def test_order_statistic_is_that_of_a_sorted_list(values, quantile):
    assert order_statistic(torch.tensor(values), quantile).item() == sorted(values)[int(quantile * len(values))]


# --- CVAE ---------------------------------------------------------------------------------------


def test_kl_divergence_by_hand():
    mean = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    logvar = torch.tensor([[0.0, 0.0], [0.0, 0.0], [math.log(4), 0.0]])
    # 0; half the squared mean; (4 - 1 - log 4) / 2
    expected = torch.tensor([0.0, 2.5, (3 - math.log(4)) / 2])
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)


def test_cvae_loss_is_mse_plus_weighted_kl_per_pixel():
    images = torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)

    class Network(ClassConditionalVAE):
        def forward(self, pixels, labels, noise):
            return torch.full_like(pixels, 0.5), torch.full((2, 32), 1.0), torch.zeros(2, 32)

    parts = CVAEObjective(kl_weight=0.5)(Network(), images, torch.tensor([0, 1]), torch.zeros(2, 32))
    assert parts["mse"].item() == 0.25 and parts["kl_nats"].item() == 16.0
    assert parts["loss"].item() == 0.25 + 0.5 * 16 / 16
