"""Downloading, unpacking, importing and checking, against a server on the loopback."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import tarfile
import threading
import zipfile
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets

from cli.errors import UserError, run_command
from datasets import archives, download, obtain
from datasets.archives import FetchError, confirmation, digest, fetch, inner_folder, unpack
from datasets.obtain import is_present, read_source, verify
from datasets.sources import SOURCES, Download, Source, find_source
from tests.tiny_data import write_cifar10, write_folder, write_mnist, write_svhn

COUNT = 12


@dataclass
class Served:
    """What the server answers at one path: `cuts` breaks off that many answers after so many bytes each."""

    content: bytes
    kind: str = "application/octet-stream"
    ranges: bool = True
    length: bool = True
    cuts: list[int] = field(default_factory=list)
    refusal: int = 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range")))
        served = self.server.routes.get(self.path)
        if served is None or served.refusal:
            self.send_error(served.refusal if served else 404)
            return
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.headers.get("Range") else 0
        total = len(served.content)
        if served.ranges and start >= total > 0 and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = start if served.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if served.length:
            self.send_header("Content-Length", str(total - start))
        self.send_header("Content-Type", served.kind)
        self.end_headers()
        end = start + served.cuts.pop(0) if served.cuts else total
        self.wfile.write(served.content[start:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(archives, "PAUSE", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.routes, httpd.asked = {}, []
        httpd.address = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


@pytest.fixture
def tiny(server, tmp_path, monkeypatch) -> Source:
    """LSUN-FIX with 12 images, from the server's /LSUN_fix.tar.gz; `server.archive` is the right answer."""
    write_folder(tmp_path / "made", "LSUN_fix", COUNT)
    server.archive = pack(tmp_path / "made" / "LSUN_fix")
    address = f"{server.address}/LSUN_fix.tar.gz"
    known = SOURCES["LSUN-FIX"]
    source = replace(
        known,
        counts={"test": COUNT},
        downloads=(replace(known.downloads[0], addresses=(address,), max_bytes=1 << 20, max_files=100),),
    )
    monkeypatch.setitem(SOURCES, "LSUN-FIX", source)
    server.routes["/LSUN_fix.tar.gz"] = Served(server.archive)
    return source


