"""The entry to the data: a task's images and labels as tensors, read once.

    train, test = load_ind(task, "partition1", data_dir)
    ood = load_ood(task, "partition1", "SVHN", data_dir)

Images are uint8 [N, C, S, S], labels int64 [N] (IND classes renumbered 0, 1, …). A data set is one function
in `READERS`.
"""

from __future__ import annotations

import gzip
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.tasks import HELD_OUT, Task
from utils import UserError, generator

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp"}


class Images(NamedTuple):
    """Images, uint8 [N, C, S, S], and labels, int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Images:
        return Images(self.images.to(device), self.labels.to(device))

    def at(self, index: Tensor) -> Images:
        return Images(self.images[index], self.labels[index])


def to_float(images: Tensor) -> Tensor:
    """uint8 0…255 -> float 0…1, with the channels innermost in memory, as convolutions read them fastest."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


# --- what a task reads --------------------------------------------------------------------------


def load_ind(task: Task, partition: str, data_dir: Path) -> tuple[Images, Images]:
    """The IND training and test images of a partition.

    Raises:
        UserError: the files are missing and cannot be fetched, or are not what they should be.
    """
    classes = task.partitions[partition]
    return tuple(select(read(task, task.dataset, data_dir, split), classes) for split in ("train", "test"))


def load_ood(task: Task, partition: str, name: str, data_dir: Path) -> Tensor:
    """The test images of one OOD set, uint8 [N, C, S, S]. Raises `UserError` as `load_ind` does."""
    if name != HELD_OUT:
        return read(task, name, data_dir, "test").images
    test = read(task, task.dataset, data_dir, "test")
    held_out = [c for c in test.labels.unique().tolist() if c not in task.partitions[partition]]
    return select(test, held_out).images


