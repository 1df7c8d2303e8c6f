"""The ground floor: numbers on the command line, exit statuses, safe files, progress."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
import platform
import resource
import shlex
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import utils
from cli.errors import Stopped, UserError, printable, run_command
from cli.files import check_writable, read_json, replacing, short_name, write_json
from cli.options import number, positive_int
from cli.progress import Progress
from utils import (
    check_memory,
    derive_seed,
    generator,
    keep_freed_memory,
    load_checkpoint,
    pick_device,
    pick_precision,
    save_checkpoint,
    start_computing,
)

# --- arguments and exit statuses ----------------------------------------------------------------


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_number_is_taken_within_its_bounds_only(value):
    parse = number(float, above=-1.5, below=2.0, least=-1.0)
    if -1.0 <= value < 2.0:
        assert parse(repr(value)) == value
    else:
        with pytest.raises(
            argparse.ArgumentTypeError, match="out of range: expected above -1.5 and at least -1 and below 2"
        ):
            parse(repr(value))


def test_what_is_counted_has_an_end():
    assert positive_int("2000000000") == 2 * 10**9
    with pytest.raises(argparse.ArgumentTypeError, match="out of range: expected above 0 and at most 2,147,483,647$"):
        positive_int("1" * 30)
    with pytest.raises(argparse.ArgumentTypeError, match="0 is out of range: expected above 0$"):
        positive_int("0")


@pytest.mark.parametrize(("kind", "text", "word"), [(int, "1.5", "whole number"), (float, "a", "number")])
def test_what_is_no_number_is_named(kind, text, word):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a {word}"):
        number(kind)(text)


@pytest.mark.parametrize(
    ("failure", "status", "line"),
    [
        (None, 0, ""),
        (UserError("no"), 2, "name: error: no\n"),
        (Stopped("saved", 15), 143, "name: saved\n"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "nnn"),
            2,
            "name: error: nnn: File name too long\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "name: error: standard output, or a file on the way: No space left on device\n",
        ),
    ],
)
def test_a_foreseen_failure_is_one_line_and_a_status(capsys, failure, status, line):
    def main(args):
        assert args.argv == []
        if failure:
            raise failure

    assert run_command(main, argparse.ArgumentParser("name"), []) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_one_line_and_its_status(capsys, signum):
    def main(args):
        try:
            os.kill(os.getpid(), signum)
            time.sleep(10)
        except Exception:
            pytest.fail("taken for a failure")

    before = signal.getsignal(signum)
    assert run_command(main, argparse.ArgumentParser("name"), []) == 128 + signum
    assert capsys.readouterr().err == f"name: stopped by {signum.name}\n"
    assert signal.getsignal(signum) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        (">&-", "standard output is closed, and what is printed would be lost: redirect it to a file or to /dev/null"),
        (">/dev/full", "standard output, or a file on the way: No space left on device"),
    ],
)
def test_output_that_goes_nowhere_is_named(tmp_path, redirection, message):
    command = f"{sys.executable} -m datasets.download --check --data-dir {tmp_path} {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"datasets.download: error: {message}\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_standard_error_that_goes_nowhere_loses_nothing(tmp_path, redirection):
    command = f"{sys.executable} -m datasets.download --check SVHN --from x --data-dir {tmp_path} {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "")


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "done.json")
    with pytest.raises(UserError, match=r"done\.json: is not a plain file; expected what is done"):
        read_json(tmp_path / "done.json", {}, "what is done")


@pytest.mark.parametrize("failure", [ZeroDivisionError(), OSError("of a library")])
def test_an_unforeseen_failure_is_not_hidden(failure):
    def main(args):
        raise failure

    with pytest.raises(type(failure)):
        run_command(main, argparse.ArgumentParser("name"), [])


def test_whoever_reads_the_output_may_have_enough():
    lines = "from cli.errors import *; run = lambda args: [print(k, flush=True) for k in range(10**5)] and 0"
    code = f"{lines}; sys.exit(run_command(run, argparse.ArgumentParser('name'), []))"
    shell = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -n 1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=Path(utils.__file__).parent)
    assert (found.returncode, found.stdout, found.stderr) == (141, "0\n", "")


# --- seeds, device, precision -------------------------------------------------------------------


def test_a_stream_is_the_same_on_every_machine():
    # The first eight bytes of sha256("123/order/0"), shifted to 63 bits: a published seed must keep its meaning.
    assert derive_seed(123, "order", 0) == 0x049EB6AB7E0701B3 >> 1
    assert generator(123, "order", 0).initial_seed() == derive_seed(123, "order", 0)


@pytest.mark.parametrize("name", ["tpu9", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=f"--device {name}: "):
        pick_device(name)


def test_precision_is_taken_as_asked_for():
    cpu = torch.device("cpu")
    assert [pick_precision(name, cpu) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert pick_precision("auto", cpu) in ("fp32", "bf16")


# --- files --------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole_with_the_usual_rights(tmp_path):
    path = tmp_path / "deep" / "er" / "file.json"
    write_json(path, {"a": 1})
    write_json(path, {"b": [2.5, None]})
    assert json.loads(path.read_text()) == {"b": [2.5, None]}
    assert list(path.parent.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "file"
    path.write_text("old")
    expected = UserError if isinstance(failure, OSError) else failure
    with pytest.raises(expected), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise failure
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_as_torch_reports_it_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "net.pkl"
    save_checkpoint(path, {"weights": torch.ones(3)})

    def fail(content, file):
        file.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0\nframe #0")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="cannot write .*is the disk full") as failure:
        save_checkpoint(path, {})
    assert "\n" not in str(failure.value) and list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_checkpoint(path)["weights"], torch.ones(3))


def test_a_name_that_is_too_long_to_be_replaced_is_found_before_the_work(tmp_path):
    longest = tmp_path / ("n" * 245)  # and a temporary name has a dot before it and nine characters after it
    check_writable(longest)
    write_json(longest, {})
    assert list(tmp_path.iterdir()) == [longest]
    for path in (tmp_path / ("n" * 246), tmp_path / ("n" * 300), tmp_path / ("d" * 300) / "file"):
        with pytest.raises(UserError) as refusal:
            check_writable(path)
        assert str(refusal.value) == f"cannot write {path}: the name is too long; give a shorter one"
    assert list(tmp_path.iterdir()) == [longest]


class Payload:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "write",
    [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))],
    ids=["torch", "pickle"],
)
def test_a_checkpoint_that_could_run_code_does_not(tmp_path, write):
    path, mark = tmp_path / "bad.pkl", tmp_path / "ran"
    write({"weights": torch.ones(1), "more": Payload(mark)}, path)
    with pytest.raises(
        UserError,
        match=r"bad\.pkl: holds [\w.]+, which could run code; expected .* save its weights alone: torch\.save\(",
    ):
        load_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a checkpoint or is damaged"),
        (b"just some text", "is not a checkpoint or is damaged"),
        (b"PK\x03\x04 a zip that ends too soon", "is not a checkpoint or is damaged"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content, message):
    path = tmp_path / "bad.pkl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"bad.pkl: {message}"):
        load_checkpoint(path)


def test_a_file_that_one_may_not_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "net.pkl"
    save_checkpoint(path, {"weights": torch.ones(1)})

    def refuse(file, mode):  # in place of chmod, which does not stop an administrator
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(utils, "open", refuse, raising=False)
    with pytest.raises(UserError) as refusal:
        load_checkpoint(path)
    assert str(refusal.value) == f"{path}: cannot be read (Permission denied); expected a file that you may read"


def test_a_pipe_is_no_checkpoint_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(
        UserError, match=r"pipe: is not a plain file; expected a dict of tensors written by torch\.save$"
    ):
        load_checkpoint(tmp_path / "pipe")


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\); expected a file that you may read$"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_checkpoint_cut_short_is_damaged(tmp_path, share):
    path = tmp_path / "net.pkl"
    save_checkpoint(path, {"weights": torch.rand(5000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="net.pkl: is not a checkpoint or is damaged"):
        load_checkpoint(path)


def test_a_checkpoint_of_something_else_than_a_dict_is_refused(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.pkl")
    with pytest.raises(UserError, match="list.pkl: holds a list; expected a dict of .*save. Make it again"):
        load_checkpoint(tmp_path / "list.pkl")


# --- what cannot be shown, held or read -----------------------------------------------------------


def test_names_are_shown_in_one_line():
    assert printable("caf\udce9 ±\n\x1b[31m") == "caf\\xe9 ±\\n\\x1b[31m"


@pytest.mark.parametrize("path", [os.devnull, "pipe"])
def test_devices_and_pipes_are_not_replaced(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(UserError, match=f"cannot write {path}: it is not a plain file; name another$"):
        check_writable(Path(path))


def test_no_character_stops_a_command(tmp_path):
    """Neither one of ours nor one of a file's name, on a terminal that knows only ASCII."""
    code = (
        "import argparse, sys; from cli.errors import *\n"
        "def main(args):\n    print('± … caf\\udce9'); raise UserError('a\\nb caf\\udce9')\n"
        "sys.exit(run_command(main, argparse.ArgumentParser('name'), []))"
    )
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    place = Path(utils.__file__).parent
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=place)
    shown = "\\xb1 \\u2026 caf\\udce9\n"
    assert (found.returncode, found.stdout, found.stderr) == (2, shown, "name: error: a\\nb caf\\xe9\n")


