"""The classifier: a feature extractor and a small head, which stage 2 fine-tunes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import EXTRACTORS, count_features

HEAD_HIDDEN = 512


class Head(nn.Module):
    """[..., features] -> [..., classes] logits: Linear, ReLU, Linear."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.fc1 = nn.Linear(features, HEAD_HIDDEN)
        self.fc2 = nn.Linear(HEAD_HIDDEN, classes)

    def hidden(self, features: Tensor) -> Tensor:
        """[..., features] -> [..., HEAD_HIDDEN], what the last layer sees."""
        return F.relu(self.fc1(features))

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(self.hidden(features))


class MainModel(nn.Module):
    """The IND classifier: `convE`, the extractor, and `classifier`, the head.

    Args:
        image_size, image_channels: images are [B, image_channels, image_size, image_size] in [0, 1].
        classes: logits: the IND classes, one OOD slot and spare outputs (11 in Setting 1, 110 in Setting 2).
        dataset: family of networks, a key of `EXTRACTORS`.
    """

    def __init__(self, image_size: int, image_channels: int, classes: int, dataset: str):
        super().__init__()
        self.image_size, self.image_channels = image_size, image_channels
        self.classes, self.dataset = classes, dataset
        self.convE = EXTRACTORS[dataset](image_channels)
        self.classifier = Head(count_features(self.convE, image_channels, image_size), classes)

    def features(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, F]."""
        return self.convE(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, classes] logits."""
        return self.classifier(self.features(images))
