"""Ground floor: command-line arguments, errors, seeds, device and precision, progress, safe files.

Everything else may import this module and it imports nothing of ours. Torch is imported inside the
functions that need it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

# --- errors -------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, what was expected, what to do."""


class Stopped(BaseException):
    """The run was asked to stop by a signal: like KeyboardInterrupt no failure, which code on the way might catch."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@contextmanager
def handling(handler: Callable | signal.Handlers):
    """Within the block the stop signals go to `handler`."""
    previous = {signum: signal.signal(signum, handler) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, earlier in previous.items():
            signal.signal(signum, earlier)


def raise_stopped(signum: int, frame: object) -> None:
    """The handler of every command, but for the training loop, which first saves its state."""
    raise Stopped(f"stopped by {signal.Signals(signum).name}", signum)


def run_command(main: Callable, parser: argparse.ArgumentParser, argv: list[str] | None = None) -> int:
    """Parse, run and turn every foreseen failure into one line: the body of every entry point.

    A command with --device computes: for it the processor is tuned first.

    Returns the exit status: what `main` returns, or 0; 2 for a `UserError` (as argparse's own) and where memory ran
    out, 128 + n when stopped by signal n.
    """
    for stream in (sys.stdout, sys.stderr):  # no character that a terminal lacks is worth losing a result
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser.error = partial(_refuse, parser)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with handling(raise_stopped), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of an image file is said by us
            if hasattr(args, "device"):
                tune_processor()
            return main(args) or 0
    except UserError as error:
        print(f"{parser.prog}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if (shortage := memory_shortage(error)) is None:
            raise
        print(f"{parser.prog}: error: {shortage}; {less_memory(parser)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as SIGPIPE ends a process
    except OSError as error:  # the system's own: a closed folder, a name too long, a full disk
        if error.errno is None:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"{parser.prog}: error: {printable(str(what))}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"{parser.prog}: {stop}", file=sys.stderr)
        return 128 + stop.signum


def _refuse(parser: argparse.ArgumentParser, message: str) -> None:
    """argparse's own `error` without the usage, which would hide the message behind twenty lines."""
    parser.exit(2, f"{parser.prog}: error: {printable(message)}; --help lists the options\n")


def printable(text: str) -> str:
    """Text in one line that a terminal can show: control characters, and bytes of a name that are no UTF-8, become
    \\x…"""

    def shown(letter: str) -> str:
        if "\udc80" <= letter <= "\udcff":  # as Python holds such a byte
            return f"\\x{ord(letter) & 0xFF:02x}"
        return letter if letter.isprintable() else letter.encode("unicode_escape").decode()

    return "".join(map(shown, text))


# --- memory -------------------------------------------------------------------------------------


def memory_shortage(error: Exception) -> str | None:
    """What ran out, if that is what an error says."""
    text = str(error)
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    if not isinstance(error, MemoryError) and not any(word in text for word in words):
        return None
    if isinstance(error, MemoryShortage):
        return text
    amount = re.search(r"allocate ([\d.]+ \w+)", text)
    where = "memory of the GPU" if "CUDA" in text or "CUBLAS" in text else "memory"
    return f"not enough {where}" + (f": {amount[1]} more could not be had" if amount else "")


def less_memory(parser: argparse.ArgumentParser) -> str:
    """What to do about a shortage of memory: the options of a command that decide how much it takes."""
    hungry = ("pseudo_pool", "pseudo_batch_size", "batch_size", "width", "seeds")
    names = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    options = [names[dest] for dest in hungry if dest in names]
    if not options:
        return "end other programs, or take a machine with more"
    *others, last = options
    return f"lower {', '.join(others)} or {last}" if others else f"lower {last}"


class MemoryShortage(MemoryError):
    """Found out before it happened; the message says what would have needed how much."""


def check_memory(needed: int, device, what: str) -> None:
    """Find out before `needed` bytes are filled, as `what`, whether they are there.

    A system that promises more memory than it has does not refuse: it ends the process, or others.

    Raises:
        MemoryShortage: they are not, as far as the system tells.
    """
    if needed < 2**28:  # not worth asking
        return
    free = free_memory(device)
    if free is not None and needed > free:
        raise MemoryShortage(
            f"not enough memory: {what} would take {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free"
        )


def free_memory(device) -> int | None:
    """Bytes that tensors may still take on a device, or None where the system does not tell."""
    if device.type == "cuda":
        import torch

        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    try:  # of a container
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    except (OSError, ValueError):  # there is none, or "max"
        pass
    return free + kept_memory()


def kept_memory() -> int:
    """Bytes that were freed and that the C library keeps for what comes next, see `keep_freed_memory`."""

    class Info(ctypes.Structure):  # as malloc.h has it
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        return 0
    mallinfo.restype = Info
    return mallinfo().fordblks


# --- arguments ----------------------------------------------------------------------------------


MOST = 2**31 - 1  # of what is counted: far more than anyone wants and less than what libraries in C take


def number(
    kind: type = int,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    least: float = -math.inf,
    most: float = math.inf,
) -> Callable:
    """An argparse type: a finite number of `kind` with above < x < below and least <= x <= most."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a {'whole number' if kind is int else 'number'}"
            ) from None
        if not (math.isfinite(value) and above < value < below and least <= value <= most):
            bounds = [f"above {above:,.10g}"] * (above > -math.inf) + [f"at least {least:,.10g}"] * (least > -math.inf)
            bounds += [f"below {below:,.10g}"] * (below < math.inf) + [f"at most {most:,.10g}"] * (
                most < max(value, MOST)
            )
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: expected {' and '.join(bounds) or 'a finite number'}"
            )
        return value

    return parse


positive_int = number(int, above=0, most=MOST)
positive_float = number(float, above=0)
seed_number = number(int, least=0)


def add_common_arguments(parser: argparse.ArgumentParser, tasks: list[str], partitions: list[str]) -> None:
    """The arguments that every command shares; their choices come from the task registry."""
    parser.add_argument(
        "--task", choices=tasks, default=tasks[0], help="what is IND and what is OOD (default: %(default)s)"
    )
    parser.add_argument("--partition", choices=partitions, help="which classes are IND (default: the task's first)")
    add_machine_arguments(parser)


def add_machine_arguments(parser: argparse.ArgumentParser, data_dir: Path = Path("datasets")) -> None:
    """On which device, in which precision, and where the images are."""
    add_device_arguments(parser)
    parser.add_argument("--data-dir", type=Path, default=data_dir, help="folder of the images (default: %(default)s)")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """On which device and in which precision."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the first CUDA GPU, else the CPU)")
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="auto takes bf16 where the hardware has it (default: %(default)s)",
    )


