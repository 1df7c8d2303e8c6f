"""Files that are written whole or not at all, and whether they can be written is found out beforehand."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

from cli.errors import UserError


@contextmanager
def writing(path: Path):
    """Turn a failure to write `path` within the block into a `UserError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write {path}: {reason}. Choose a folder that you may write to, with free space"
        ) from error


@contextmanager
def replacing(path: Path):
    """Yield a temporary path in the folder of `path` (which is made first); rename it to `path` at the end.

    Whatever happens inside, `path` holds its old content or the whole new one.

    Raises:
        UserError: the folder cannot be made or written.
    """
    path = Path(path)
    temporary = None
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            yield Path(temporary)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def kind_of(entry: os.DirEntry | Path) -> str:
    """ "folder", "file", "pipe", "socket" or "device", through links. Raises `OSError`, as for a link to nowhere."""
    if isinstance(entry, os.DirEntry) and not entry.is_symlink():  # known without asking the system
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
    mode = entry.stat().st_mode
    kinds = {"file": stat.S_ISREG, "folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    return next((kind for kind, is_one in kinds.items() if is_one(mode)), "device")


def identity_of(path: Path | str) -> tuple[int, int]:
    """Device and inode: the same for a file or folder by any of its names. Raises `OSError`."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def unreadable(path: Path, error: OSError) -> str:
    """The complaint about a file or folder that the system does not let us read."""
    return f"{path}: cannot be read ({error.strerror or error}). Make it readable or remove it"


def check_writable(path: Path, room: int = 0) -> None:
    """Find out before the work starts that `path` can be written, with `room` bytes free.

    Raises:
        UserError: it is a folder or no plain file, its folder cannot be made or written, its name is too long, or the
            disk is too full.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    if os.path.exists(path) and not os.path.isfile(path):  # a file would take the place of a device
        raise UserError(f"cannot write {path}: it is not a plain file; name another")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, probe = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # a name as in `replacing`
            os.close(handle)
            Path(probe).unlink(missing_ok=True)  # another process may have taken it for a leftover
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise UserError(f"cannot write {path}: the name is too long; give a shorter one") from None
        free = shutil.disk_usage(path.parent).free
    if free < room:
        needed = f"{free / 1e6:,.0f} MB are free, {room / 1e6:,.0f} MB are needed"
        raise UserError(f"cannot write {path}: {needed}. Free some space or choose another disk")


def check_outputs(
    *outputs: Path | None, inputs: Iterable[Path] = (), images: Callable[[], Iterable[Path]] = tuple
) -> None:
    """`check_writable` of each file that a command will write.

    Args:
        inputs: files that it reads.
        images: gives further ones, which may be many: only asked where an output is there already.

    Raises:
        UserError: as that, or an output would take the place of another or of an input.
    """
    outputs = [path for path in outputs if path]
    taken = {os.path.realpath(path): "is read by this command" for path in inputs}
    there = {identity_of(path): path for path in outputs if os.path.isfile(path)}
    for image in images() if there else ():
        if path := there.get(identity_of(image)):
            raise UserError(f"cannot write {path}: it is an image that this command reads; name another file")
    for path in outputs:
        if reason := taken.get(os.path.realpath(path)):
            raise UserError(f"cannot write {path}: it {reason}; name another file")
        taken[os.path.realpath(path)] = "is another output already"
        check_writable(path)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, whole or not at all; what of a name is no UTF-8 as it is."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, content: dict) -> None:
    """Write `content` as indented JSON, whole or not at all.

    Raises:
        UserError: it cannot be written; a number in it is not finite, which no JSON can hold.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except ValueError:
        raise UserError(f"cannot write {path}: a number in it is not finite, so something before it failed") from None
    write_text(path, text + "\n")


def read_json(path: Path, shape: object, what: str) -> dict:
    """A JSON file of ours.

    Args:
        shape: that the content must have, see `fits`.
        what: it should be, for the message: "a result that python -m eval wrote".

    Raises:
        UserError: the file is missing or is something else.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # a pipe would be waited for
            raise UserError(f"{path}: is not a plain file; expected {what}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected {what}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is not JSON or is damaged; expected {what}") from None
    if not fits(content, shape):
        raise UserError(f"{path}: holds something else; expected {what}")
    return content


def fits(value: object, shape: object) -> bool:
    """Whether a value read back has a shape: a type, where float takes any finite number and int no truth value; a
    function that tells; [shape] for a list of any length; a dict of the keys that it must have at least, but for those
    whose shape is in a tuple: (shape,)."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            fits(value[key], part[0] if isinstance(part, tuple) else part) if key in value else isinstance(part, tuple)
            for key, part in shape.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(part, shape[0]) for part in value)
    if shape is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if shape is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(shape, type):
        return shape(value)
    return isinstance(value, shape)


def short_name(name: str, most: int = 120) -> str:
    """A name for a file; of one that is longer than `most` bytes its beginning and a hash of the whole: file systems
    take no names of any length, and what is temporary gets a few letters more."""
    content = os.fsencode(name)
    if len(content) <= most:
        return name
    digest = hashlib.sha256(content).hexdigest()[:10]
    return f"{content[: most - len(digest) - 1].decode('utf-8', 'ignore')}_{digest}"