def test_what_libraries_remark_about_images_is_not_shown(recwarn):
    def main(args):
        warnings.warn_explicit("Corrupt EXIF data", UserWarning, "x.py", 1, module="PIL.TiffImagePlugin")
        warnings.warn_explicit("ours", UserWarning, "x.py", 1, module="utils")

    assert run_command(main, argparse.ArgumentParser("name"), []) == 0
    assert [str(warning.message) for warning in recwarn] == ["ours"]


CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "64000000000 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_ALLOCATOR = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB\nof which"


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (RuntimeError(CPU_ALLOCATOR), "not enough memory: 64000000000 bytes more was needed"),
        (torch.OutOfMemoryError(CUDA_ALLOCATOR), "not enough memory of the GPU: 20.00 GiB more was needed"),
        (MemoryError(), "not enough memory"),
        (MemoryError("Unable to allocate 72.8 TiB for an array"), "not enough memory: 72.8 TiB more was needed"),
        (utils.MemoryShortage("not enough memory: x would take 9.0 GB"), "not enough memory: x would take 9.0 GB"),
    ],
)
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ([], "end other programs, or take a machine with more"),
        (["--batch-size", "--lr", "--pseudo-pool"], "lower --pseudo-pool or --batch-size"),
    ],
)
def test_out_of_memory_is_one_line(capsys, error, what, options, remedy):
    parser = argparse.ArgumentParser("name")
    for option in options:
        parser.add_argument(option)

    def main(args):
        raise error

    assert run_command(main, parser, []) == 2
    assert capsys.readouterr().err == f"name: error: {what}; {remedy}\n"


