"""The entry to the data: a task's images and labels as tensors, read once.

    train, test = load_ind(experiment, data_dir)
    ood = load_ood(experiment, "SVHN", data_dir)

Images are uint8 [N, C, S, S], labels int64 [N] (IND classes renumbered 0, 1, …). A published
data set is one entry in `datasets.sources.SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cli.errors import UserError
from datasets.folders import read_images
from datasets.obtain import read_source
from datasets.sources import SOURCES
from datasets.tasks import HELD_OUT, Experiment, Task, UserFolder
from utils import generator


@dataclass(frozen=True)
class Images:
    """Images, uint8 [N, C, S, S], or features in their place, float32 [N, F] or [N, F, 1, 1]; and labels, int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Images:
        return Images(self.images.to(device), self.labels.to(device))

    def at(self, index: Tensor) -> Images:
        return Images(self.images[index], self.labels[index])


def to_float(images: Tensor) -> Tensor:
    """uint8 0…255 -> float 0…1, with the channels innermost in memory, as convolutions read them fastest; features of a
    backbone, which are floats, as they are."""
    if images.is_floating_point():
        return images
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


# --- what a task reads --------------------------------------------------------------------------


def load_ind(experiment: Experiment, data_dir: Path) -> tuple[Images, Images]:
    """The IND training and test images.

    Raises:
        UserError: the files are missing and cannot be fetched, or are not what they should be.
    """
    task = experiment.task
    train, test = (select(read(task, task.dataset, data_dir, split), experiment.classes) for split in ("train", "test"))
    return train, test


def load_ood(experiment: Experiment, name: str, data_dir: Path) -> Tensor:
    """The test images of one OOD set, uint8 [N, C, S, S]. Raises `UserError` as `load_ind` does."""
    task = experiment.task
    if name != HELD_OUT:
        return read(task, name, data_dir, "test").images
    test = read(task, task.dataset, data_dir, "test")
    held_out = [c for c in test.labels.unique().tolist() if c not in experiment.classes]
    return select(test, held_out).images


def read(task: Task, name: str, data_dir: Path, split: str) -> Images:
    """One split of one data set, checked against the task's image shape."""
    if name in task.folders:
        return read_user_folder(task.folders[name], split, *task.read_shape)
    data = READERS[name](Path(data_dir), split)
    expected = (task.image_channels, task.image_size, task.image_size)
    if data.images.shape[1:] != expected and not task.backbone:  # which brings them to its size
        raise UserError(
            f"{name} in {data_dir}: images are {list(data.images.shape[1:])}, expected {list(expected)} "
            "(channels, height, width)"
        )
    return data


def select(data: Images, classes: tuple[int, ...] | list[int]) -> Images:
    """The images of `classes`, which are renumbered 0, 1, … in the order given."""
    renumbered = torch.full((int(data.labels.max()) + 1,), -1)
    for new, old in enumerate(classes):
        if old < len(renumbered):
            renumbered[old] = new
    labels = renumbered[data.labels]
    return Images(data.images[labels >= 0], labels[labels >= 0])


def split_validation(data: Images, fraction: float) -> tuple[Images, Images]:
    """Keep a share of every class apart: (the rest, the share).

    The choice depends on nothing but the labels and the fraction: both training commands and stage 2 hold out
    the same images, whatever their seeds.

    Raises:
        UserError: a class would be kept whole, or not at all.
    """
    held = torch.zeros(len(data), dtype=torch.bool)
    if fraction:
        for label in data.labels.unique().tolist():
            members = (data.labels == label).nonzero().flatten()
            count = round(fraction * len(members))
            if not 0 < count < len(members):
                raise UserError(
                    f"--val-fraction {fraction}: keeps {count} of the {len(members)} training images of class {label}; "
                    "expected at least one and not all"
                )
            order = torch.randperm(len(members), generator=generator(0, "validation", label))
            held[members[order[:count]]] = True
    return data.at(~held), data.at(held)


# --- readers ------------------------------------------------------------------------------------


def read_digits(data_dir: Path, split: str) -> Images:
    """The 1,797 handwritten 8x8 digits that ship with scikit-learn; a third of each class is the test split."""
    from sklearn.datasets import load_digits  # takes a second, which other data sets do without
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = train_test_split(np.arange(len(digits.target)), test_size=1 / 3, stratify=digits.target, random_state=0)
    chosen = np.sort(rows[0] if split == "train" else rows[1])
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return Images(torch.from_numpy(images)[:, None], torch.from_numpy(digits.target[chosen].astype(np.int64)))


def read_digits_rgb(data_dir: Path, split: str) -> Images:
    """The same digits as 3x32x32 images: enlarged bilinearly, the three channels alike."""
    digits = read_digits(data_dir, split)
    enlarged = F.interpolate(digits.images.float(), size=32, mode="bilinear").round().to(torch.uint8)
    return Images(enlarged.expand(-1, 3, -1, -1).contiguous(), digits.labels)


def read_published(name: str, data_dir: Path, split: str) -> Images:
    """A published data set, fetched where it is missing. Raises `UserError` as `datasets.obtain.read_source` does."""
    return to_tensors(*read_source(name, data_dir, split))


def read_user_folder(folder: UserFolder, split: str, channels: int, size: int) -> Images:
    """A user's own images, brought to the task's shape; of an OOD folder, all images whatever the split, with label 0.

    Raises:
        UserError: a class has no images, or one cannot be decoded.
    """
    root = folder.root / split if folder.classes else folder.root
    images, names = read_images(root, channels, size, resize=True)
    if not folder.classes:
        return to_tensors(images, np.zeros(len(names)))
    number = {name: k for k, name in enumerate(folder.classes)}
    labels = np.array([number.get(name.split("/")[0], -1) for name in names])
    if (labels < 0).any():
        raise UserError(
            f"{root / names[int(labels.argmin())]}: belongs to no class; expected {root}/CLASS/IMAGE. Move or remove it"
        )
    empty = [name for name, k in number.items() if k not in labels]
    if empty:
        raise UserError(f"{root / empty[0]}: no images there; every class needs some in train and in test")
    return to_tensors(images, labels)


def to_tensors(images: np.ndarray, labels: np.ndarray) -> Images:
    """Arrays as tensors, without a copy where the array may be written to."""
    return Images(
        torch.from_numpy(np.require(images, requirements=["C", "W"])), torch.from_numpy(labels.astype(np.int64))
    )


Reader = Callable[[Path, str], Images]

READERS: dict[str, Reader] = {
    "digits": read_digits,
    "digits_rgb": read_digits_rgb,
} | {name: partial(read_published, name) for name in SOURCES}
