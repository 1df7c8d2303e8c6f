"""Folders of images as arrays: listed in the order of their names, decoded by several threads, kept packed.

The packed file, `.NAME.CxSxS.npz` beside the folder NAME, makes every start after the first quick. It is used only
while names, sizes and times of the images are what they were, and made anew when it is damaged; it may be deleted at
any time.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli.errors import UserError
from cli.files import identity_of, kind_of, replacing, unreadable
from cli.progress import Progress
from datasets.decoding import PILLOW_MODES, SMALL, decode_image, decoded, to_array

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"}
THREADS = min(8, os.cpu_count() or 1)
BLOCK = 512  # images handed to the threads at once
PIECE = 32  # images that one of several threads decodes in one go


class Found(NamedTuple):
    """What a folder holds.

    Attributes:
        names: the images, as paths relative to the folder with forward slashes, in the order of their names.
        complaints: what could not be searched or is not a plain file, by path.
    """

    names: list[str]
    complaints: dict[Path, str]


def search(root: Path) -> Found:
    """The images below `root` at any depth; hidden files and folders are left out.

    Links to images and folders are followed, but a folder is entered once, by its own path where it has one below
    `root`; folders that hold `root` are not entered at all. So no link to a folder makes an image count twice.
    """
    names, complaints = [], {}
    entered = {identity_of(folder) for folder in Path(os.path.realpath(root)).parents}
    folders, links = [""], deque()
    while folders or links:
        prefix = folders.pop() if folders else links.popleft()
        try:
            if (identity := identity_of(root / prefix)) in entered:
                continue
            entered.add(identity)
            with os.scandir(root / prefix) as found:
                entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda e: e.name)
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
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                if kind == "file":
                    names.append(name)
                else:
                    complaints[root / name] = f"{root / name}: is not a plain file but a {kind}. Remove it"
    return Found(sorted(names), dict(sorted(complaints.items())))


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


def read_images(
    root: Path, channels: int, size: int, resize: bool = False, packed: bool = True
) -> tuple[np.ndarray, list[str]]:
    """All images below `root` and their names.

    Args:
        channels: 1 converts to grey, 3 to colour.
        size: side of the images in pixels.
        resize: bring images of other sizes to `size` (see `square`) instead of refusing them.
        packed: read and write the packed file.

    Returns:
        uint8 [N, channels, size, size], and the N names as `list_images` gives them.

    Raises:
        UserError: there are no images, or the named one cannot be decoded or has another size or depth.
    """
    root = Path(root)
    if root.name in ("", ".."):  # "." and the like: the packed file is named after the folder itself
        root = root.resolve()
    names = find_images(root)
    cache = root.parent / f".{root.name}.{channels}x{size}x{size}.npz"
    key = _fingerprint(root, names, resize)
    images = _load_packed(cache, key) if packed else None
    if images is None or images.shape != (len(names), channels, size, size):
        images = _decode_all(root, names, channels, size, resize)
        if packed:
            _save_packed(cache, key, images)
    return images, names


def _decode_all(root: Path, names: list[str], channels: int, size: int, resize: bool) -> np.ndarray:
    images = np.empty((len(names), channels, size, size), np.uint8)

    def decode(index: int) -> str | None:
        try:
            images[index] = decode_image(root / names[index], channels, size, resize)
        except UserError as error:
            return str(error)
        return None

    raise_all(for_each(decode, len(names), f"decoding {root.name}"))
    return images


def for_each(work: Callable[[int], str | None], count: int, label: str) -> list[str]:
    """Call `work` with 0 … count - 1 in several threads, under a progress bar; returns the complaints, in order."""
    complaints: list[str] = []
    progress = Progress(count, label)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, count, BLOCK):
            block = range(start, min(start + BLOCK, count))
            complaints += filter(None, pool.map(work, block))
            progress.advance(len(block))
    progress.close()
    return complaints


def raise_all(complaints: Sequence[str], most: int = 10) -> None:
    """Raise `UserError` with the complaints, if there are some, in one line: the first `most` and how many more."""
    if complaints:
        more = [f"and {len(complaints) - most} more"] if len(complaints) > most else []
        raise UserError("; ".join([*complaints[:most], *more]))


class Chunk(NamedTuple):
    """Some decoded images, in the order of their files.

    Attributes:
        paths: the N files.
        pixels: uint8 [N, C, S, S], undefined where a file could not be decoded.
        changed: for each file, whether its image had another size or mode.
        complaints: for each file, what is wrong with it, or None.
    """

    paths: Sequence[Path]
    pixels: np.ndarray
    changed: list[bool]
    complaints: list[str | None]


def read_chunks(paths: Sequence[Path], channels: int, size: int, count: int, ahead: int) -> Iterator[Chunk]:
    """Decode images `count` at a time, brought to `channels` and `size`.

    `ahead` further chunks are decoded, or being decoded, while the caller works on one. A file that cannot be decoded
    is no error but a complaint.
    """
    threads = _threads_for(paths[:PIECE])
    step = count if threads == 1 else PIECE
    with ThreadPoolExecutor(threads) as pool:

        def start(part: Sequence[Path]) -> tuple[Sequence[Path], np.ndarray, list[Future]]:
            pixels = np.empty((len(part), channels, size, size), np.uint8)
            pieces = [slice(i, i + step) for i in range(0, len(part), step)]
            return part, pixels, [pool.submit(_decode_into, part[piece], pixels[piece]) for piece in pieces]

        started: deque = deque()
        for first in range(0, len(paths), count):
            started.append(start(paths[first : first + count]))
            if len(started) > ahead:
                yield _finished(*started.popleft())
        while started:
            yield _finished(*started.popleft())


def _threads_for(paths: Sequence[Path]) -> int:
    """How many threads decode files such as these the fastest."""
    sizes = [path.stat().st_size for path in paths if path.is_file()]
    return THREADS if sum(sizes) > SMALL * len(sizes) else 1


def _decode_into(paths: Sequence[Path], pixels: np.ndarray) -> list[tuple[bool, str | None]]:
    """Fill `pixels`, uint8 [N, C, S, S]; for each image, whether it was changed and what is wrong with it."""
    channels, size = pixels.shape[1:3]
    outcomes = []
    for path, target in zip(paths, pixels, strict=True):
        try:
            with decoded(path) as image:
                target[:] = to_array(image, channels, size)
                outcomes.append(((image.mode, *image.size) != (PILLOW_MODES[channels], size, size), None))
        except UserError as error:
            outcomes.append((False, str(error)))
    return outcomes


def _finished(paths: Sequence[Path], pixels: np.ndarray, jobs: list[Future]) -> Chunk:
    changed, complaints = zip(*(outcome for job in jobs for outcome in job.result()), strict=True)
    return Chunk(paths, pixels, list(changed), list(complaints))


def state_of(root: Path) -> str:
    """What changes when an image below `root` does, is added or goes, as far as a look at the files tells."""
    return _fingerprint(Path(root), search(Path(root)).names, resize=False)


# --- the packed file ----------------------------------------------------------------------------


DECODING = 3  # counted up when images are decoded otherwise than before: packed files of then are made anew


def _fingerprint(root: Path, names: list[str], resize: bool) -> str:
    """What the packed file of these images is known by. Raises `UserError` naming one that is not there."""
    lines = [f"{DECODING}\0{resize}"]
    for name in names:
        try:
            status = os.stat(root / name)
        except OSError as error:
            raise UserError(unreadable(root / name, error)) from None
        # The time of change can be set back; that of the change of the file's state cannot.
        lines.append(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _load_packed(cache: Path, key: str) -> np.ndarray | None:
    """The packed images if they are those of `key`; whatever else is there counts as nothing."""
    if not os.path.isfile(cache):  # a pipe would be waited for
        return None
    try:
        with np.load(cache, allow_pickle=False) as content:
            if str(content["key"]) == key and content["images"].dtype == np.uint8:
                return content["images"]
    except Exception:  # a damaged archive fails in any way that zipfile and numpy know, and is made anew
        pass
    return None


def _save_packed(cache: Path, key: str, images: np.ndarray) -> None:
    try:
        with replacing(cache) as temporary, open(temporary, "wb") as file:
            np.savez(file, key=np.array(key), images=images)
    except UserError:
        pass  # a folder we may not write to is read anew each time


def forget_packed(root: Path) -> None:
    """Remove the packed files of a folder, as far as that is allowed."""
    for cache in root.parent.glob(f".{glob.escape(root.name)}.*.npz"):
        try:
            cache.unlink()
        except OSError:
            pass
