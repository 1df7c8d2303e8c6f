"""A conditional VAE of features instead of images: class mixing in feature space, an extension of the method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers import Standardise
from models.vae import ClassConditionalVAE

HIDDEN = 512  # units in each of two layers, of encoder and decoder


class FeatureCVAE(ClassConditionalVAE):
    """Features [B, F] of a frozen extractor in the place of images; plain layers, no sigmoid.

    Inside, features are standardised; what goes in and comes out is as the extractor has it.

    Args:
        features: F.
        z_dim, class_num: as in `ClassConditionalVAE`.
    """

    makes = "features"

    def __init__(self, features: int, z_dim: int = 32, class_num: int = 10):
        super().__init__()
        self.z_dim, self.class_num = z_dim, class_num
        self.standardise = Standardise(features)
        self.encoder = two_layers(features)
        self.fc_mean, self.fc_logvar = nn.Linear(HIDDEN, z_dim), nn.Linear(HIDDEN, z_dim)
        self.decoder = nn.Sequential(*two_layers(2 * z_dim), nn.Linear(HIDDEN, features))
        self.class_embed = nn.Linear(class_num, z_dim)

    def measured(self, features: Tensor) -> Tensor:
        return self.standardise(features)

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F] -> mean and log-variance of q(z | features), each [B, z_dim]."""
        hidden = self.encoder(self.standardise(features))
        return self.fc_mean(hidden), self.fc_logvar(hidden)

    def decode(self, z: Tensor, embedding: Tensor) -> Tensor:
        """[B, z_dim] and [B, z_dim] -> features [B, F]."""
        return self.standardise.inverse(self.decoder(torch.cat([z, embedding], dim=1)))


def two_layers(inputs: int) -> nn.Sequential:
    """[B, inputs] -> [B, HIDDEN]."""
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
