"""Fetching one file over the network and unpacking one archive; neither is trusted.

`fetch` goes on where an earlier attempt stopped, `unpack` writes regular files below one folder and nothing else.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urljoin, urlsplit
from urllib.request import Request, getproxies, proxy_bypass, urlopen

from cli.errors import UserError
from cli.progress import Progress

ATTEMPTS, PAUSE = 3, 1.0  # of a transfer that breaks off; seconds between them, growing
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 18
ELSEWHERE = "Get the archive from another place"
LITTER = ("__MACOSX", ".DS_Store")  # what macOS puts into archives beside the files, with the twins named ._*


class FetchError(Exception):
    """Why one address did not yield the file; the caller knows what to advise."""


class BrokenOff(FetchError):
    """The transfer stopped early; the part received is kept and another attempt goes on from there."""


# --- one file -----------------------------------------------------------------------------------


def fetch(address: str, part: Path, limit: int, label: str) -> None:
    """Complete the file `part` from `address`, going on after the bytes that it holds already.

    Args:
        limit: bytes that the file may have.
        label: what the progress bar calls it.

    Raises:
        FetchError: the server is not reached or refuses, sends a web page, too much, or breaks off again and again.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            page = _transfer(address, part, limit, label)
            break
        except BrokenOff:
            if attempt == ATTEMPTS:
                raise
            time.sleep(PAUSE * attempt)
    if page is None:
        return
    confirmed = confirmation(page, address)
    if confirmed is None or _transfer(confirmed, part, limit, label) is not None:
        raise FetchError(f"{address} sends a web page instead of the file")


def _transfer(address: str, part: Path, limit: int, label: str) -> str | None:
    """One attempt. Returns None when `part` is complete, or the web page that came instead."""
    have = part.stat().st_size if part.exists() else 0
    response = _open(address, have)
    if response is None:  # the server has nothing after what we hold, so what we hold is the file
        return None
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            if response.status == 206:
                part.unlink(missing_ok=True)
                raise BrokenOff(f"{address} sends another part of the file than was asked for")
            have = 0  # the server sends the whole file again
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        first = _read(response, address)
        if response.headers.get_content_type() == "text/html" or first.lstrip()[:14].lower().startswith(
            (b"<!doctype html", b"<html")
        ):
            return (first + _read(response, address)).decode("utf-8", "replace")
        if total is not None and total > limit:
            raise FetchError(f"{address} announces {total:,} bytes, more than the {limit:,} expected at most")
        progress = Progress(total or 0, label, unit="B", enabled=total is not None)
        progress.skip(have)
        try:
            with open(part, "ab" if have else "wb") as file:
                chunk = first
                while chunk:
                    have += len(chunk)
                    if have > limit:
                        raise FetchError(f"{address} sends more than the {limit:,} bytes expected at most")
                    file.write(chunk)
                    progress.advance(len(chunk))
                    chunk = _read(response, address)
        finally:
            progress.close()
    if total is not None and have < total:
        raise BrokenOff(f"{address} broke off after {have:,} of {total:,} bytes")
    return None


