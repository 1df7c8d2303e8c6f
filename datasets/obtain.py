"""Obtaining, verifying and reading the published data sets.

    obtain("cifar10", data_dir)                         make it complete, from the network
    obtain("cifar10", data_dir, given=Path("archive"))  … or from an archive or folder fetched by other means
    verify("cifar10", data_dir, "test")                 read a split and compare it with what is published

Files become visible only when they have been verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from cli.errors import UserError
from cli.files import write_json
from datasets.archives import FetchError, digest, fetch, inner_folder, unpack
from datasets.folders import forget_packed
from datasets.formats import Arrays, existing
from datasets.search import IMAGE_SUFFIXES, list_images, search
from datasets.sources import SOURCES, Download, Source
from datasets.tasks import Experiment

try:
    import fcntl
except ImportError:  # no advisory locks there: then do not start two downloads at once
    fcntl = None

REPLACE = "Remove its files and fetch it again"


# --- what is there ------------------------------------------------------------------------------


def is_present(name: str, data_dir: Path, split: str) -> bool:
    """Whether the files of a split are there; `verify` tells whether they are right."""
    return all(_is_there(download, data_dir, split) for download in SOURCES[name].downloads if split in download.splits)


def _is_there(download: Download, data_dir: Path, split: str) -> bool:
    target = data_dir / download.target
    if not download.unpack:
        return existing(target).is_file()
    if download.contents:
        return all((target / file).is_file() for file in download.contents[split])
    return target.is_dir() and bool(list_images(target))


def read_source(name: str, data_dir: Path, split: str) -> Arrays:
    """One split of a data set, which is fetched first if it is not there. Raises `UserError`.

    Other counts than the published are pointed out; so that a part of a data set can be tried, they are no error.
    """
    source = SOURCES[name]
    split = split if split in source.counts else next(iter(source.counts))
    if not is_present(name, data_dir, split):
        print(f"{name} is not in {data_dir}: fetching it", flush=True)
        obtain(name, data_dir, (split,))
    images, labels = source.read(data_dir, split)
    check_labels(name, data_dir, labels)
    if len(images) != source.counts[split]:
        print(
            f"note: {name} in {data_dir} has {len(images):,} {split} images; {source.counts[split]:,} are published",
            flush=True,
        )
    return images, labels


def check_labels(name: str, data_dir: Path, labels: np.ndarray) -> None:
    """Raise `UserError` where labels [N] of a data set do not fit its classes."""
    classes = SOURCES[name].classes
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{name} in {data_dir}: labels {labels.min()} to {labels.max()}, expected 0 to {classes - 1}. {REPLACE}"
        )


def verify(name: str, data_dir: Path, split: str) -> dict:
    """Read a split and compare it with what is published and with what was recorded when it came.

    Returns:
        {"count": images, "sha256": of their pixels in order}.

    Raises:
        UserError: a file is damaged or differs, or counts, sizes or labels are not as expected.
    """
    source, where = SOURCES[name], f"{name} in {data_dir}"
    for download in source.downloads:
        if download.unpack:
            forget_packed(data_dir / download.target)  # the images themselves are to be read
    for path, md5 in _checksums(source, data_dir, split):
        if path.is_file() and digest(path, "md5") != md5:
            raise UserError(
                f"{path}: differs from the published file (its MD5 should be {md5}). Delete it and fetch it again"
            )
    images, labels = source.read(data_dir, split)
    if len(images) != source.counts[split]:
        raise UserError(f"{where}: {len(images):,} {split} images, expected {source.counts[split]:,}. {REPLACE}")
    if images.shape[1:] != source.shape:
        raise UserError(
            f"{where}: images are {list(images.shape[1:])}, expected {list(source.shape)} (channels, height, width)"
        )
    check_labels(name, data_dir, labels)
    figures = {"count": len(images), "sha256": hashlib.sha256(images).hexdigest()}
    recorded = read_record(name, data_dir).get("splits", {}).get(split, figures)
    if recorded != figures:
        raise UserError(
            f"{where}: the {split} images are not those recorded in {record_path(name, data_dir)}. "
            "Fetch them again, or remove that file if you replaced them"
        )
    return figures


def _checksums(source: Source, data_dir: Path, split: str) -> list[tuple[Path, str]]:
    """Files on disk whose published MD5 is known; no .gz file, which may have been repacked and be as good."""
    needed = [download for download in source.downloads if split in download.splits]
    kept = [(data_dir / d.target, d.md5) for d in needed if not d.unpack and d.md5 and not d.target.endswith(".gz")]
    return kept + [(data_dir / d.target / file, md5) for d in needed for file, md5 in d.contents.get(split, {}).items()]


# --- the record beside the data -----------------------------------------------------------------


def record_path(name: str, data_dir: Path) -> Path:
    """The file that records where a data set came from and what it held."""
    return Path(data_dir) / f"{name}.json"


def read_record(name: str, data_dir: Path) -> dict:
    """The record, or an empty one if there is none that can be read."""
    try:
        record = json.loads(record_path(name, data_dir).read_text())
    except (OSError, ValueError):
        return {}
    parts = record if isinstance(record, dict) else {}
    return {key: value for key, value in parts.items() if isinstance(value, dict)}


def write_record(name: str, data_dir: Path, origins: dict, splits: dict) -> None:
    """Note for each file its origin and SHA-256, for each split its count and checksum, beside those already there."""
    record = read_record(name, data_dir)
    files, figures = record.get("files", {}) | origins, record.get("splits", {}) | splits
    write_json(
        record_path(name, data_dir),
        {"name": name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "files": files, "splits": figures},
    )


# --- obtaining ----------------------------------------------------------------------------------


def obtain(name: str, data_dir: Path, splits: tuple[str, ...] | None = None, given: Path | None = None) -> bool:
    """Make the splits of a data set (all, unless told) complete below `data_dir`.

    Everything is unpacked or copied into a separate folder, verified there and moved to its place only then; what was
    fetched is kept until it is there, so that an interruption at any moment costs no second download.

    Args:
        given: an archive, file or folder to import instead of fetching.

    Returns:
        Whether anything had to be done.

    Raises:
        UserError: the data cannot be obtained, or are not what they should be. A partial download is kept.
    """
    source, data_dir = SOURCES[name], Path(data_dir)
    staging = data_dir / f".{name}.staging"
    with locked(data_dir):
        lacking = {split for split in splits or source.counts if not is_present(name, data_dir, split)}
        downloads = [download for download in source.downloads if lacking & set(download.splits)]
        if not downloads:
            _forget_parts(source.downloads, data_dir)
            return False
        for download in downloads:
            _make_way(data_dir / download.target, download.unpack)
        found = [(_found(name, d, given), str(given)) if given else _fetched(name, d, data_dir) for d in downloads]
        try:
            shutil.rmtree(staging, ignore_errors=True)
            notes = dict(_stage(name, staging, given, d, *f) for d, f in zip(downloads, found, strict=True))
            covered = [split for split in source.counts if any(split in download.splits for download in downloads)]
            figures = {split: verify(name, staging, split) for split in covered}
            for path in [*map(Path, notes), *(file.relative_to(staging) for file in staging.glob(".*.npz"))]:
                (data_dir / path).parent.mkdir(parents=True, exist_ok=True)
                (staging / path).replace(data_dir / path)
            write_record(name, data_dir, notes, figures)
            _forget_parts(downloads, data_dir)
        except UserError as error:
            if not given:  # the file is not what it should be: the next attempt fetches it anew
                _forget_parts(downloads, data_dir)
            raise UserError(
                str(error).replace(f"{staging}/", f"{name}: ").replace(str(staging), "the file received")
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot move {name} into {data_dir}: {error}. Choose another --data-dir, with free space"
            ) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return True


@contextmanager
def locked(data_dir: Path):
    """Keep other processes from fetching into the same folder meanwhile: they wait, then find the data."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {data_dir}: {error.strerror or error}. Choose a --data-dir that you may write to"
        ) from None
    if fcntl is None:
        yield
        return
    handle = os.open(data_dir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make_way(target: Path, is_folder: bool) -> None:
    """A folder in which something is missing may hold what its owner needs: it is not for us to delete."""
    if not is_folder or not target.exists():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise UserError(f"{target}: is there but lacks files; remove it or move it away, then try again")
    target.rmdir()


def _stage(
    name: str, staging: Path, given: Path | None, download: Download, path: Path, origin: str
) -> tuple[str, dict]:
    """Put the content of a download, the file or folder `path` from `origin`, below `staging`; `path` stays as it is.

    Returns:
        its path there and a note of where it came from.
    """
    target = staging / download.target
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        files = download.files() or list_images(path)
        lacking = [file for file in files if not (path / file).is_file()]
        if lacking:
            raise UserError(f"{path}: lacks {', '.join(lacking)} of {name}. Give a complete copy")
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / file, target / file)
        return download.target, {"from": origin}
    note = {"from": origin, "bytes": path.stat().st_size, "sha256": digest(path, "sha256")}
    print(
        f"{name}: {path.name.removesuffix('.part')}: SHA-256 {note['sha256']}"
        + ("" if download.md5 else " (no checksum is published)"),
        flush=True,
    )
    if download.unpack:
        unpacked = staging / ".unpacked"
        unpacked.mkdir()
        unpack(path, unpacked, download.max_files, download.max_bytes)
        inner_folder(unpacked).replace(target)
        return download.target, note
    if given and path.suffix != target.suffix:
        target = target.with_suffix("")
    shutil.copyfile(path, target)
    return target.relative_to(staging).as_posix(), note