def pack(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(folder, folder.name)
    return buffer.getvalue()


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for info, content in members:
            info.size = len(content) or info.size
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def run(*argv: object) -> int:
    return run_command(download.main, download.get_parser(), [str(word) for word in argv])


def leftovers(data_dir: Path) -> list[str]:
    return sorted(path.name for path in data_dir.iterdir())


# --- one file -----------------------------------------------------------------------------------


def test_fetch_brings_the_bytes(server, tmp_path):
    server.routes["/a"] = Served(bytes(range(256)) * 5000)
    fetch(f"{server.address}/a", tmp_path / "deep" / "a.part", 1 << 21, "a")
    assert (tmp_path / "deep" / "a.part").read_bytes() == bytes(range(256)) * 5000


def test_fetch_goes_on_with_a_range(server, tmp_path):
    server.routes["/a"] = Served(b"0123456789")
    part = tmp_path / "a.part"
    part.write_bytes(b"0123")
    fetch(f"{server.address}/a", part, 100, "a")
    assert part.read_bytes() == b"0123456789"
    assert server.asked == [("/a", "bytes=4-")]


def test_fetch_starts_over_where_ranges_are_ignored(server, tmp_path):
    server.routes["/a"] = Served(b"0123456789", ranges=False)
    part = tmp_path / "a.part"
    part.write_bytes(b"wrong")
    fetch(f"{server.address}/a", part, 100, "a")
    assert part.read_bytes() == b"0123456789"


def test_fetch_of_a_complete_part_asks_for_nothing_more(server, tmp_path):
    server.routes["/a"] = Served(b"0123456789")
    part = tmp_path / "a.part"
    part.write_bytes(b"0123456789")
    fetch(f"{server.address}/a", part, 100, "a")
    assert part.read_bytes() == b"0123456789"


def test_fetch_starts_over_when_the_part_is_longer_than_the_file(server, tmp_path):
    server.routes["/a"] = Served(b"0123456789")
    part = tmp_path / "a.part"
    part.write_bytes(b"x" * 20)
    fetch(f"{server.address}/a", part, 100, "a")
    assert part.read_bytes() == b"0123456789"


def test_fetch_resumes_by_itself_after_interruptions(server, tmp_path):
    server.routes["/a"] = Served(b"0123456789", cuts=[3, 3])
    fetch(f"{server.address}/a", tmp_path / "a.part", 100, "a")
    assert (tmp_path / "a.part").read_bytes() == b"0123456789"
    assert [asked for _, asked in server.asked] == [None, "bytes=3-", "bytes=6-"]


def test_fetch_gives_up_after_three_truncated_answers_and_keeps_the_part(server, tmp_path):
    server.routes["/a"] = Served(b"0123456789", cuts=[2, 2, 2])
    with pytest.raises(FetchError, match="/a broke off after 6 of 10 bytes"):
        fetch(f"{server.address}/a", tmp_path / "a.part", 100, "a")
    assert (tmp_path / "a.part").read_bytes() == b"012345"


@pytest.mark.parametrize(
    ("served", "message"),
    [
        (Served(b"<html>sign in</html>", kind="text/html"), "sends a web page instead of the file"),
        (Served(b"\n<!DOCTYPE html><p>moved"), "sends a web page instead of the file"),
        (Served(b"x" * 101), "announces 101 bytes, more than the 100 expected at most"),
        (Served(b"x" * 101, length=False), "sends more than the 100 bytes expected at most"),
        (None, "answers 404 Not Found"),
    ],
    ids=["HTML by type", "HTML by content", "announced too big", "too big", "missing"],
)
def test_fetch_refuses(server, tmp_path, served, message):
    if served:
        server.routes["/a"] = served
    with pytest.raises(FetchError, match=message):
        fetch(f"{server.address}/a", tmp_path / "a.part", 100, "a")
    assert not (tmp_path / "a.part").exists() or not served.length


def test_fetch_ends_when_the_server_refuses_every_range(server, tmp_path):
    server.routes["/a"] = Served(b"0123456789", refusal=416)
    (tmp_path / "a.part").write_bytes(b"01")
    with pytest.raises(FetchError, match="answers 416"):
        fetch(f"{server.address}/a", tmp_path / "a.part", 100, "a")


@pytest.mark.parametrize("account", ["", "me:secret@"])
def test_a_proxy_that_does_not_answer_is_named(tmp_path, monkeypatch, account):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        proxy = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("http_proxy", f"http://{account}{proxy}")
    monkeypatch.setattr("urllib.request._opener", None)  # which has read the environment before
    monkeypatch.setenv("no_proxy", "here.example")
    shown = proxy if account else f"http://{proxy}"
    with pytest.raises(FetchError) as failure:
        fetch("http://there.example/a", tmp_path / "a.part", 100, "a")
    assert str(failure.value).startswith(f"there.example cannot be reached by the proxy {shown} of http_proxy: ")
    assert "refused" in str(failure.value) and archives.by_proxy("http://here.example/a") == ""


def test_a_proxy_that_hangs_up_is_named(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setattr("urllib.request._opener", None)
        monkeypatch.setattr(archives, "TIMEOUT", 0.2)
        with pytest.raises(FetchError, match=r"by the proxy http://127\.0\.0\.1:\d+ of http_proxy: timed out"):
            fetch("http://there.example/a", tmp_path / "a.part", 100, "a")


def test_fetch_without_a_network(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/a"
    with pytest.raises(FetchError, match=r"127\.0\.0\.1 cannot be reached: .*refused"):
        fetch(address, tmp_path / "a.part", 100, "a")


CONFIRM = (
    '<html><form id="download-form" action="{action}" method="get"><input type="hidden" name="id" value="1K">'
    '<input type="hidden" name="confirm" value="t"><input type="submit" value="Download anyway"></form></html>'
)


def test_fetch_confirms_on_the_page_that_warns_of_large_files(server, tmp_path):
    server.routes["/uc"] = Served(CONFIRM.format(action="/download").encode(), kind="text/html; charset=utf-8")
    server.routes["/download?id=1K&confirm=t"] = Served(b"archive")
    fetch(f"{server.address}/uc", tmp_path / "a.part", 100, "a")
    assert (tmp_path / "a.part").read_bytes() == b"archive"


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (CONFIRM.format(action="https://drive.usercontent.google.com/download"), True),
        (CONFIRM.format(action="https://elsewhere.example/download"), False),
        ("<html><form action='/login'><input type='hidden' name='user' value=''></form></html>", False),
        ("<html>quota exceeded</html>", False),
    ],
)
def test_confirmation(page, expected):
    address = confirmation(page, "https://drive.google.com/uc?id=1K")
    assert address == ("https://drive.usercontent.google.com/download?id=1K&confirm=t" if expected else None)


# --- one archive --------------------------------------------------------------------------------


def test_unpack_tar_and_zip_alike(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(
        tar_of((member("top", tarfile.DIRTYPE), b""), (member("top/x.png"), b"1"), (member("top/._x.png"), b"junk"))
    )
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("top/x.png", "1")
        archive.writestr("__MACOSX/top/x.png", "junk")
    for name in ("a.tar.gz", "a.zip"):
        folder = tmp_path / f"from {name}"
        folder.mkdir()
        unpack(tmp_path / name, folder, 10, 100)
        assert inner_folder(folder) == folder / "top"
        assert [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()] == ["top/x.png"]
        assert (folder / "top" / "x.png").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_of((member("../evil"), b"1")), r"the entry '\.\./evil' leads out of its folder"),
        (tar_of((member("/cmg_evil"), b"1")), "the entry '/cmg_evil' leads out of its folder"),
        (tar_of((member("a/../../evil"), b"1")), "leads out of its folder"),
        (tar_of((member("..\\evil"), b"1")), "leads out of its folder"),
        (tar_of((member("link", tarfile.SYMTYPE, "/etc"), b"")), "the entry 'link' is a link"),
        (tar_of((member("hard", tarfile.LNKTYPE, "x"), b"")), "the entry 'hard' is a link"),
        (tar_of((member("pipe", tarfile.FIFOTYPE), b"")), "the entry 'pipe' is a device"),
        (tar_of((member("big"), b"x" * 1001)), r"more than the 3 files and 1,000 bytes expected at most \(at 'big'\)"),
        (tar_of(*((member(f"f{i}"), b"") for i in range(4))), r"more than the 3 files .* \(at 'f3'\)"),
        (tar_of((member("x"), b"1"), (member("x"), b"2")), "holds 'x' twice"),
        (b"no archive at all", "is not a tar or zip archive, or is damaged"),
        (tar_of((member("x"), b"1" * 500))[:-20], "is not a tar or zip archive, or is damaged"),
    ],
    ids=[
        "parent",
        "absolute",
        "parent inside",
        "backslash",
        "symlink",
        "hard link",
        "fifo",
        "huge",
        "many",
        "twice",
        "no archive",
        "cut short",
    ],
)
def test_unpack_refuses(tmp_path, content, message):
    (tmp_path / "a.tar.gz").write_bytes(content)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message) as error:
        unpack(tmp_path / "a.tar.gz", tmp_path / "out", 3, 1000)
    assert "nothing was unpacked" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists() and not Path("/cmg_evil").exists()