def pick_all(flag: str, names: list[str], known: Sequence[str], task_name: str) -> list[str]:
    """The names asked for, each once, or all that are known."""
    if not known:
        raise UserError(f"{task_name} has no OOD images; name a folder of them with --ood-dir DIR")
    for name in names:
        if name not in (*known, "all"):
            raise UserError(f"{flag} {name}: {task_name} has {', '.join(known)}")
    return list(known) if "all" in names else list(dict.fromkeys(names))


def changed_options(args: argparse.Namespace, parser: argparse.ArgumentParser, names: Sequence[str]) -> str:
    """What was given otherwise than by default, for names of files: "_lr-0.001_margins-0.3-0.7", or nothing; of a
    path its last folder and name."""

    def word(value: object) -> str:
        if not isinstance(value, Path):
            return str(value)
        return "-".join([part for part in value.parts if part not in ("..", value.anchor)][-2:])

    changed = {name: getattr(args, name) for name in names if getattr(args, name) != parser.get_default(name)}
    lists = {name: value if isinstance(value, list) else [value] for name, value in changed.items()}
    return "".join(f"_{'-'.join([name, *map(word, values)])}" for name, values in lists.items())


def short_name(name: str, most: int = 120) -> str:
    """A name for a file; of one that is longer than `most` bytes its beginning and a hash of the whole: file systems
    take no names of any length, and what is temporary gets a few letters more."""
    content = os.fsencode(name)
    if len(content) <= most:
        return name
    digest = hashlib.sha256(content).hexdigest()[:10]
    return f"{content[: most - len(digest) - 1].decode('utf-8', 'ignore')}_{digest}"


