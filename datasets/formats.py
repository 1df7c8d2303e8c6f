"""The published file formats as arrays: IDX, CIFAR's pickles, SVHN's MATLAB files.

Every reader takes (data_dir, split), with split "train" or "test", and returns uint8 images [N, C, S, S] and int64
labels [N]. No file can run code here. Raises `UserError` naming the file that is damaged.
"""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np

from cli.errors import UserError
from datasets.folders import read_images

Arrays = tuple[np.ndarray, np.ndarray]

LARGEST_IDX = 1 << 28  # bytes; MNIST's largest file has 47 million


def read_idx_folder(folder: str, data_dir: Path, split: str) -> Arrays:
    """MNIST, or a set laid out like it, from its IDX files in `folder`/raw, gzipped or not."""
    raw = data_dir / folder / "raw"
    prefix = {"train": "train", "test": "t10k"}[split]
    images, labels = (
        read_idx(existing(raw / f"{prefix}-{name}")) for name in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
    )
    if images.ndim != 3 or labels.ndim != 1:
        raise UserError(
            f"{raw}: the {split} images have {images.ndim} dimensions and the labels {labels.ndim}; expected 3 and 1. "
            "Fetch them again"
        )
    return as_many(raw, images[:, None], labels)


def existing(path: Path) -> Path:
    """The gzipped file itself, or its unpacked form if that is there."""
    unpacked = path.with_suffix("") if path.suffix == ".gz" else path
    return unpacked if unpacked.is_file() else path


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, type 8, number of dimensions, the sizes big-endian, the data."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read(LARGEST_IDX)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}). Delete it and fetch it again") from None
    header = 4 + 4 * data[3] if len(data) > 3 else 4
    shape = struct.unpack(f">{data[3]}I", data[4:header]) if len(data) >= header > 4 else ()
    if data[:3] != b"\0\0\x08" or not shape or len(data) - header != np.prod(shape, dtype=object):
        raise UserError(f"{path}: is not a complete IDX file of bytes. Delete it and fetch it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_cifar(folder: str, files: dict[str, list[str]], label_key: bytes, data_dir: Path, split: str) -> Arrays:
    """CIFAR-10 or CIFAR-100 from the pickled batches of its Python version."""
    batches = [_read_cifar_batch(data_dir / folder / file, label_key) for file in files[split]]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return as_many(data_dir / folder, images, labels)


def _read_cifar_batch(path: Path, label_key: bytes) -> Arrays:
    try:
        with open(path, "rb") as file:
            batch = ArrayUnpickler(file, encoding="bytes").load()
        images = np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        labels = whole_numbers(batch[label_key])
    except (
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        OSError,
        ImportError,
        OverflowError,
    ) as error:
        raise UserError(f"{path}: is not a CIFAR batch ({error}). Delete it and fetch it again") from None
    return as_many(path, images, labels)


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


def read_svhn(data_dir: Path, split: str) -> Arrays:
    """SVHN (cropped digits) from `{split}_32x32.mat`. The file's class 10 is the digit 0."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    path = data_dir / f"{split}_32x32.mat"
    try:
        content = loadmat(path)
        images, labels = content["X"].transpose(3, 2, 0, 1), whole_numbers(content["y"].reshape(-1))
        labels = np.where(labels == 10, 0, labels)
    except (
        MatReadError,
        ValueError,
        KeyError,
        NotImplementedError,
        TypeError,
        AttributeError,
        OSError,
        zlib.error,
    ) as error:
        raise UserError(f"{path}: is not an SVHN file ({error}). Delete it and fetch it again") from None
    if images.dtype != np.uint8:
        raise UserError(f"{path}: its images are {images.dtype}, expected uint8. Delete it and fetch it again")
    return as_many(path, images, labels)


def read_flat_folder(folder: str, data_dir: Path, split: str) -> Arrays:
    """The 32x32 colour images below `folder`, at any depth, in the order of their names; all labels are 0."""
    images, names = read_images(data_dir / folder, channels=3, size=32)
    return images, np.zeros(len(names), np.int64)


def whole_numbers(values: object) -> np.ndarray:
    """Labels as int64 [N]. Raises `ValueError` for what is no whole number."""
    numbers = np.asarray(values)
    labels = numbers.astype(np.int64)
    if labels.ndim != 1 or not (labels == numbers).all():
        raise ValueError("its labels are no whole numbers")
    return labels


def as_many(path: Path, images: np.ndarray, labels: np.ndarray) -> Arrays:
    """Images and labels, of which there must be as many, and some."""
    if len(images) != len(labels) or not len(images):
        raise UserError(
            f"{path}: {len(images)} images and {len(labels)} labels; expected as many of each. Fetch the files again"
        )
    return np.ascontiguousarray(images), labels.astype(np.int64)
