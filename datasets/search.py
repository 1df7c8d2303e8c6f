"""Which images are in a folder, and whether they are what they were. Imports no numpy: jobs that are done are found in
no time."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cli.errors import UserError
from cli.files import identity_of, kind_of, unreadable

IMAGE_SUFFIXES = set(".png .jpg .jpeg .jfif .gif .bmp .ppm .pgm .webp .avif .tif .tiff".split())
UNREADABLE = {".heic", ".heif"}  # what phones write and Pillow does not read: found, to be named when it is decoded
OF_SYSTEMS = {"__MACOSX", "@eaDir"}  # folders in which archives of macOS and Synology's servers keep what is no image
DECODING = 4  # counted up when images are decoded otherwise than before: what was made of them is made anew


class Found(NamedTuple):
    """What a folder holds.

    Attributes:
        names: the images, as paths relative to the folder with forward slashes, in the order of their names.
        complaints: what could not be searched or is not a plain file, by path.
    """

    names: list[str]
    complaints: dict[Path, str]


def search(root: Path) -> Found:
    """The images below `root` at any depth; what `is_hidden` is left out.

    Links to images and folders are followed, but a folder is entered once, by its own path where it has one below
    `root`; folders that hold `root` are not entered at all. So no link to a folder makes an image count twice.
    """
    names, complaints = [], {}
    entered = {identity_of(folder) for folder in Path(os.path.realpath(root)).parents}
    folders, links = [""], deque()
    while folders or links:
        prefix = folders.pop() if folders else links.popleft()
        try:
            identity = identity_of(os.path.join(root, prefix, "."))  # with the dot: a folder that may be entered
            if identity in entered:
                continue
            entered.add(identity)
            with os.scandir(root / prefix) as found:
                entries = sorted((entry for entry in found if not is_hidden(entry.name)), key=lambda e: e.name)
        except OSError as error:
            complaints[root / prefix] = unreadable(root / prefix, error)
            continue
        for entry in entries:
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            try:
                kind = kind_of(entry)
            except OSError as error:  # such as a link that leads nowhere, which may have been a folder
                complaints[root / name] = unreadable(root / name, error)
                continue
            if kind == "folder":
                (links if entry.is_symlink() else folders).append(name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES | UNREADABLE:
                if kind == "file":
                    names.append(name)
                else:
                    complaints[root / name] = f"{root / name}: is not a plain file but a {kind}. Remove it"
    return Found(sorted(names), dict(sorted(complaints.items())))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is left out wherever folders of images are read."""
    return name.startswith(".") or name in OF_SYSTEMS


def list_images(root: Path) -> list[str]:
    """The names that `search` finds, maybe none. Raises `UserError` where something could not be read."""
    names, complaints = search(Path(root))
    raise_all(list(complaints.values()))
    return names


def find_images(root: Path) -> list[str]:
    """What `list_images` gives. Raises `UserError` when there are none."""
    names = list_images(root)
    if not names:
        raise UserError(no_images(root))
    return names


def no_images(root: Path) -> str:
    """The complaint about a folder without images."""
    return (
        f"{root}: no images there; expected a folder of images, in subfolders or not "
        f"({' '.join(sorted(IMAGE_SUFFIXES))})"
    )


def raise_all(complaints: Sequence[str], most: int = 10) -> None:
    """Raise `UserError` with the complaints, if there are some, in one line: the first `most` and how many more."""
    if complaints:
        more = [f"and {len(complaints) - most} more"] if len(complaints) > most else []
        raise UserError("; ".join([*complaints[:most], *more]))


def state_of(root: Path, names: list[str] | None = None) -> str:
    """What changes when an image below `root`, or one of the `names` there, changes, is added or goes, as far as a look
    at the files tells. Raises `UserError` naming one that is not there."""
    lines = [str(DECODING)]
    for name in search(Path(root)).names if names is None else names:
        try:
            status = os.stat(root / name)
        except OSError as error:
            raise UserError(unreadable(root / name, error)) from None
        # The time of change can be set back; that of the change of the file's state cannot, but others may share it.
        lines.append(f"{name}\0{status.st_ino}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