def test_unpack_refuses_links_and_bombs_in_a_zip(tmp_path):
    (tmp_path / "out").mkdir()
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="the entry 'link' is a link"):
        unpack(tmp_path / "link.zip", tmp_path / "out", 3, 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10_000_000))
    with pytest.raises(UserError, match="1,000 bytes expected at most"):
        unpack(tmp_path / "bomb.zip", tmp_path / "out", 3, 1000)
    assert leftovers(tmp_path / "out") == []


# --- a data set ---------------------------------------------------------------------------------


def test_download_makes_the_data_set_complete(server, tiny, tmp_path, capsys):
    data = tmp_path / "data"
    assert run("lsun_fix", "--data-dir", data) == 0
    out = capsys.readouterr().out
    sha256 = hashlib.sha256(server.archive).hexdigest()
    record = json.loads((data / "LSUN-FIX.json").read_text())
    note = record["files"]["LSUN_fix"]
    assert f"LSUN_fix: SHA-256 {sha256} (no checksum is published)" in out and note["sha256"] == sha256
    assert note["bytes"] == len(server.archive) and note["from"].endswith("/LSUN_fix.tar.gz")
    assert record["splits"]["test"]["count"] == COUNT
    assert "LSUN-FIX: complete (12 test images)" in out
    assert leftovers(data) == [".LSUN_fix.3x32x32.npz", "LSUN-FIX.json", "LSUN_fix"]
    assert run("LSUN-FIX", "--data-dir", data) == 0
    assert "was there already" in capsys.readouterr().out and len(server.asked) == 1
    assert run("--check", "LSUN-FIX", "--data-dir", data) == 0


