"""Folders of images as arrays: listed in the order of their names, decoded by several threads, kept packed.

The packed file, `.NAME.CxSxS.npz` beside the folder NAME, makes every start after the first quick. It is used only
while names, sizes and times of the images are what they were, and made anew when it is damaged; it may be deleted at
any time.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli.errors import UserError
from cli.files import replacing
from cli.progress import Progress
from datasets.decoding import PILLOW_MODES, SMALL, decode_image, decoded, to_array
from datasets.search import find_images, raise_all, state_of

THREADS = min(8, os.cpu_count() or 1)
BLOCK = 512  # images handed to the threads at once
PIECE = 32  # images that one of several threads decodes in one go


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
    key = f"{state_of(root, names)} {resize}"
    images = _load_packed(cache, key) if packed else None
    if images is None or images.shape != (len(names), channels, size, size):
        images = _decode_all(root, names, channels, size, resize)
        if packed:
            _save_packed(cache, key, images)
    return images, names


def _decode_all(root: Path, names: list[str], channels: int, size: int, resize: bool) -> np.ndarray:
    from utils import check_memory  # of torch, which listing and fetching do without

    check_memory(len(names) * channels * size * size, None, f"{len(names):,} images of {size}x{size} pixels")
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
    sizes = [os.path.getsize(path) for path in paths if os.path.isfile(path)]
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


# --- the packed file ----------------------------------------------------------------------------


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