def _part(download: Download, data_dir: Path) -> Path:
    """Where a download is kept until its content is in place."""
    return data_dir / f"{download.target}.part"


def _forget_parts(downloads: Iterable[Download], data_dir: Path) -> None:
    for download in downloads:
        _part(download, data_dir).unlink(missing_ok=True)


def _fetched(name: str, download: Download, data_dir: Path) -> tuple[Path, str]:
    """The file of a download as a .part file, whole and with the published checksum, and the address it came from."""
    part = _part(download, data_dir)
    if download.md5 and part.is_file() and digest(part, "md5") == download.md5:
        return part, " or ".join(download.addresses)  # an earlier attempt did not say which
    reasons = []
    for address in download.addresses:
        try:
            fetch(address, part, download.max_bytes, Path(download.target).name)
        except FetchError as error:
            reasons.append(str(error))
            continue
        md5 = digest(part, "md5") if download.md5 else None
        if md5 == download.md5:
            return part, address
        part.unlink()
        reasons.append(f"{address} sends a file with MD5 {md5}, expected {download.md5}")
    raise UserError(f"{name} cannot be downloaded ({'; '.join(reasons)}). {advice(name, data_dir)}")


def advice(name: str, data_dir: Path) -> str:
    """What to fetch, from where, how to import it: for those without a network."""
    addresses = " ".join(download.addresses[0] for download in SOURCES[name].downloads)
    place = shlex.quote(str(data_dir.resolve()))
    return (
        f"Run the command again to go on, or fetch {addresses} by other means and import it, in the "
        f"repository's root: python -m datasets.download {name} --data-dir {place} --from FILE_OR_FOLDER; "
        "the digits need no download"
    )


