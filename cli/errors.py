"""What every command does around its work: errors as one line, stop signals, exit status."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial


class UserError(Exception):
    """Something the user can fix: the message says what is wrong, what was expected, what to do."""


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

    Returns the exit status: what `main` returns, or 0; 2 for a `UserError` (as argparse's own) and where memory ran
    out, 128 + n when stopped by signal n.
    """
    if sys.stderr is None:  # closed: there is nobody to tell
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # no character that a terminal lacks is worth losing a result
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser.error = partial(_refuse, parser)
    args = parser.parse_args(argv)
    if sys.stdout is None:
        message = "standard output is closed, and what is printed would be lost: redirect it to a file or to /dev/null"
        parser.exit(2, f"{parser.prog}: error: {message}\n")
    args.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with handling(raise_stopped), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of an image file is said by us
            logging.getLogger("PIL").setLevel(logging.CRITICAL)
            warnings.filterwarnings("ignore", message="Validating sparse tensor")  # torch.load's; we refuse such a file
            status = main(args) or 0
            sys.stdout.flush()  # what cannot be written is better known here than when Python ends
            return status
    except UserError as error:
        complain(f"{parser.prog}: error: {printable(str(error))}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if (shortage := memory_shortage(error)) is None:
            raise
        complain(f"{parser.prog}: error: {shortage}; {less_memory(parser)}")
        return 2
    except ImportError as error:
        if "failed to map segment" not in str(error):
            raise
        complain(f"{parser.prog}: error: not enough memory to load {error}")
        return 2
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as SIGPIPE ends a process
    except OSError as error:  # the system's own: a closed folder, a name too long, a full disk
        if error.errno is None:
            raise
        what = f"{error.filename or 'standard output, or a file on the way'}: {error.strerror}"
        complain(f"{parser.prog}: error: {printable(str(what))}")
        return 2
    except Stopped as stop:
        complain(f"{parser.prog}: {stop}")
        return 128 + stop.signum


def _refuse(parser: argparse.ArgumentParser, message: str) -> None:
    """argparse's own `error` without the usage, which would hide the message behind twenty lines."""
    parser.exit(2, f"{parser.prog}: error: {printable(message)}; --help lists the options\n")


def complain(text: str) -> None:
    """Print a line to standard error, where that is possible."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # full, or closed by its reader: no reason to lose what is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


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
    return f"not enough {where}" + (f": {amount[1]} more was needed" if amount else "")


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
