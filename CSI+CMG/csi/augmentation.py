"""Views of a batch: flips, rotations, and random augmentation of every view on its own, on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cli.errors import UserError
from utils import autocast

ROTATIONS = 4


def make_views(images: Tensor, flips: Tensor) -> Tensor:
    """Every image in V copies, flipped or not, each copy rotated by 0, 90, 180 and 270 degrees (counter-clockwise).

    Args:
        images: [B, C, S, S].
        flips: [B, V], bool.

    Returns:
        [4 * V * B, C, S, S]: rotations outermost, then copies, then images; the first V * B are not rotated.
    """
    copies = torch.cat([torch.where(flip[:, None, None, None], images.flip(-1), images) for flip in flips.unbind(1)])
    return torch.cat([copies.rot90(r, (2, 3)) for r in range(ROTATIONS)])


def rotation_labels(labels: Tensor, copies: int) -> Tensor:
    """The rotation 0 ... 3 of every view, in the order of `make_views`: [B] -> [4 * V * B]."""
    return torch.arange(ROTATIONS, device=labels.device).repeat_interleave(copies * len(labels))


def joint_labels(labels: Tensor, copies: int, classes: int) -> Tensor:
    """class + classes * rotation of every view, in the order of `make_views`: [B] -> [4 * V * B]."""
    return labels.repeat(ROTATIONS * copies) + classes * rotation_labels(labels, copies)


class RandomAugmentation(nn.Module):
    """Colour jitter, grayscale, resized crop, in CSI's order and strengths, each with its own numbers for every image.

    [N, 3, S, S] -> [N, 3, S, S], floats in [0, 1]. Only the order of jitter's four steps is common to the batch. The
    numbers come from torch's CPU generator, whatever the device.
    """

    def __init__(self, size: int = 32):
        super().__init__()
        try:  # here, because only training needs it
            import kornia.augmentation as K
        except ImportError:
            raise UserError("kornia is not installed, and CSI's training needs it: pip install kornia") from None
        self.steps = nn.Sequential(
            K.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            # "resample" crops the whole batch at once; kornia's default takes the images one by one.
            K.RandomResizedCrop((size, size), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), cropping_mode="resample"),
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with autocast(images.device, "fp32"):  # coordinates need the digits that bf16 lacks
            return self.steps(images).clamp(0, 1).contiguous(memory_format=torch.channels_last)