def test_interrupted_download_leaves_only_a_part_and_goes_on(server, tiny, tmp_path, capsys):
    data = tmp_path / "data"
    server.routes["/LSUN_fix.tar.gz"].cuts = [100, 100, 100]
    assert run("LSUN-FIX", "--data-dir", data) == 2
    message = capsys.readouterr().err
    assert "broke off after 300 of" in message and message.count("\n") == 1
    assert leftovers(data) == ["LSUN_fix.part"] and not is_present("LSUN-FIX", data, "test")
    assert run("LSUN-FIX", "--data-dir", data) == 0
    assert server.asked[-1][1] == "bytes=300-"
    assert verify("LSUN-FIX", data, "test")["count"] == COUNT


def killed_in(work, *args: object) -> int:
    """The signal that ended a process of its own that called `work(*args)`."""
    pid = os.fork()
    if not pid:
        try:
            work(*args)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_self(*args: object, **options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["unpack", "inner_folder", "verify", "write_record"])
def test_a_kill_after_the_transfer_costs_no_second_one(server, tiny, tmp_path, moment):
    data = tmp_path / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obtain, moment, kill_self)
        assert killed_in(obtain.obtain, "LSUN-FIX", data) == -signal.SIGKILL
    assert (data / "LSUN_fix.part").read_bytes() == server.archive
    in_place = moment == "write_record"
    assert is_present("LSUN-FIX", data, "test") == in_place
    assert obtain.obtain("LSUN-FIX", data) != in_place
    held = f"bytes={len(server.archive)}-"  # to which the server answers that there is no more
    assert [asked for _, asked in server.asked] == [None] + [held] * (not in_place)
    assert not (data / "LSUN_fix.part").exists() and verify("LSUN-FIX", data, "test")["count"] == COUNT


def origin_of(data_dir: Path) -> str:
    return json.loads((data_dir / "LSUN-FIX.json").read_text())["files"]["LSUN_fix"]["from"]


def test_a_complete_part_of_known_checksum_needs_no_server(server, tiny, tmp_path, monkeypatch):
    md5 = hashlib.md5(server.archive, usedforsecurity=False).hexdigest()
    known = replace(tiny.downloads[0], md5=md5, addresses=("http://a/x", "http://b/x"))
    monkeypatch.setitem(SOURCES, "LSUN-FIX", replace(tiny, downloads=(known,)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "LSUN_fix.part").write_bytes(server.archive)
    assert obtain.obtain("LSUN-FIX", tmp_path / "data") and server.asked == []
    assert origin_of(tmp_path / "data") == "http://a/x or http://b/x"


def test_a_refused_import_keeps_what_a_transfer_brought(server, tiny, tmp_path):
    data = tmp_path / "data"
    server.routes["/LSUN_fix.tar.gz"].cuts = [100] * 3
    with pytest.raises(UserError, match="broke off"):
        obtain.obtain("LSUN-FIX", data)
    (tmp_path / "bad.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"bad\.tar\.gz: is not a tar or zip archive"):
        obtain.obtain("LSUN-FIX", data, given=tmp_path / "bad.tar.gz")
    assert leftovers(data) == ["LSUN_fix.part"] and (data / "LSUN_fix.part").stat().st_size == 300


def test_wrong_checksum_keeps_nothing(server, tiny, tmp_path, monkeypatch):
    data = tmp_path / "data"
    source = replace(tiny, downloads=(replace(tiny.downloads[0], md5="0" * 32),))
    monkeypatch.setitem(SOURCES, "LSUN-FIX", source)
    with pytest.raises(UserError, match=r"sends a file with MD5 [0-9a-f]{32}, expected 0{32}"):
        obtain.obtain("LSUN-FIX", data)
    assert leftovers(data) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "image_00003.png").unlink(), "the file received: 11 test images, expected 12"),
        (
            lambda folder: (folder / "image_00003.png").write_bytes(b"\x89PNG"),
            r"LSUN-FIX: LSUN_fix/image_00003\.png: cannot be decoded",
        ),
        (lambda folder: write_folder(folder, ".", 1, size=31), r"image_00000\.png: is 31x31 pixels; expected 32x32"),
    ],
    ids=["one missing", "one damaged", "one of another size"],
)
def test_what_came_is_verified_before_it_shows(server, tiny, tmp_path, spoil, message):
    data = tmp_path / "data"
    spoil(tmp_path / "made" / "LSUN_fix")
    server.routes["/LSUN_fix.tar.gz"].content = pack(tmp_path / "made" / "LSUN_fix")
    with pytest.raises(UserError, match=message):
        obtain.obtain("LSUN-FIX", data)
    assert leftovers(data) == []


