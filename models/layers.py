"""Building blocks: the feature extractors, the residual block of the decoder.

State-dict names are those of the first public code, so that checkpoints interchange.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NineConvolutions(nn.Module):
    """The MNIST extractor: nine 3x3 convolutions in three groups, each group halving the image.

    [B, C, S, S] -> [B, 128, ceil(S/8), ceil(S/8)]. Dropout2d opens each group; on one-channel images the
    first one blanks the whole image with probability 0.2, which gives the training loss a floor.
    """

    widths = (64, 64, 128, 128, 128, 128, 128, 128, 128)

    def __init__(self, image_channels: int):
        super().__init__()
        channels = image_channels
        for i, width in enumerate(self.widths, start=1):
            stride = 2 if i % 3 == 0 else 1
            conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
            nn.init.normal_(conv.weight, 0.0, 0.05)
            setattr(self, f"conv{i}", conv)
            channels = width
        for i, width in enumerate(self.widths, start=1):
            norm = nn.BatchNorm2d(width)
            nn.init.normal_(norm.weight, 1.0, 0.02)
            setattr(self, f"bn{i}", norm)
        for group in (1, 2, 3):
            setattr(self, f"dr{group}", nn.Dropout2d(0.2))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, len(self.widths) + 1):
            if i % 3 == 1:
                x = getattr(self, f"dr{(i + 2) // 3}")(x)
            x = F.leaky_relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)), 0.2)
        return x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., CVPR 2016, figure 5 left)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        # A 1x1 convolution of stride 2 reads every second pixel. Picking those first gives the same, and avoids a fault
        # of oneDNN: on AVX2 its weight gradient of fewer than 8 channels-last channels is wrong or corrupts memory.
        self.stride = stride
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x[..., :: self.stride, :: self.stride]))


class ResNet18(nn.Module):
    """The CIFAR ResNet-18 without its last layer: [B, C, S, S] -> [B, 8 * width, 1, 1] for S of 25 to 32.

    `width` is the number of channels of the first stage: 64 in the method, less only for quick trials.
    """

    def __init__(self, image_channels: int = 3, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(image_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        in_channels = width
        for stage in range(4):
            channels, stride = width * 2**stage, 1 if stage == 0 else 2
            blocks = BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            in_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return F.avg_pool2d(x, 4)


class ResidualBlock(nn.Module):
    """The decoder's residual block: relu(x) + f(relu(x)), since its first ReLU works in place on the skip's x too."""

    def __init__(self, channels: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = skip = self.block[0](x)
        for layer in self.block[1:]:
            x = layer(x)
        return skip + x


class Standardise(nn.Module):
    """Brings every channel to mean 0 and variance 1, by the statistics of the training images: [B, C, …] -> the same.

    It is the extractor of what a backbone has made of the images already.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def fit(self, inputs: Tensor) -> None:
        """Take the statistics of [N, C, …]; a channel that is constant keeps its size."""
        values = inputs.transpose(0, 1).flatten(1)
        std = values.std(1, correction=0)
        self.mean.copy_(values.mean(1))
        self.std.copy_(torch.where(std > 0, std, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)

    def inverse(self, x: Tensor) -> Tensor:
        """What `forward` brings to x."""
        shape = (-1, *[1] * (x.dim() - 2))
        return x * self.std.view(shape) + self.mean.view(shape)


NARROW = 16  # width of the family "narrow": the CIFAR-10 networks with a quarter of the channels, for quick trials

EXTRACTORS: dict[str, Callable[[int], nn.Module]] = {
    "mnist": NineConvolutions,
    "cifar10": ResNet18,
    "narrow": partial(ResNet18, width=NARROW),
    "features": Standardise,
}


def count_features(extractor: nn.Module, image_channels: int, image_size: int) -> int:
    """How many features `extractor` gives for one image, flattened."""
    training = extractor.training
    with torch.no_grad():
        features = extractor.eval()(torch.zeros(1, image_channels, image_size, image_size))
    extractor.train(training)
    return features.numel()