def counted(count: int, noun: str) -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


# --- seeds --------------------------------------------------------------------------------------


def derive_seed(seed: int, *stream: object) -> int:
    """A 63-bit seed of its own for every named stream, such as (123, "order", epoch).

    Streams are independent: drawing more from one never shifts another, and an epoch's draws follow from
    its number alone, so that a resumed run repeats them.
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *stream))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *stream: object):
    """A CPU `torch.Generator` for one stream: drawn on the CPU, a seed means the same on every device."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *stream))


# --- device and precision -----------------------------------------------------------------------


def tune_processor() -> None:
    """Have the processor neither clear pages that it has just used nor compute with denormal numbers.

    Every step allocates the tensors of the step before; what glibc gives back in between comes back as pages that the
    kernel has to clear. Adam's moments become denormal where a unit is dead, and then each takes many times as long.
    The price: memory stays at its peak until the process ends, and numbers below 1e-38 are zero. Both are settings of
    the process; threads that run already keep their handling of denormal numbers.
    """
    import torch

    keep_freed_memory(True)
    torch.set_flush_denormal(True)


def keep_freed_memory(keep: bool) -> None:
    """Whether the C library keeps freed blocks of any size. Does nothing where it is not glibc."""
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # the names of the parameters in malloc.h
    # Where not: what glibc comes to by itself once blocks of 32 MiB have been freed, the most that it adapts to.
    mallopt(trim_threshold, 2**31 - 1 if keep else 2**26)
    mallopt(mmap_threshold, 2**25)
    mallopt(mmap_max, 0 if keep else 2**16)
    if not keep:
        malloc_trim(0)


def pick_device(name: str | None):
    """The device asked for, or the first CUDA GPU, else the CPU.

    Raises:
        UserError: the name is no device, or the device is not there.
    """
    import torch

    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(
                f"--device {name}: not there; this machine has {count} CUDA GPU(s). Use --device cpu or leave it out"
            )
        device = torch.device("cuda", device.index or 0)
    return device


def pick_precision(name: str, device) -> str:
    """Resolve "auto" to "bf16" where the processor multiplies bf16 natively, else to "fp32"."""
    if name != "auto":
        return name
    import torch

    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def autocast(device, precision: str):
    """Autocast to bf16, or a context that does nothing for fp32."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def environment(device) -> dict:
    """What a figure depends on beside its command: versions and hardware."""
    import torch

    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{cpu_name()}, {counted(torch.get_num_threads(), 'thread')}"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": str(device),
        "hardware": hardware,
    }


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# --- progress -----------------------------------------------------------------------------------


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line every `interval` seconds.

    `advance(n, note)` takes the note as a function, called only when something is shown: reading a loss
    waits for the device, which the caller must not do at every step.
    """

    def __init__(self, total: int, description: str, unit: str = "img", interval: float = 15.0, enabled: bool = True):
        self.total, self.description, self.unit = total, description, unit
        self.done, self.skipped, self.start, self.enabled = 0, 0, time.monotonic(), enabled
        self.bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=description, unit=unit, unit_scale=True, leave=False)
        self.interval = 0.5 if self.bar is not None else interval
        self.shown = self.start

    def advance(self, n: int, note: Callable[[], str] = str) -> None:
        self.done += n
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.update(n)
        now = time.monotonic()
        if now - self.shown < self.interval:
            return
        self.shown = now
        if self.bar is not None:
            self.bar.set_postfix_str(note())
            return
        rate = (self.done - self.skipped) / (now - self.start)
        left = (self.total - self.done) / rate
        print(
            f"{self.description}: {self.done:,}/{self.total:,} {self.unit}  {note()}  "
            f"{rate:,.0f} {self.unit}/s  {left:,.0f} s left",
            flush=True,
        )

    def skip(self, n: int) -> None:
        """Count `n` as done before this run."""
        self.done = self.skipped = n
        if self.bar is not None:
            self.bar.initial = self.bar.n = n

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# --- files --------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path):
    """Turn a failure to write `path` within the block into a `UserError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}. Choose a folder you may write to, with room left") from error


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
        raise UserError(f"cannot write {path}: it is no plain file; name another")
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
        raise UserError(f"cannot write {path}: {needed}. Make room or choose another disk")


def check_outputs(*outputs: Path | None, inputs: Iterable[Path] = ()) -> None:
    """`check_writable` of each file that a command will write.

    Raises:
        UserError: as that, or an output would take the place of another or of one of the `inputs`, which are read.
    """
    taken = {os.path.realpath(path): "is read by this command" for path in inputs}
    for path in filter(None, outputs):
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
        raise UserError(
            f"cannot write {path}: a figure in it is not a finite number, so something before it failed"
        ) from None
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected {what}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is no JSON or is damaged; expected {what}") from None
    if not fits(content, shape):
        raise UserError(f"{path}: holds something else; expected {what}")
    return content


def fits(value: object, shape: object) -> bool:
    """Whether a value read back has a shape: a type, where float takes any finite number; [shape] for a list of any
    length; a dict of the keys that it must have at least, but for those whose shape is in a tuple: (shape,)."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            fits(value[key], part[0] if isinstance(part, tuple) else part) if key in value else isinstance(part, tuple)
            for key, part in shape.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(part, shape[0]) for part in value)
    if shape is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, shape)


