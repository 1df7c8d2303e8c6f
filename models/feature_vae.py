"""A conditional VAE of features instead of images: class mixing in feature space, an extension of the method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.vae import ClassConditionalVAE

HIDDEN = 512  # units in each of two layers, of encoder and decoder


class FeatureCVAE(ClassConditionalVAE):
    """Features [B, F] of a frozen extractor in the place of images; plain layers, no sigmoid.

    Inside, features are standardised with `mean` and `std` [F]; what goes in and comes out is as the extractor has it.

    Args:
        features: F.
        z_dim, class_num: as in `ClassConditionalVAE`.
    """

    makes = "features"

    def __init__(self, features: int, z_dim: int = 32, class_num: int = 10):
        super().__init__()
        self.z_dim, self.class_num = z_dim, class_num
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.encoder = two_layers(features)
        self.fc_mean, self.fc_logvar = nn.Linear(HIDDEN, z_dim), nn.Linear(HIDDEN, z_dim)
        self.decoder = nn.Sequential(*two_layers(2 * z_dim), nn.Linear(HIDDEN, features))
        self.class_embed = nn.Linear(class_num, z_dim)

    def fit_statistics(self, features: Tensor) -> None:
        """Take mean and standard deviation of [N, F] for what is to be standardised; a constant is left at its size."""
        std = features.std(0, correction=0)
        self.mean.copy_(features.mean(0))
        self.std.copy_(torch.where(std > 0, std, 1.0))

    def standardise(self, features: Tensor) -> Tensor:
        """[B, F] -> [B, F], of mean 0 and variance 1 over the features of `fit_statistics`."""
        return (features - self.mean) / self.std

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F] -> mean and log-variance of q(z | features), each [B, z_dim]."""
        hidden = self.encoder(self.standardise(features))
        return self.fc_mean(hidden), self.fc_logvar(hidden)

    def decode(self, z: Tensor, embedding: Tensor) -> Tensor:
        """[B, z_dim] and [B, z_dim] -> features [B, F]."""
        return self.decoder(torch.cat([z, embedding], dim=1)) * self.std + self.mean


def two_layers(inputs: int) -> nn.Sequential:
    """[B, inputs] -> [B, HIDDEN]."""
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