def test_malicious_archive_leaves_nothing(server, tiny, tmp_path):
    data = tmp_path / "data"
    server.routes["/LSUN_fix.tar.gz"].content = tar_of((member("LSUN_fix/../../../evil.png"), b"1"))
    with pytest.raises(UserError, match=r"data/LSUN_fix\.part: the entry .* leads out of its folder"):
        obtain.obtain("LSUN-FIX", data)
    assert leftovers(data) == []


def test_second_address_is_tried(server, tiny, tmp_path, monkeypatch):
    moved = replace(tiny.downloads[0], addresses=(f"{server.address}/gone", *tiny.downloads[0].addresses))
    monkeypatch.setitem(SOURCES, "LSUN-FIX", replace(tiny, downloads=(moved,)))
    assert obtain.obtain("LSUN-FIX", tmp_path / "data")
    assert [path for path, _ in server.asked] == ["/gone", "/LSUN_fix.tar.gz"]
    assert origin_of(tmp_path / "data") == f"{server.address}/LSUN_fix.tar.gz"


def test_failure_says_what_to_fetch_and_how_to_import_it(server, tiny, tmp_path):
    server.routes.clear()
    with pytest.raises(UserError) as error:
        read_source("LSUN-FIX", tmp_path / "data", "test")
    message = str(error.value)
    assert "answers 404" in message and f"fetch {server.address}/LSUN_fix.tar.gz by other means" in message
    assert f"python -m datasets.download LSUN-FIX --data-dir {tmp_path / 'data'} --from FILE_OR_FOLDER" in message
    assert "the digits need no download" in message and "\n" not in message


def test_incomplete_folder_of_the_user_is_not_touched(server, tiny, tmp_path):
    kept = tmp_path / "data" / "LSUN_fix" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(UserError, match="LSUN_fix: is there but lacks files; remove it or move it away"):
        obtain.obtain("LSUN-FIX", tmp_path / "data")
    assert kept.read_text() == "mine" and server.asked == []


def test_stale_staging_of_a_killed_run_is_cleared(server, tiny, tmp_path):
    stale = tmp_path / "data" / ".LSUN-FIX.staging" / "LSUN_fix" / "old.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"half")
    assert obtain.obtain("LSUN-FIX", tmp_path / "data")
    assert not stale.exists() and len(list((tmp_path / "data" / "LSUN_fix").iterdir())) == COUNT