def resume_path(path: Path) -> Path:
    """Where the resumable state of a run is that will write `path`."""
    return path.parent / f"{path.name}.resume"


def save_checkpoint(path: Path, content: dict) -> None:
    """`torch.save`, whole or not at all."""
    import torch

    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's zip writer reports a full disk as a RuntimeError
            raise OSError(f"{str(error).splitlines()[0]} (is the disk full?)") from error


def load_checkpoint(path: Path, remedy: str = "Make it again or fetch it again") -> dict:
    """Read a file written by `torch.save` onto the CPU, tensors and plain values only.

    Args:
        remedy: what to do about a file that is not what it should be.

    Raises:
        UserError: the file is missing, unreadable, not a checkpoint, or holds objects that could run code; numbers of
            numpy cannot.
    """
    import pickle

    import torch
    from torch.serialization import safe_globals

    path, expected = Path(path), "expected a dict of tensors written by torch.save"
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # a pipe would be waited for
        raise UserError(f"{path}: is no plain file; {expected}")
    try:
        open(path, "rb").close()  # apart: torch.load raises an OSError for a file that is cut short, too
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a file you may read") from None
    try:
        with safe_globals(numpy_values()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        harmful = "GLOBAL" in str(error) or "instantiate" in str(error) or "reduce" in str(error).lower()
        if not harmful:
            raise UserError(f"{path}: is no checkpoint or is damaged; {expected}. {remedy}") from None
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"{path}: holds {found[1] if found else 'objects'}, which could run code; {expected}. Where you trust it, "
            "load it and save its weights alone: torch.save(network.state_dict(), FILE)"
        ) from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        OSError,
        UnicodeDecodeError,
    ):
        raise UserError(f"{path}: is no checkpoint or is damaged; {expected}. {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; {expected}. {remedy}")
    return content


def numpy_values() -> list:
    """What a pickle of numpy's numbers and arrays refers to, for `safe_globals`, under the old and new names of it."""
    import numpy as np

    core = getattr(np, "_core", None) or np.core
    made = [
        (getattr(core.multiarray, name), f"{package}.multiarray.{name}")
        for package in ("numpy.core", "numpy._core")
        for name in ("scalar", "_reconstruct")
    ]
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?U"}
    return [*made, np.ndarray, np.dtype, *kinds]


def check_finite(path: Path, values: dict, remedy: str) -> None:
    """Raise `UserError` naming the first of the tensors or numbers read from `path` that is not finite throughout."""
    import torch

    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            bad = int((~value.isfinite()).sum()) if value.is_floating_point() else 0
            if bad:
                raise UserError(f"{path}: {bad:,} of the {value.numel():,} values of {name} are not finite. {remedy}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: {name} is {value}, expected a finite number. {remedy}")
