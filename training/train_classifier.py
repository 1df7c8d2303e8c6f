"""Stage 1, the IND classifier: network, loss and report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets.datasetsHelper import Images, to_float
from datasets.tasks import Task
from evaluation.metrics import accuracy
from models.inference import in_chunks
from models.main_model import MainModel

CROP_PADDING = 4


def build_classifier(task: Task) -> MainModel:
    """The task's untrained classifier."""
    return MainModel(task.image_size, task.image_channels, task.logits, task.networks)


@dataclass(frozen=True)
class ClassifierObjective:
    """Cross-entropy over all logits; with `augment`, on randomly cropped and flipped images."""

    augment: bool

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        if not self.augment:
            return ()
        offsets = torch.randint(2 * CROP_PADDING + 1, (count, 2), generator=generator)
        return offsets, torch.rand(count, generator=generator) < 0.5

    def augmented(self, images: Tensor, *draws: Tensor) -> Tensor:
        """The images as the network sees them, given what `draw` drew for them."""
        return crop_and_flip(images, *draws) if self.augment else images

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *draws: Tensor) -> dict[str, Tensor]:
        logits = model(to_float(self.augmented(images, *draws))).float()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Pad with zeros, crop each image at its own offset back to its size, mirror those flagged.

    The distribution of RandomCrop(S, padding=4) followed by RandomHorizontalFlip, given uniform draws.

    Args:
        images: [B, C, S, S].
        offsets: [B, 2], row and column of the crop's corner, 0 … 8.
        flips: [B], bool.
    """
    size = images.shape[-1]
    windows = F.pad(images, [CROP_PADDING] * 4).unfold(2, size, 1).unfold(3, size, 1)  # a view: [B, C, 9, 9, S, S]
    cropped = windows[torch.arange(len(images), device=images.device), :, offsets[:, 0], offsets[:, 1]]
    return torch.where(flips[:, None, None, None], cropped.flip(-1), cropped)


def evaluate_classifier(model: MainModel, data: Images, num_ind: int, precision: str) -> dict[str, float]:
    """Accuracy over the IND classes, of a model and images on one device."""
    logits = in_chunks(lambda images: model(to_float(images)), data.images, precision)
    return {"accuracy": accuracy(logits, data.labels, num_ind)}