def test_several_processes_fetch_once(server, tiny, tmp_path):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(obtain.obtain("LSUN-FIX", tmp_path / "data"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, False, True] and len(server.asked) == 1


def test_one_failure_of_several_does_not_stop_the_others(server, tiny, tmp_path, monkeypatch, capsys):
    gone = replace(tiny.downloads[0], addresses=(f"{server.address}/gone",), target="Imagenet_fix")
    monkeypatch.setitem(SOURCES, "ImageNet-FIX", replace(tiny, downloads=(gone,)))
    assert run("ImageNet-FIX", "LSUN-FIX", "--data-dir", tmp_path / "data") == 2
    streams = capsys.readouterr()
    assert "1 of 2 could not be obtained: ImageNet-FIX" in streams.err and "/gone answers 404" in streams.err
    assert "LSUN-FIX: complete" in streams.out


@pytest.fixture
def tiny_mnist(server, tmp_path, monkeypatch) -> None:
    """MNIST with two images of each digit in each split, from the server."""
    write_mnist(tmp_path / "made", 2, compressed=True)
    downloads = []
    for known in SOURCES["mnist"].downloads:
        name = Path(known.target).name
        file = tmp_path / "made" / "MNIST" / "raw" / name
        server.routes[f"/{name}"] = Served(file.read_bytes())
        downloads.append(replace(known, addresses=(f"{server.address}/{name}",), md5=digest(file, "md5")))
    source = replace(SOURCES["mnist"], downloads=tuple(downloads), counts={"train": 20, "test": 20})
    monkeypatch.setitem(SOURCES, "mnist", source)


def test_plain_files_are_fetched_by_split(server, tiny_mnist, tmp_path):
    images, labels = read_source("mnist", tmp_path / "data", "test")
    assert images.shape == (20, 1, 28, 28) and labels[:11].tolist() == [*range(10), 0]
    assert [path for path, _ in server.asked] == ["/t10k-images-idx3-ubyte.gz", "/t10k-labels-idx1-ubyte.gz"]
    read_source("mnist", tmp_path / "data", "train")
    record = json.loads((tmp_path / "data" / "mnist.json").read_text())
    assert len(record["files"]) == 4 and set(record["splits"]) == {"train", "test"}
    assert not list((tmp_path / "data").rglob("*.part"))


def test_a_file_that_came_is_kept_when_the_next_does_not(server, tiny_mnist, tmp_path):
    labels = server.routes.pop("/t10k-labels-idx1-ubyte.gz")
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte.gz answers 404"):
        read_source("mnist", tmp_path / "data", "test")
    assert leftovers(tmp_path / "data" / "MNIST" / "raw") == ["t10k-images-idx3-ubyte.gz.part"]
    server.routes["/t10k-labels-idx1-ubyte.gz"] = labels
    assert len(read_source("mnist", tmp_path / "data", "test")[0]) == 20
    assert [path for path, _ in server.asked].count("/t10k-images-idx3-ubyte.gz") == 1


# --- importing ----------------------------------------------------------------------------------


def small(name: str, monkeypatch, **counts: int) -> Source:
    """A known source with other counts and no checksums of the published files."""
    known = SOURCES[name]
    downloads = tuple(
        replace(d, md5=None, contents={split: dict.fromkeys(files) for split, files in d.contents.items()})
        for d in known.downloads
    )
    monkeypatch.setattr(obtain, "_checksums", lambda *args: [])
    monkeypatch.setitem(SOURCES, name, replace(known, downloads=downloads, counts=counts))
    return SOURCES[name]


@pytest.mark.parametrize(
    "form", ["archive", "folder", "holder of the folder", "holder of the archive", "renamed", "zip"]
)
def test_import_of_an_image_set(tmp_path, monkeypatch, form):
    small("LSUN", monkeypatch, test=COUNT)
    folder = tmp_path / "made" / "LSUN_resize"
    write_folder(folder.parent, folder.name, COUNT, nested=True)
    (tmp_path / "packed").mkdir()
    archive = tmp_path / "packed" / "LSUN_resize.tar.gz"
    archive.write_bytes(pack(folder))
    shutil.copytree(folder, tmp_path / "my lsun")
    shutil.make_archive(str(tmp_path / "any"), "zip", folder.parent)
    given = {
        "archive": archive,
        "folder": folder,
        "holder of the folder": folder.parent,
        "holder of the archive": archive.parent,
        "renamed": tmp_path / "my lsun",
        "zip": tmp_path / "any.zip",
    }[form]
    assert run("LSUN", "--data-dir", tmp_path / "data", "--from", given) == 0
    images, _ = read_source("LSUN", tmp_path / "data", "test")
    expected, _ = SOURCES["LSUN"].read(folder.parent, "test")
    assert np.array_equal(images, expected)
    assert given.exists() and json.loads((tmp_path / "data" / "LSUN.json").read_text())["splits"]["test"]["count"] == 12


def test_import_of_cifar_svhn_and_mnist(tmp_path, monkeypatch):
    made, data = tmp_path / "made", tmp_path / "data"
    write_cifar10(made, 10)
    write_svhn(made, 10)
    write_mnist(made, 1)
    for name, train in (("cifar10", 50), ("SVHN", 10), ("mnist", 10)):
        small(name, monkeypatch, train=train, test=10)
        assert obtain.obtain(name, data, given=made)
        assert verify(name, data, "train")["count"] == train
    assert (data / "MNIST" / "raw" / "t10k-images-idx3-ubyte").is_file()
    raw = tmp_path / "raw"
    shutil.copytree(made / "MNIST" / "raw", raw)
    assert obtain.obtain("mnist", tmp_path / "other", given=raw)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("LSUN", "empty", r"--from .*empty: there is no LSUN_resize or LSUN_resize\.tar\.gz of LSUN; give the file"),
        ("mnist", "empty", r"there is no train-images-idx3-ubyte\.gz or train-images-idx3-ubyte of mnist"),
        ("mnist", "file.tar.gz", r"there is no train-images-idx3-ubyte\.gz"),
        ("LSUN", "file.tar.gz", r"is not the published file of LSUN \(MD5 [0-9a-f]{32}, expected 278b7b31c8cb7e80"),
        ("LSUN-FIX", "file.tar.gz", "is not a tar or zip archive, or is damaged"),
        ("LSUN", "nowhere", "no such file or folder"),
    ],
)
def test_import_refuses(tmp_path, capsys, name, given, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.tar.gz").write_bytes(b"something else")
    assert run(name, "--data-dir", tmp_path / "data", "--from", tmp_path / given) == 2
    captured = capsys.readouterr().err
    assert re.search(message, captured) and captured.count("\n") == 1
    assert not (tmp_path / "data").exists() or leftovers(tmp_path / "data") == []


def test_import_of_an_incomplete_folder(tmp_path):
    write_cifar10(tmp_path, 10)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    with pytest.raises(UserError, match="cifar-10-batches-py: lacks data_batch_4 of cifar10. Give a complete copy"):
        obtain.obtain("cifar10", tmp_path / "data", given=tmp_path)
    assert leftovers(tmp_path / "data") == []


def test_import_never_keeps_a_set_of_the_wrong_count(tmp_path, capsys):
    write_folder(tmp_path, "LSUN_fix", COUNT)
    assert run("LSUN-FIX", "--data-dir", tmp_path / "data", "--from", tmp_path / "LSUN_fix") == 2
    assert "12 test images, expected 10,000" in capsys.readouterr().err
    assert leftovers(tmp_path / "data") == []


# --- checking -----------------------------------------------------------------------------------


def test_check_lists_everything(tmp_path, capsys, monkeypatch):
    small("LSUN", monkeypatch, test=COUNT)
    write_folder(tmp_path, "LSUN_resize", COUNT)
    write_folder(tmp_path, "LSUN_fix", COUNT)
    assert run("--check", "--data-dir", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    states = {tuple(line.split()[:2]): line.split()[3].rstrip(":") for line in lines[1:]}
    assert states.pop(("LSUN", "test")) == "complete" and states.pop(("LSUN-FIX", "test")) == "wrong"
    assert set(states.values()) == {"missing"} and len(states) == 14
    assert run("--check", "LSUN", "--data-dir", tmp_path) == 0
    assert run("--check", "cifar10", "--data-dir", tmp_path) == 1
    assert run("--check", "--data-dir", tmp_path / "nowhere") == 0


def test_check_notices_a_changed_image_although_the_packed_file_is_intact(server, tiny, tmp_path):
    data = tmp_path / "data"
    obtain.obtain("LSUN-FIX", data)
    (data / "LSUN_fix" / "image_00003.png").write_bytes((data / "LSUN_fix" / "image_00004.png").read_bytes())
    with pytest.raises(UserError, match=r"the test images are not those recorded in .*LSUN-FIX\.json"):
        verify("LSUN-FIX", data, "test")


def test_check_compares_published_checksums(tmp_path):
    write_cifar10(tmp_path, 10)
    with pytest.raises(UserError, match=r"data_batch_1: differs from the published file \(its MD5 should be c99cafc1"):
        verify("cifar10", tmp_path, "train")


def test_check_names_labels_and_shapes_that_are_wrong(tmp_path, monkeypatch):
    write_mnist(tmp_path, 1)
    source = small("mnist", monkeypatch, train=10, test=10)
    monkeypatch.setitem(SOURCES, "mnist", replace(source, classes=5))
    with pytest.raises(UserError, match="labels 0 to 9, expected 0 to 4"):
        verify("mnist", tmp_path, "test")
    monkeypatch.setitem(SOURCES, "mnist", replace(source, shape=(1, 32, 32)))
    with pytest.raises(UserError, match=r"images are \[1, 28, 28\], expected \[1, 32, 32\]"):
        verify("mnist", tmp_path, "test")


# --- the command and its table ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["imagenet"], "imagenet: no such data set; expected all or some of mnist, fashion_mnist"),
        ([], "name the data sets to fetch; expected all"),
        (["--check", "--from", "."], "--check reads --data-dir only"),
    ],
)
def test_command_refuses(capsys, argv, message):
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


