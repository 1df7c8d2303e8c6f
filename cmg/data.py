"""What stage 2 works on: the real images, and their features, which are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cli.errors import UserError
from cli.progress import Progress
from datasets.datasetsHelper import Images, load_ind, load_ood, split_validation, to_float
from datasets.tasks import Experiment
from models.inference import in_chunks
from training.loop import fingerprint


@dataclass(frozen=True)
class FeatureBank:
    """Features [N, F] of the real images, and the labels of those that have some.

    `validation` are IND training images that neither stage trained on; empty where none were kept.
    """

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    test: Tensor
    test_labels: Tensor
    ood: dict[str, Tensor]


@dataclass(frozen=True)
class Stage2Data:
    """Real images, or features of a backbone in their place, on the device: IND with labels, OOD sets by name;
    `validation` may be empty."""

    train: Images
    validation: Images
    test: Images
    ood: dict[str, Tensor]

    def counts(self) -> dict[str, int]:
        """How many images there are of each kind."""
        parts = {"IND training": self.train, "IND validation": self.validation, "IND test": self.test} | self.ood
        return {name: len(images) for name, images in parts.items()}

    @property
    def summary(self) -> str:
        """The same in words."""
        return ", ".join(f"{n:,} {name}" for name, n in self.counts().items())

    def encode(self, features: Callable[[Tensor], Tensor], precision: str) -> FeatureBank:
        """The features of all images."""
        progress = Progress(sum(self.counts().values()), "encoding")

        def run(images: Tensor) -> Tensor:
            return in_chunks(lambda part: features(to_float(part)), images, precision, progress)

        bank = FeatureBank(
            train=run(self.train.images),
            train_labels=self.train.labels,
            validation=run(self.validation.images) if len(self.validation) else torch.empty(0),
            test=run(self.test.images),
            test_labels=self.test.labels,
            ood={name: run(images) for name, images in self.ood.items()},
        )
        progress.close()
        return bank


def load_data(
    experiment: Experiment,
    ood_names: Sequence[str],
    data_dir: Path,
    origins: dict[str, dict],
    device: torch.device,
    encode: Callable[[Tensor], Tensor] = lambda images: images,
) -> Stage2Data:
    """The images of stage 2, with those apart that the networks kept from training.

    Args:
        encode: what the networks see in the place of images, uint8 [N, C, S, S].
        origins: how each of the two networks was made, by what messages call it; {} where that is not known.

    Raises:
        UserError: the networks kept different images from training, or were trained on others than these.
    """
    task = experiment.task
    (first, kept), (second, also_kept) = ((name, origin.get("val_fraction", 0.0)) for name, origin in origins.items())
    if kept != also_kept:
        raise UserError(
            f"{first} was trained with --val-fraction {kept} and {second} with {also_kept}: train both with the same"
        )
    train, test = load_ind(experiment, data_dir)
    train, validation = split_validation(train, kept)
    trained_on = fingerprint(train)
    place = task.folders[task.dataset].root if task.dataset in task.folders else data_dir
    for name, origin in origins.items():
        if origin.get("data", trained_on) != trained_on:
            raise UserError(
                f"{name} was trained on other images than those now in {place}: put them back, or "
                "train it again with --restart"
            )
    ood = {name: encode(load_ood(experiment, name, data_dir)).to(device) for name in ood_names}
    train, validation, test = (
        Images(encode(part.images) if len(part) else part.images, part.labels).to(device)
        for part in (train, validation, test)
    )
    return Stage2Data(train, validation, test, ood)
