"""The conditional VAE, whose decoder stage 2 turns into a source of pseudo-OOD images."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import EXTRACTORS, NARROW, ResidualBlock, count_features

CVAE_HIDDEN = 1024


class PlainEncoder(nn.Module):
    """The CVAE's MNIST encoder: two 4x4 convolutions of stride 2 whose padding of S/2 + 1 keeps the image size S, a
    multiple of 4. Raises `ValueError` for another."""

    def __init__(self, image_channels: int, image_size: int):
        super().__init__()
        if image_size % 4:
            raise ValueError(f"image_size is {image_size}, expected a multiple of 4")
        padding = image_size // 2 + 1
        self.conv1 = nn.Conv2d(image_channels, 64, 4, 2, padding)
        self.conv2 = nn.Conv2d(64, 128, 4, 2, padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class PlainDecoder(nn.Module):
    """The CVAE's MNIST decoder: [B, 128, S/4, S/4] -> [B, C, S, S]."""

    in_channels, scale = 128, 4

    def __init__(self, image_channels: int):
        super().__init__()
        self.deconv1 = nn.ConvTranspose2d(self.in_channels, 64, 4, 2, 1)
        self.deconv2 = nn.ConvTranspose2d(64, image_channels, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.deconv2(F.relu(self.deconv1(x)))


class ResidualDecoder(nn.Module):
    """The CVAE's CIFAR-10 decoder: [B, width, S/8, S/8] -> [B, C, S, S]."""

    scale = 8

    def __init__(self, image_channels: int, width: int = 512):
        super().__init__()
        self.in_channels = width
        self.decoder = nn.Sequential(
            ResidualBlock(width),
            ResidualBlock(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, image_channels, 4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x)


NETWORKS = {
    "mnist": (PlainEncoder, PlainDecoder),
    "cifar10": (lambda image_channels, image_size: EXTRACTORS["cifar10"](image_channels), ResidualDecoder),
    "narrow": (
        lambda image_channels, image_size: EXTRACTORS["narrow"](image_channels),
        partial(ResidualDecoder, width=8 * NARROW),
    ),
}


class ClassConditionalVAE(nn.Module):
    """A VAE whose decoder is conditioned on a learned class embedding; of what, is its subclasses' `encode` and
    `decode`.

    Attributes, which subclasses set:
        makes: what it decodes to, "images" or "features".
        z_dim, class_num: dimensions of the latent and of the class embedding; classes that can be embedded.
        class_embed: linear layer, [B, class_num] -> [B, z_dim].
    """

    makes: str
    z_dim: int
    class_num: int
    class_embed: nn.Linear

    def encode(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """[B, …] -> mean and log-variance of q(z | x), each [B, z_dim]."""
        raise NotImplementedError

    def decode(self, z: Tensor, embedding: Tensor) -> Tensor:
        """[B, z_dim] and [B, z_dim] -> [B, …]."""
        raise NotImplementedError

    def embed(self, labels: Tensor) -> Tensor:
        """[B] class numbers -> [B, z_dim]."""
        return self.class_embed(F.one_hot(labels, self.class_num).to(self.class_embed.weight.dtype))

    def measured(self, inputs: Tensor) -> Tensor:
        """Inputs or reconstructions [B, …] in the scale in which they are compared: as they are, or the subclass's."""
        return inputs

    def forward(self, inputs: Tensor, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions [B, …], means and log-variances [B, z_dim], with z = mean + noise * exp(logvar / 2)."""
        mean, logvar = self.encode(inputs)
        # The latent and its statistics stay in fp32 under autocast: exp and the KL need the digits.
        mean, logvar = mean.float(), logvar.float()
        z = mean + noise * torch.exp(logvar / 2)
        return self.decode(z, self.embed(labels)), mean, logvar


class ConditionalVAE(ClassConditionalVAE):
    """The method's conditional VAE of images.

    Args:
        z_dim: dimensions of the latent and of the class embedding.
        image_channels, image_size: images are [B, image_channels, image_size, image_size] in [0, 1];
            image_size is a multiple of 4 (MNIST networks) or 8 (CIFAR-10 networks).
        class_num: classes that can be embedded.
        dataset: family of networks, a key of `NETWORKS`.
    """

    makes = "images"

    def __init__(
        self,
        z_dim: int = 32,
        image_channels: int = 1,
        image_size: int = 28,
        class_num: int = 10,
        dataset: str = "mnist",
    ):
        super().__init__()
        make_encoder, make_decoder = NETWORKS[dataset]
        self.z_dim, self.class_num = z_dim, class_num
        self.convE = make_encoder(image_channels, image_size)
        self.convD = make_decoder(image_channels)
        side = image_size // self.convD.scale
        self.decoder_shape = (self.convD.in_channels, side, side)
        self.fcE = nn.Linear(count_features(self.convE, image_channels, image_size), CVAE_HIDDEN)
        self.fcE_mean = nn.Linear(CVAE_HIDDEN, z_dim)
        self.fcE_logvar = nn.Linear(CVAE_HIDDEN, z_dim)
        self.fromZ = nn.Linear(2 * z_dim, CVAE_HIDDEN)
        self.fcD = nn.Linear(CVAE_HIDDEN, self.convD.in_channels * side * side)
        self.class_embed = nn.Linear(class_num, z_dim)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, S, S] -> mean and log-variance of q(z | x), each [B, z_dim]."""
        hidden = F.relu(self.fcE(self.convE(images).flatten(1)))
        return self.fcE_mean(hidden), self.fcE_logvar(hidden)

    def decode(self, z: Tensor, embedding: Tensor) -> Tensor:
        """[B, z_dim] and [B, z_dim] -> images [B, C, S, S] in [0, 1]."""
        hidden = F.relu(self.fromZ(torch.cat([z, embedding], dim=1)))
        return torch.sigmoid(self.convD(self.fcD(hidden).unflatten(1, self.decoder_shape)))