def test_one_file_is_not_several_data_sets(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    assert run("all", "--from", tmp_path / "file", "--data-dir", tmp_path / "data") == 2
    assert "is one file; name the one data set that it holds" in capsys.readouterr().err


def test_unwritable_data_dir(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write .*file: "):
        obtain.obtain("LSUN", tmp_path / "file")


@pytest.mark.parametrize("name", ["MNIST", "CIFAR-10", "cifar100", "Fashion-MNIST", "lsun-fix", "imagenet_fix"])
def test_names_as_people_write_them(name):
    assert find_source(name) in SOURCES


def test_addresses_and_checksums_are_those_of_torchvision():
    for name, theirs in (
        ("mnist", torchvision.datasets.MNIST),
        ("fashion_mnist", torchvision.datasets.FashionMNIST),
        ("kmnist", torchvision.datasets.KMNIST),
    ):
        ours = {Path(d.target).name: d for d in SOURCES[name].downloads}
        assert {file: d.md5 for file, d in ours.items()} == dict(theirs.resources)
        assert all(d.addresses[0] == theirs.mirrors[0] + file for file, d in ours.items())
        assert all(d.target.startswith(f"{theirs.__name__}/raw/") for d in ours.values())
    for name, theirs in (("cifar10", torchvision.datasets.CIFAR10), ("CIFAR100", torchvision.datasets.CIFAR100)):
        (ours,) = SOURCES[name].downloads
        assert (ours.addresses[0], ours.md5, ours.target) == (theirs.url, theirs.tgz_md5, theirs.base_folder)
        assert list(ours.contents["train"].items()) == list(map(tuple, theirs.train_list))
        assert list(ours.contents["test"].items()) == list(map(tuple, theirs.test_list))
    for ours in SOURCES["SVHN"].downloads:
        assert [ours.addresses[0], ours.target, ours.md5] == torchvision.datasets.SVHN.split_list[ours.splits[0]]


def test_addresses_and_checksums_are_those_of_pytorch_ood():
    odin = pytest.importorskip("pytorch_ood.dataset.img.odin")
    for name, theirs in (("LSUN", odin.LSUNResize), ("tinyImageNet", odin.TinyImageNetResize)):
        (ours,) = SOURCES[name].downloads
        assert theirs.url in ours.addresses and theirs.tgz_md5 == ours.md5


def test_counts_are_those_of_the_method():
    assert {name: source.counts["test"] for name, source in SOURCES.items() if name != "SVHN"} == dict.fromkeys(
        [name for name in SOURCES if name != "SVHN"], 10_000
    )
    assert SOURCES["SVHN"].counts == {"train": 73_257, "test": 26_032}


def test_gzip_of_other_compression_is_accepted(tmp_path, monkeypatch):
    write_mnist(tmp_path / "made", 1)
    raw = tmp_path / "made" / "MNIST" / "raw"
    for file in list(raw.iterdir()):
        (raw / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes(), 1))
        file.unlink()
    monkeypatch.setitem(SOURCES, "mnist", replace(SOURCES["mnist"], counts={"train": 10, "test": 10}))
    assert obtain.obtain("mnist", tmp_path / "data", given=tmp_path / "made")


def test_download_defaults_are_harmless():
    assert Download(addresses=("a",), target="t").files() == []
