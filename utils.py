"""What all computing shares: seeds and generators, device and precision, checkpoint files.

What the command line shares (errors, options, files, progress) is in `cli`, which imports no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import pickle
import platform
import re
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.serialization import safe_globals

from cli.errors import MemoryShortage, UserError
from cli.files import replacing
from cli.progress import counted

# --- seeds --------------------------------------------------------------------------------------


def derive_seed(seed: int, *stream: object) -> int:
    """A 63-bit seed of its own for every named stream, such as (123, "order", epoch).

    Streams are independent: drawing more from one never shifts another, and an epoch's draws follow from
    its number alone, so that a resumed run repeats them.
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *stream))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *stream: object) -> torch.Generator:
    """A CPU `torch.Generator` for one stream: drawn on the CPU, a seed means the same on every device."""
    return torch.Generator().manual_seed(derive_seed(seed, *stream))


# --- device and precision -----------------------------------------------------------------------


def tune_processor() -> None:
    """Have the processor neither clear pages that it has just used nor compute with denormal numbers, and a GPU's
    convolutions in fp32 keep all its digits, where torch's default is TF32 with 10 bits.

    Every step allocates the tensors of the step before; what glibc gives back in between comes back as pages that the
    kernel has to clear. Adam's moments become denormal where a unit is dead, and then each takes many times as long.
    The price: memory stays at its peak until the process ends, and numbers below 1e-38 are zero. Both are settings of
    the process; threads that run already keep their handling of denormal numbers.
    """
    keep_freed_memory(True)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.allow_tf32 = False


def keep_freed_memory(keep: bool) -> None:
    """Whether the C library keeps freed blocks of any size. Does nothing where it is not glibc."""
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # the names of the parameters in malloc.h
    # Otherwise: what glibc arrives at by itself once blocks of 32 MiB have been freed, the most that it adapts to.
    mallopt(trim_threshold, 2**31 - 1 if keep else 2**26)
    mallopt(mmap_threshold, 2**25)
    mallopt(mmap_max, 0 if keep else 2**16)
    if not keep:
        malloc_trim(0)


def start_computing(name: str | None) -> torch.device:
    """`tune_processor` and `pick_device`: how every command that computes begins."""
    tune_processor()
    return pick_device(name)


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the first CUDA GPU, else the CPU.

    Raises:
        UserError: the name is no device, or the device is not there.
    """
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"--device {name}: no such GPU; this machine has {count}. Use --device cpu or leave it out")
        device = torch.device("cuda", device.index or 0)
    return device


def pick_precision(name: str, device: torch.device, of_task: str = "auto") -> str:
    """Resolve "auto" to "bf16" where the processor multiplies bf16 natively, else to "fp32"."""
    name = of_task if name == "auto" else name
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to bf16, or a context that does nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def environment(device: torch.device) -> dict:
    """What a result depends on beside its command: versions and hardware."""
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


# --- memory -------------------------------------------------------------------------------------


def check_memory(needed: int, device: torch.device | None, what: str) -> None:
    """Find out before `needed` bytes of a device, or of the processor, are filled, as `what`, whether they are there.

    A system that promises more memory than it has does not refuse: it ends the process, or others.

    Raises:
        MemoryShortage: they are not, as far as the system tells.
    """
    if needed < 2**28:  # not worth asking
        return
    free = free_memory(device or torch.device("cpu"))
    if free is not None and needed > free:
        raise MemoryShortage(
            f"not enough memory: {what} would take {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors may still take on a device, or None where the system does not tell."""
    if device.type == "cuda":
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


# --- checkpoints --------------------------------------------------------------------------------


def save_checkpoint(path: Path, content: dict) -> None:
    """`torch.save`, whole or not at all."""
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
    path, expected = Path(path), "expected a dict of tensors written by torch.save"
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # a pipe would be waited for
        raise UserError(f"{path}: is not a plain file; {expected}")
    try:
        open(path, "rb").close()  # apart: torch.load raises an OSError for a file that is cut short, too
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a file that you may read") from None
    try:
        check_sums(path)
        with safe_globals(numpy_values()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they are about is refused in one line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        harmful = "GLOBAL" in str(error) or "instantiate" in str(error) or "reduce" in str(error).lower()
        if not harmful:
            raise UserError(f"{path}: is not a checkpoint or is damaged; {expected}. {remedy}") from None
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
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if "TorchScript" in str(error):
            raise UserError(f"{path}: holds a TorchScript program; {expected}: save its state_dict()") from None
        raise UserError(f"{path}: is not a checkpoint or is damaged; {expected}. {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; {expected}. {remedy}")
    return content


def check_sums(path: Path) -> None:
    """Compare the checksums of the archive that `torch.save` writes, which `torch.load` does not: a bit that a disk has
    lost is another weight. Raises `BadZipFile`."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)


def numpy_values() -> list:
    """What a pickle of numpy's numbers and arrays refers to, for `safe_globals`, under the old and new names of it."""
    core = getattr(np, "_core", None) or np.core
    made = [
        (getattr(core.multiarray, name), f"{package}.multiarray.{name}")
        for package in ("numpy.core", "numpy._core")
        for name in ("scalar", "_reconstruct")
    ]
    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?U"}
    return [*made, np.ndarray, np.dtype, *kinds]


def oddity(value: torch.Tensor) -> str:
    """What keeps a tensor that was read from being an ordinary one of numbers, or nothing."""
    if value.is_meta:
        return "is without values"
    if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_complex():
        return f"is {'nested' if value.is_nested else value.layout} of {value.dtype}".replace("torch.", "")
    repeated = value.numel() * value.element_size() > value.untyped_storage().nbytes()
    return "shows more values than it holds" if repeated else ""


def check_values(path: Path, values: dict, remedy: str) -> None:
    """Raise `UserError` naming the first of the tensors or numbers read from `path` that is not finite throughout, is a
    variance below 0, or is no ordinary tensor: sparse, quantized, complex, without values or with few values repeated.
    """
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            if odd := oddity(value):
                raise UserError(f"{path}: the tensor {name} {odd}; expected an ordinary one of real numbers. {remedy}")
            if not value.is_floating_point():
                continue
            value = value if value.element_size() > 1 else value.float()  # torch compares no numbers of 8 bits
            if bad := int((~value.isfinite()).sum()):
                raise UserError(f"{path}: {bad:,} of the {value.numel():,} values of {name} are not finite. {remedy}")
            if str(name).endswith("running_var") and (value < 0).any():
                raise UserError(f"{path}: {name} holds variances below 0. {remedy}")
            if str(name).rpartition(".")[2] == "std" and (value <= 0).any():
                raise UserError(f"{path}: {name} holds deviations that are not above 0. {remedy}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: {name} is {value}, expected a finite number. {remedy}")
