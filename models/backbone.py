"""A frozen network that others have trained, as the extractor of images of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Backbone(nn.Module):
    """Images [B, C, H, W] in [0, 1] -> features [B, F, 1, 1]: what it was trained with done to them first.

    Args:
        network: normalised images [B, 3, size, size] -> [B, F], or maps, of which the means are taken.
        size: side in pixels to which images of another size are brought.
        mean, std: of the three channels, by which images are normalised.
        interpolation: "bilinear" or "bicubic".

    Attributes:
        name: under which it is found again; `training.backbone.load_backbone` sets it.
    """

    def __init__(
        self,
        network: nn.Module,
        size: int,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        interpolation: str = "bilinear",
    ):
        super().__init__()
        self.network, self.size, self.interpolation = network, size, interpolation
        self.name = ""
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.size, self.size):
            size = [self.size, self.size]
            images = F.interpolate(images, size, mode=self.interpolation, align_corners=False, antialias=True)
            images = images.clamp(0, 1)
        features = self.network((images - self.mean) / self.std)  # of grey images each channel is the same
        if not isinstance(features, torch.Tensor) or features.dim() < 2 or not features.is_floating_point():
            kind = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
            shape = f" {list(features.shape)}" if isinstance(features, torch.Tensor) else ""
            raise TypeError(f"gives {kind}{shape}, expected real features [B, F] or maps")
        return features.flatten(2).mean(2)[:, :, None, None] if features.dim() > 2 else features[:, :, None, None]


def without_classifier(network: nn.Module) -> nn.Module:
    """A classifier of torchvision's or others' without its last linear layer, in place."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if linear:
        parent, _, child = linear[-1].rpartition(".")
        setattr(network.get_submodule(parent), child, nn.Identity())
    return network