def test_more_memory_than_there_is_is_refused_before_it_is_filled():
    cpu = torch.device("cpu")
    check_memory(10**6, cpu, "little")
    with pytest.raises(
        utils.MemoryShortage, match=r"^not enough memory: noise would take 1,000,000\.0 GB, [\d.,]+ GB are"
    ):
        check_memory(10**15, cpu, "noise")


def test_where_the_system_does_not_tell_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(utils, "free_memory", lambda device: 10**14)
    with pytest.raises(MemoryError, match="noise would take 1,000,000.0 GB, 100,000.0 GB are free"):
        check_memory(10**15, torch.device("cpu"), "noise")
    monkeypatch.setattr(utils, "free_memory", lambda device: None)
    assert check_memory(10**15, torch.device("cpu"), "noise") is None


def test_names_of_files_have_an_end():
    assert short_name("results_seed1") == "results_seed1" and short_name("x" * 120) == "x" * 120
    long = [short_name(f"{'é' * 200}{end}") for end in "ab"]
    assert all(name.startswith("é" * 50) and len(os.fsencode(name)) <= 120 for name in long) and long[0] != long[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_json_holds_what_is_no_number(tmp_path, bad):
    with pytest.raises(UserError, match=r"r\.json: a number in it is not finite, so something before it failed$"):
        write_json(tmp_path / "r.json", {"auroc": [0.5, bad]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON or is damaged; expected a result"),
        ("{", "is not JSON or is damaged; expected a result"),
        ("[" * 100_000, "is not JSON or is damaged; expected a result"),
        ("[]", "holds something else; expected a result"),
        ("{}", "holds something else; expected a result"),
        ('{"rows": [{"auroc": NaN}]}', "holds something else; expected a result"),
        ('{"rows": [{"auroc": "0.5"}]}', "holds something else; expected a result"),
        ('{"rows": [{"auroc": 1%s}]}' % ("0" * 400), "holds something else; expected a result"),
        ('{"rows": [{"auroc": 1, "fpr95": "0"}]}', "holds something else; expected a result"),
        ('{"rows": [{"auroc": true}]}', "holds something else; expected a result"),
        ('{"rows": {"auroc": 1}}', "holds something else; expected a result"),
        (None, "No such file or directory; expected a result"),
    ],
)
def test_a_json_file_of_wrong_content_is_named(tmp_path, content, message):
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as refusal:
        read_json(path, {"rows": [{"auroc": float, "fpr95": (float,)}]}, "a result")
    assert str(refusal.value) == f"{path}: {message}"


def test_a_json_file_is_read_back_as_it_was_written(tmp_path):
    content = {"rows": [{"auroc": 1, "name": "caf\udce9 ±"}]}
    write_json(tmp_path / "r.json", content)
    assert read_json(tmp_path / "r.json", {"rows": [{"auroc": float}]}, "") == content


# --- progress -----------------------------------------------------------------------------------


def test_progress_reads_the_loss_only_when_it_prints(capsys):
    asked = []

    def note():
        asked.append(1)
        return "loss 0.5"

    calm = Progress(100, "work", interval=1000)
    for _ in range(10):
        calm.advance(10, note)
    assert not asked and capsys.readouterr().out == ""
    eager = Progress(100, "work", interval=0)
    eager.skip(40)
    eager.advance(20, note)
    line = capsys.readouterr().out
    assert line.startswith("work: 60/100 img  loss 0.5  ") and line.rstrip().endswith(" s left") and len(asked) == 1
    Progress(100, "work", interval=0, enabled=False).advance(10, note)
    assert capsys.readouterr().out == "" and len(asked) == 1


# --- the processor -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("computes", "product"), [(True, 0.0), (False, pytest.approx(1e-40, rel=1e-4))])
def test_denormal_numbers_count_as_zero_in_commands_that_compute(computes, product):
    def main(args):
        if computes:
            assert start_computing("cpu") == torch.device("cpu")
        found.append((torch.tensor([1e-30]) * 1e-10).item())

    torch.set_flush_denormal(False)
    found = []
    assert run_command(main, argparse.ArgumentParser(), []) == 0
    torch.set_flush_denormal(False)
    assert found == [product]


@pytest.mark.parametrize("name", ["tpu9", "meta"])
def test_commands_that_compute_refuse_a_device_as_any_other(name):
    with pytest.raises(UserError, match=f"--device {name}: "):
        start_computing(name)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps what it likes")
def test_freed_memory_is_kept_for_the_next_block():
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.ones(2**24)  # 64 MiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory(False)
    given_back = faults()
    keep_freed_memory(True)
    # Until the blocks are where they stay, one may still come from elsewhere.
    assert min(faults() for _ in range(4)) < given_back / 10
