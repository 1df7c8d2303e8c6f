"""The two trainings of CSI as a table: what `python -m train --mode …` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from csi.augmentation import RandomAugmentation, joint_labels, make_views, rotation_labels
from csi.loss import supervised_contrastive
from csi.network import CSINet
from csi.optimizers import LARS, Together, step_decay, warmup_cosine

from datasets.datasetsHelper import to_float
from training.loop import Objective

WEIGHT_DECAY = 1e-6
MONITOR_LEARNING_RATE = 1e-3
LINEAR_LAYERS = ("linear", "shift_cls_layer", "joint_distribution_layer")


@dataclass(frozen=True)
class Representation:
    """Supervised contrastive loss over 8 views of every image; views attract when class and rotation agree.

    `linear` learns alongside from detached features of the unrotated views, to watch the features grow.
    """

    classes: int
    augment: nn.Module = field(default_factory=RandomAugmentation)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.rand(count, 2, generator=generator) < 0.5,)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, flips: Tensor) -> dict[str, Tensor]:
        copies = flips.shape[1]
        outputs = model(self.augment(make_views(to_float(images), flips)), "simclr_layer", "linear")
        contrastive = supervised_contrastive(outputs["simclr_layer"], joint_labels(labels, copies, self.classes))
        unrotated, labels = outputs["linear"][: copies * len(labels)].float(), labels.repeat(copies)
        monitor = F.cross_entropy(unrotated, labels)
        accuracy = (unrotated.argmax(1) == labels).float().mean()
        return {"loss": contrastive + monitor, "contrastive": contrastive, "linear": monitor, "accuracy": accuracy}


@dataclass(frozen=True)
class LinearLayers:
    """Cross-entropies of the three linear layers on frozen features: class of unrotated images, rotation, and both."""

    classes: int
    augment: nn.Module = field(default_factory=RandomAugmentation)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.rand(count, 1, generator=generator) < 0.5,)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, flips: Tensor) -> dict[str, Tensor]:
        outputs = model(self.augment(make_views(to_float(images), flips)), *LINEAR_LAYERS)
        targets = labels, rotation_labels(labels, 1), joint_labels(labels, 1, self.classes)
        losses = {
            head: F.cross_entropy(outputs[head][: len(target)].float(), target)
            for head, target in zip(LINEAR_LAYERS, targets, strict=True)
        }
        accuracy = (outputs["linear"][: len(labels)].argmax(1) == labels).float().mean()
        return {"loss": sum(losses.values())} | losses | {"accuracy": accuracy}


def prepare_representation(model: CSINet, learning_rate: float) -> Together:
    """LARS on the extractor and `simclr_layer`, Adam on `linear`; the other two layers wait for their own stage."""
    idle = (model.shift_cls_layer, model.joint_distribution_layer)
    for layer in idle:
        layer.requires_grad_(False)
    monitored = {id(p) for p in model.linear.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in monitored]
    adam = torch.optim.Adam(model.linear.parameters(), MONITOR_LEARNING_RATE, fused=True)
    return Together(LARS(trained, learning_rate, weight_decay=WEIGHT_DECAY), adam)


def prepare_linear(model: CSINet, learning_rate: float) -> torch.optim.Optimizer:
    """Freeze all but the linear layers. SGD treats every tensor by itself and the layers share no gradient, so one
    optimizer does what CSI's three do."""
    layers = [getattr(model, head) for head in LINEAR_LAYERS]
    model.freeze_all_but(*layers)
    return torch.optim.SGD(
        [p for layer in layers for p in layer.parameters()], learning_rate, weight_decay=WEIGHT_DECAY
    )


@dataclass(frozen=True)
class Training:
    """One training mode.

    Attributes:
        prepare: (network, learning rate) -> optimizer; freezes what is not trained.
        objective: what the training of a network with so many classes minimises.
        schedule: (epochs behind, peak or start, warm-up epochs, epochs) -> learning rate.
    """

    prepare: Callable[[CSINet, float], torch.optim.Optimizer | Together]
    objective: Callable[[int], Objective]
    schedule: Callable[[float, float, int, int], float]


TRAININGS = {
    "sup_simclr_CSI": Training(prepare_representation, Representation, warmup_cosine),
    "sup_CSI_linear": Training(
        prepare_linear, LinearLayers, lambda progress, start, warmup, epochs: step_decay(progress, start, epochs)
    ),
}