def _found(name: str, download: Download, given: Path) -> Path:
    """What the user gave for a download: the file itself, a usual name in the folder, or the folder itself.

    Raises:
        UserError: it is not there, or is another archive than the published one.
    """
    names = _usual_names(download)
    if given.is_dir():
        candidates = [given / usual for usual in names] + [given] * _is_content(download, given)
    else:
        candidates = [given] * (download.unpack or given.name in names)
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        files = list(dict.fromkeys(Path(usual).name for usual in names))
        raise UserError(
            f"--from {given}: there is no {' or '.join(files[:2])} of {name}; give the file or folder itself, "
            "or the folder that holds it"
        )
    if found.is_file() and download.md5 and (download.unpack or not download.target.endswith(".gz")):
        md5 = digest(found, "md5")
        if md5 != download.md5:
            raise UserError(
                f"{found}: is not the published file of {name} (MD5 {md5}, expected {download.md5}). "
                "Fetch it again, or, if it was only repacked, unpack it and import the folder"
            )
    return found


def _usual_names(download: Download) -> list[str]:
    """What people call it: the target with its path, without, and the published file, packed and unpacked."""
    last, published = Path(download.target).name, Path(urlsplit(download.addresses[0]).path).name
    if download.unpack:
        packed = [last + suffix for suffix in (".tar.gz", ".tgz", ".tar", ".zip")]
        return list(dict.fromkeys([download.target, last, *([published] if "." in published else []), *packed]))
    return [download.target, last, last.removesuffix(".gz"), download.target.removesuffix(".gz")]


def _is_content(download: Download, folder: Path) -> bool:
    """Whether the folder is the unpacked data set itself, whatever its name."""
    if download.contents:
        return all((folder / file).is_file() for file in download.files())
    return download.unpack and any(path.suffix.lower() in IMAGE_SUFFIXES for path in inner_folder(folder).iterdir())


def files_read(experiment: Experiment, data_dir: Path, ood_names: Sequence[str] = ()) -> Iterator[Path]:
    """The files that are there of the images that an experiment reads, IND and those OOD sets."""
    folders = experiment.task.folders
    for name in dict.fromkeys([experiment.task.dataset, *ood_names]):
        if name in folders:
            images, _ = search(folders[name].root)
            yield from (folders[name].root / image for image in images)
        for download in SOURCES[name].downloads if name in SOURCES else ():
            target = data_dir / download.target
            places = (target, target.with_suffix(""), *target.rglob("*"))  # packed, unpacked, a folder
            yield from (path for path in places if path.is_file())