def read(task: Task, name: str, data_dir: Path, split: str) -> Images:
    """One split of one data set, checked against the task's image shape."""
    data = READERS[name](Path(data_dir), split)
    expected = (task.image_channels, task.image_size, task.image_size)
    if data.images.shape[1:] != expected:
        raise UserError(
            f"{name} in {data_dir}: images are {list(data.images.shape[1:])}, expected {list(expected)} (channels, height, width)"
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
    """
    held = torch.zeros(len(data), dtype=torch.bool)
    if fraction:
        for label in data.labels.unique().tolist():
            members = (data.labels == label).nonzero().flatten()
            order = torch.randperm(len(members), generator=generator(0, "validation", label))
            held[members[order[: round(fraction * len(members))]]] = True
    return data.at(~held), data.at(held)


# --- readers ------------------------------------------------------------------------------------


def read_digits(data_dir: Path, split: str) -> Images:
    """The 1,797 handwritten 8x8 digits that ship with scikit-learn; a third of each class is the test split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = train_test_split(np.arange(len(digits.target)), test_size=1 / 3, stratify=digits.target, random_state=0)
    chosen = np.sort(rows[0] if split == "train" else rows[1])
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return Images(torch.from_numpy(images)[:, None], torch.from_numpy(digits.target[chosen].astype(np.int64)))


def read_mnist(data_dir: Path, split: str) -> Images:
    """MNIST from its IDX files, gzipped or not, in `MNIST/raw`; downloaded by torchvision where they are missing."""
    prefix = {"train": "train", "test": "t10k"}[split]
    names = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    raw = data_dir / "MNIST" / "raw"
    if not all(_idx_file(raw / name) for name in names):
        download("MNIST", data_dir, split)
    images, labels = (read_idx(_idx_file(raw / name)) for name in names)
    return _checked(raw, images[:, None], labels)


def _idx_file(path: Path) -> Path | None:
    """The file itself or its gzipped form, whichever is there."""
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, type 8, number of dimensions, the sizes big-endian, the data."""
    try:
        data = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Delete it and fetch it again") from None
    header = 4 + 4 * data[3] if len(data) > 3 else 4
    shape = struct.unpack(f">{data[3]}I", data[4:header]) if len(data) >= header > 4 else ()
    if data[:3] != b"\0\0\x08" or not shape or len(data) - header != np.prod(shape):
        raise UserError(f"{path}: is no complete IDX file of bytes. Delete it and fetch it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_cifar(
    name: str, folder: str, files: dict[str, list[str]], label_key: bytes, data_dir: Path, split: str
) -> Images:
    """CIFAR-10 or CIFAR-100 from the pickled batches of its Python version; downloaded where they are missing."""
    paths = [data_dir / folder / file for file in files[split]]
    if not all(path.is_file() for path in paths):
        download(name, data_dir, split)
    batches = [_read_cifar_batch(path, label_key) for path in paths]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return _checked(data_dir / folder, images, labels)


def _read_cifar_batch(path: Path, label_key: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file:
            batch = ArrayUnpickler(file, encoding="bytes").load()
        return np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32), np.asarray(batch[label_key])
    except (
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        OSError,
    ) as error:
        raise UserError(f"{path}: is no CIFAR batch ({error}). Delete it and fetch it again") from None


class ArrayUnpickler(pickle.Unpickler):
    """Loads plain values and numpy arrays and refuses everything else, so that a file cannot run code."""

    allowed = {
        (module, name)
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "ndarray", "dtype")
    } | {("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"holds {module}.{name}, which could run code")
        return super().find_class(module, name)


def read_svhn(data_dir: Path, split: str) -> Images:
    """SVHN (cropped digits) from `{split}_32x32.mat`; downloaded where it is missing. The file's class 10 is the digit 0."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    path = data_dir / f"{split}_32x32.mat"
    if not path.is_file():
        download("SVHN", data_dir, split)
    try:
        content = loadmat(path)
        images, labels = content["X"].transpose(3, 2, 0, 1), content["y"].reshape(-1) % 10
    except (MatReadError, ValueError, KeyError, NotImplementedError, TypeError, OSError) as error:
        raise UserError(f"{path}: is no SVHN file ({error}). Delete it and fetch it again") from None
    return _checked(path, images, labels)


def read_folder(folder: str, data_dir: Path, split: str) -> Images:
    """The images below `folder`, at any depth, in the order of their names; all labels are 0."""
    from PIL import Image, UnidentifiedImageError

    root = data_dir / folder
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not paths:
        raise UserError(f"{root}: no images there; expected the folder {folder} of 32x32 images below --data-dir")
    arrays = []
    for path in paths:
        try:
            arrays.append(np.asarray(Image.open(path).convert("RGB")))
        except (UnidentifiedImageError, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be decoded ({error}). Replace or remove it") from None
        if arrays[-1].shape != arrays[0].shape:
            raise UserError(f"{path}: is {arrays[-1].shape[:2]} pixels where {paths[0].name} is {arrays[0].shape[:2]}")
    return _checked(root, np.stack(arrays).transpose(0, 3, 1, 2), np.zeros(len(arrays)))


def _checked(path: Path, images: np.ndarray, labels: np.ndarray) -> Images:
    if len(images) != len(labels) or not len(images):
        raise UserError(
            f"{path}: {len(images)} images and {len(labels)} labels; expected as many of both. Fetch the files again"
        )
    return Images(torch.from_numpy(np.array(images, order="C")), torch.from_numpy(labels.astype(np.int64)))


def download(name: str, data_dir: Path, split: str) -> None:
    """Fetch a data set through torchvision into `data_dir`.

    Raises:
        UserError: there is no network, or what came is not what was expected.
    """
    import torchvision.datasets

    choice = {"split": split} if name == "SVHN" else {"train": split == "train"}
    print(f"{name} is not in {data_dir}: downloading it", flush=True)
    try:
        getattr(torchvision.datasets, name)(data_dir, download=True, **choice)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} is not in {data_dir} and could not be downloaded ({reason}). Put torchvision's files of {name} "
            f"there or pass --data-dir; --task same_dataset_digits needs no download"
        ) from None


Reader = Callable[[Path, str], Images]

READERS: dict[str, Reader] = {
    "digits": read_digits,
    "mnist": read_mnist,
    "cifar10": partial(
        read_cifar,
        "CIFAR10",
        "cifar-10-batches-py",
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        b"labels",
    ),
    "CIFAR100": partial(
        read_cifar, "CIFAR100", "cifar-100-python", {"train": ["train"], "test": ["test"]}, b"fine_labels"
    ),
    "SVHN": read_svhn,
    "LSUN": partial(read_folder, "LSUN_resize"),
    "LSUN-FIX": partial(read_folder, "LSUN_fix"),
    "tinyImageNet": partial(read_folder, "Imagenet_resize"),
    "ImageNet-FIX": partial(read_folder, "Imagenet_fix"),
}
