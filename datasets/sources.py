"""The published data sets: where they are on disk, where they come from, what they hold.

A new data set is one entry in `SOURCES`, and one reader if its files are laid out in a new way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets.formats import Arrays, read_cifar, read_flat_folder, read_idx_folder, read_svhn

MIB = 1 << 20
BOTH = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file to fetch.

    Attributes:
        addresses: where it is, tried in order.
        target: what it becomes below the data folder: this file, or, if `unpack`, this folder.
        md5: published checksum of the file, or None.
        splits: which splits need it.
        unpack: whether it is an archive.
        contents: for each split the files in the unpacked folder with their MD5; without them it holds images.
        max_files, max_bytes: what it may unpack to, generously; also the most that is fetched.
    """

    addresses: tuple[str, ...]
    target: str
    md5: str | None = None
    splits: tuple[str, ...] = BOTH
    unpack: bool = False
    contents: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    max_files: int = 20_000
    max_bytes: int = 512 * MIB

    def files(self) -> list[str]:
        """The files of all splits in the unpacked folder, where they are known by name."""
        return [file for files in self.contents.values() for file in files]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One published data set.

    Attributes:
        downloads: the files to fetch.
        counts: images of each split.
        shape: of an image: channels, height, width.
        classes: labels are 0 … classes - 1.
        read: (data_dir, split) -> images and labels.
    """

    downloads: tuple[Download, ...]
    counts: Mapping[str, int]
    shape: tuple[int, int, int]
    classes: int
    read: Callable[[Path, str], Arrays]


# --- the registry -------------------------------------------------------------------------------


def _like_mnist(folder: str, addresses: tuple[str, ...], *checksums: str) -> Source:
    """A data set in MNIST's four files; checksums of training images and labels, test images and labels."""
    files = [
        (split, f"{prefix}-{kind}.gz")
        for split, prefix in (("train", "train"), ("test", "t10k"))
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    return Source(
        downloads=tuple(
            Download(
                addresses=tuple(address + name for address in addresses),
                target=f"{folder}/raw/{name}",
                md5=md5,
                splits=(split,),
                max_bytes=64 * MIB,
            )
            for (split, name), md5 in zip(files, checksums, strict=True)
        ),
        counts={"train": 60_000, "test": 10_000},
        shape=(1, 28, 28),
        classes=10,
        read=partial(read_idx_folder, folder),
    )


def _like_cifar(
    folder: str, archive: str, md5: str, classes: int, label_key: bytes, files: dict[str, dict[str, str]]
) -> Source:
    """CIFAR for Python; `files` names the batches of each split with their MD5."""
    return Source(
        downloads=(
            Download(
                addresses=(f"https://www.cs.toronto.edu/~kriz/{archive}",),
                target=folder,
                md5=md5,
                unpack=True,
                contents=files,
                max_files=100,
            ),
        ),
        counts={"train": 50_000, "test": 10_000},
        shape=(3, 32, 32),
        classes=classes,
        read=partial(read_cifar, folder, {split: list(names) for split, names in files.items()}, label_key),
    )


def _ten_thousand(folder: str, addresses: tuple[str, ...], md5: str | None = None) -> Source:
    """An OOD set of 10,000 colour images in a folder."""
    return Source(
        downloads=(Download(addresses=addresses, target=folder, md5=md5, splits=("test",), unpack=True),),
        counts={"test": 10_000},
        shape=(3, 32, 32),
        classes=1,
        read=partial(read_flat_folder, folder),
    )


def _drive(file_id: str) -> tuple[str, ...]:
    return (f"https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t",)


SOURCES: dict[str, Source] = {
    "mnist": _like_mnist(
        "MNIST",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion_mnist": _like_mnist(
        "FashionMNIST",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "kmnist": _like_mnist(
        "KMNIST",
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    ),
    "cifar10": _like_cifar(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        10,
        b"labels",
        {
            "train": {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
        },
    ),
    "CIFAR100": _like_cifar(
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        100,
        b"fine_labels",
        {"train": {"train": "16019d7e3df5f24257cddd939b257f8d"}, "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}},
    ),
    "SVHN": Source(
        downloads=tuple(
            Download(
                addresses=(f"http://ufldl.stanford.edu/housenumbers/{split}_32x32.mat",),
                target=f"{split}_32x32.mat",
                md5=md5,
                splits=(split,),
            )
            for split, md5 in (
                ("train", "e26dedcc434d2e4c54c9b2d4a06d8373"),
                ("test", "eb5a983be6a315427106f1b164d9cef3"),
            )
        ),
        counts={"train": 73_257, "test": 26_032},
        shape=(3, 32, 32),
        classes=10,
        read=read_svhn,
    ),
    "LSUN": _ten_thousand(
        "LSUN_resize",
        (
            "https://www.dropbox.com/s/moqh2wh8696c3yl/LSUN_resize.tar.gz?dl=1",
            "https://www.dropbox.com/s/raw/moqh2wh8696c3yl/LSUN_resize.tar.gz",
        ),
        "278b7b31c8cb7e804a1465a8ce03a2dc",
    ),
    "tinyImageNet": _ten_thousand(
        "Imagenet_resize",
        (
            "https://www.dropbox.com/s/kp3my3412u5k9rl/Imagenet_resize.tar.gz?dl=1",
            "https://www.dropbox.com/s/raw/kp3my3412u5k9rl/Imagenet_resize.tar.gz",
        ),
        "0f9ff11d45babf2eff5fe12281d1ac31",
    ),
    "LSUN-FIX": _ten_thousand("LSUN_fix", _drive("1KVWj9xpHfVwGcErH5huVujk9snhEGOxE")),
    "ImageNet-FIX": _ten_thousand("Imagenet_fix", _drive("1sO_-noq10mmziB1ECDyNhD5T4u5otyKA")),
}


def find_source(name: str) -> str | None:
    """The key of `SOURCES` meant by `name`, whatever its capitals, hyphens and underscores: CIFAR-10 is cifar10."""
    plain = {_plain(key): key for key in SOURCES}
    return plain.get(_plain(name))


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
