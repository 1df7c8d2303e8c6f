"""Small data sets in their true formats on disk, the same at every call.

    write_mnist(root, 3)            MNIST/raw/train-images-idx3-ubyte …: 3 images of each class in each split
    write_cifar10(root, 20)         cifar-10-batches-py: 20 images in each of the six batch files
    write_cifar100(root, 20)        cifar-100-python: 20 images in each of train and test
    write_svhn(root, 20)            train_32x32.mat and test_32x32.mat: 20 images each
    write_folder(root, "LSUN_resize", 20)

Labels go round: 0, 1, …, 9, 0, … Each class has a bright square at a place of its own on a dark noisy ground, so
that a small network can learn the classes.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np


def labels_in_turn(count: int, classes: int = 10) -> np.ndarray:
    """0, 1, …, classes - 1, 0, …: int64 [count]."""
    return np.arange(count) % classes


def squares(labels: np.ndarray, size: int, channels: int, seed: int) -> np.ndarray:
    """One image per label, uint8 [N, channels, size, size]: a bright square whose place on a 4x4 grid is the label's."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 64, (len(labels), channels, size, size), dtype=np.uint8)
    side = size // 4
    for image, label in zip(images, labels, strict=True):
        row, column = (int(label) // 4) % 4 * side, int(label) % 4 * side
        image[:, row : row + side, column : column + side] += np.uint8(160)
    return images


def write_mnist(root: Path, n_per_class: int, folder: str = "MNIST", compressed: bool = False) -> None:
    """The four IDX files of MNIST in `root/folder/raw`, each split with `n_per_class` images of each digit."""
    raw = Path(root) / folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for seed, prefix in enumerate(("train", "t10k")):
        labels = labels_in_turn(10 * n_per_class)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", squares(labels, 28, 1, seed)[:, 0], compressed)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels, compressed)


def write_idx(path: Path, array: np.ndarray, compressed: bool = False) -> None:
    """An array of bytes in the IDX format; `compressed` writes `path`.gz."""
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    if compressed:
        path, content = path.with_name(path.name + ".gz"), gzip.compress(content, mtime=0)
    path.write_bytes(content)


def write_cifar10(root: Path, n: int) -> None:
    """The six batch files of CIFAR-10 for Python, `n` images in each: 5n for training, n for testing."""
    folder = Path(root) / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = labels_in_turn(n)
        write_cifar_batch(folder / name, squares(labels, 32, 3, seed), {b"labels": labels.tolist()})


def write_cifar100(root: Path, n: int) -> None:
    """The files `train` and `test` of CIFAR-100 for Python, `n` images in each; fine labels 0, 1, …, 99, 0, …"""
    folder = Path(root) / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("train", "test")):
        labels = labels_in_turn(n, 100)
        write_cifar_batch(
            folder / name, squares(labels, 32, 3, 100 + seed), {b"fine_labels": labels.tolist(), b"coarse_labels": (labels // 5).tolist()}
        )


def write_cifar_batch(path: Path, images: np.ndarray, labels: dict[bytes, list[int]]) -> None:
    """A batch as Python 2 pickled it: data uint8 [N, 3072] and lists of labels."""
    entries = {b"data": images.reshape(len(images), -1)} | labels | {b"batch_label": b"tiny"}
    path.write_bytes(python2_pickle(entries))


def python2_pickle(value: object) -> bytes:
    """A pickle of protocol 2 as Python 2 wrote it, in which text is bytes: of dicts, lists, ints, bytes and byte arrays."""

    def encode(value: object) -> bytes:
        match value:
            case bytes() if len(value) < 256:
                return b"U" + bytes([len(value)]) + value
            case bytes():
                return b"T" + struct.pack("<i", len(value)) + value
            case int():
                return b"J" + struct.pack("<i", value)
            case list():
                return b"](" + b"".join(map(encode, value)) + b"e"
            case dict():
                return b"}(" + b"".join(encode(key) + encode(item) for key, item in value.items()) + b"u"
            case np.ndarray():
                empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
                byte = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
                shape = b"(" + b"".join(map(encode, value.shape)) + b"t"
                return empty + b"(K\x01" + shape + byte + b"\x89" + encode(value.tobytes()) + b"tb"
        raise TypeError(f"cannot pickle {type(value)}")

    return b"\x80\x02" + encode(value) + b"."


def write_svhn(root: Path, n: int) -> None:
    """`train_32x32.mat` and `test_32x32.mat`, `n` images each; the files call the digit 0 class 10."""
    from scipy.io import savemat

    Path(root).mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(("train", "test")):
        labels = labels_in_turn(n)
        images = squares(labels, 32, 3, 200 + seed)
        stored = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        savemat(Path(root) / f"{split}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": stored}, do_compression=True)


def write_folder(root: Path, name: str, n: int, size: int = 32, nested: bool = False, mode: str = "RGB") -> list[Path]:
    """`n` PNG images of coloured noise in `root/name`, or, `nested`, in a class folder below it. Returns their paths, in order."""
    from PIL import Image

    folder = Path(root) / name / "images" if nested else Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(zlib.crc32(str(name).encode()))
    paths = [folder / f"image_{i:05d}.png" for i in range(n)]
    for path in paths:
        Image.fromarray(draw.integers(0, 256, (size, size, 3), dtype=np.uint8)).convert(mode).save(path)
    return paths