def _open(address: str, have: int) -> HTTPResponse | None:
    """The response to a request for the bytes after the first `have`; None if there are none after them."""
    headers = {"User-Agent": "cmg-datasets/1"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return urlopen(Request(address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise FetchError(f"{address} answers {error.code} {error.reason}") from None
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return None
        return _open(address, 0)
    except URLError as error:
        raise FetchError(f"{urlsplit(address).hostname} cannot be reached{by_proxy(address)}: {error.reason}") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise FetchError(f"{address} cannot be fetched{by_proxy(address)}: {reason}") from None


def by_proxy(address: str) -> str:
    """By which proxy the environment has an address fetched, in words and without its password, or nothing."""
    parts = urlsplit(address)
    proxy = None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
    return f" by the proxy {proxy.rpartition('@')[2]} of {parts.scheme}_proxy" if proxy else ""


def _read(response: HTTPResponse, address: str) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise BrokenOff(f"{address} broke off: {error or type(error).__name__}") from None


class _Form(HTMLParser):
    """The first form of a page: where it goes and its hidden values."""

    def __init__(self):
        super().__init__()
        self.action: str | None = None
        self.values: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "form" and self.action is None:
            self.action = found.get("action")
        if tag == "input" and found.get("type") == "hidden" and found.get("name"):
            self.values[found["name"]] = found.get("value") or ""


def confirmation(page: str, address: str) -> str | None:
    """The address behind Google Drive's "can't scan this file for viruses" page, or None if `page` is another one."""
    form = _Form()
    form.feed(page)
    if form.action is None or "confirm" not in form.values:
        return None
    target = urljoin(address, form.action)
    host = urlsplit(target).hostname or ""
    if host != urlsplit(address).hostname and not host.endswith((".google.com", ".googleusercontent.com")):
        return None
    return f"{target}?{urlencode(form.values)}"


def digest(path: Path, algorithm: str) -> str:
    """The hexadecimal MD5 or SHA-256 of a file."""
    sums = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sums.update(chunk)
    return sums.hexdigest()


# --- one archive --------------------------------------------------------------------------------


class Member(NamedTuple):
    """One entry of an archive: its kind is "file", "folder", or what else it is."""

    name: str
    kind: str
    size: int
    open: Callable[[], BinaryIO]


def unpack(archive: Path, folder: Path, max_files: int, max_bytes: int) -> None:
    """Write the files of a tar or zip archive below `folder`.

    Args:
        max_files, max_bytes: what the unpacked files may come to.

    Raises:
        UserError: it is no archive or damaged; an entry is a link, lies outside or comes twice; it is too big.
    """
    files = total = 0
    with _reporting_damage(archive):
        for member in _members(archive):
            path = PurePosixPath(member.name)
            if any(part in LITTER or part.startswith("._") for part in path.parts):
                continue
            if (
                path.is_absolute()
                or ".." in path.parts
                or "\\" in member.name
                or ":" in member.name
                or "\0" in member.name
            ):
                raise UserError(
                    f"{archive}: the entry {member.name!r} leads out of its folder; nothing was unpacked. {ELSEWHERE}"
                )
            if member.kind not in ("file", "folder"):
                raise UserError(
                    f"{archive}: the entry {member.name!r} is a {member.kind}; nothing was unpacked. {ELSEWHERE}"
                )
            if member.kind == "folder":
                (folder / path).mkdir(parents=True, exist_ok=True)
                continue
            files, total = files + 1, total + member.size
            if files > max_files or total > max_bytes:
                raise UserError(
                    f"{archive}: unpacks to more than the {max_files:,} files and {max_bytes:,} bytes expected at most "
                    f"(at {member.name!r}); nothing was unpacked. {ELSEWHERE}"
                )
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                with member.open() as source, open(folder / path, "xb") as target:
                    shutil.copyfileobj(source, target, CHUNK)
            except FileExistsError:
                raise UserError(f"{archive}: holds {member.name!r} twice; nothing was unpacked. {ELSEWHERE}") from None


def _members(archive: Path) -> Iterator[Member]:
    """The entries one by one: an archive of endless entries is never listed as a whole."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                link = stat.S_ISLNK(info.external_attr >> 16)
                kind = "link" if link else "folder" if info.is_dir() else "file"
                yield Member(info.filename, kind, info.file_size, lambda info=info: file.open(info))
        return
    with tarfile.open(archive) as file:
        for info in file:
            kind = (
                "file"
                if info.isreg()
                else "folder"
                if info.isdir()
                else "link"
                if info.issym() or info.islnk()
                else "device"
            )
            yield Member(info.name, kind, info.size, lambda info=info: file.extractfile(info))


@contextmanager
def _reporting_damage(archive: Path):
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip's own complaints have no number
            raise
        reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
        raise UserError(
            f"{archive}: is not a tar or zip archive, or is damaged ({reason}); nothing was unpacked. Fetch it again"
        ) from None


def inner_folder(folder: Path) -> Path:
    """Where an archive's files begin: below the folders that hold nothing but one folder."""
    entries = list(folder.iterdir())
    return inner_folder(entries[0]) if len(entries) == 1 and entries[0].is_dir() else folder
