"""A backbone for tests, which `--backbone tests.tiny_backbone:…` names."""

from __future__ import annotations

import torch
from torch import nn

from models.backbone import Backbone


def tiny() -> Backbone:
    """8 features of images of 16x16 pixels, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Backbone(network, 16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def broken() -> nn.Module:
    """Features that are no numbers."""

    class Broken(nn.Module):
        def forward(self, images):
            return images.mean((2, 3)) * torch.nan

    return Broken()


def particular() -> Backbone:
    """Takes images of 16x16 pixels only."""
    return Backbone(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4), nn.ReLU()), 16)


NUMBER = 3


def number() -> int:
    return NUMBER


def leaves() -> None:
    raise SystemExit(3)
