"""What every training command has around the loop: its options, whether it is done already, where its figures go.

Imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
from collections.abc import Callable
from pathlib import Path

from training.options import option
from utils import UserError, check_outputs, check_writable, counted, positive_int, resume_path

IMAGES_PER_STATE = 5000  # at least, by default: writing the state would take longer than the epochs of a small data set


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that change no result: what is kept, shown and compiled."""
    parser.add_argument(
        "--save-every",
        type=positive_int,
        help=f"epochs between resumable states (default: 1, or as many as {IMAGES_PER_STATE:,} images take)",
    )
    parser.add_argument("--restart", action="store_true", help="start over, ignoring what an earlier run left")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--log", type=Path, help="write one JSON line per epoch to this file")
    parser.add_argument("--tensorboard", type=Path, help="write the same figures there for TensorBoard")


Needs = dict[str, tuple[str, tuple[str, ...]]]  # an option -> another, and the values of it with which it counts


def idle_options(args: argparse.Namespace, parser: argparse.ArgumentParser, needs: Needs) -> list[str]:
    """A remark on each option that was changed although nothing that was asked for looks at it."""
    remarks = []
    for name, (other, values) in needs.items():
        given = getattr(args, other)
        counts = set(values) & set(given if isinstance(given, list) else [given])
        if getattr(args, name) != parser.get_default(name) and not counts:
            remarks.append(f"{option(name)} goes with {option(other)} {' or '.join(values)} only")
    return remarks


def refuse_idle_options(args: argparse.Namespace, parser: argparse.ArgumentParser, needs: Needs) -> None:
    """Raise `UserError` with the first remark of `idle_options`, if there is one."""
    for remark in idle_options(args, parser, needs):
        raise UserError(f"{remark}; leave it out")


def is_done(path: Path, origin: dict, args: argparse.Namespace, show: bool) -> bool:
    """Whether `path` holds the result of this very run already (`show` says so); with --restart, forget it.

    With --precision auto, a result in either precision will do.

    Raises:
        UserError: it holds something else, which would be lost.
    """
    resume = resume_path(path)
    if args.restart:
        check_outputs(path, resume, args.log)
        resume.unlink(missing_ok=True)
        return False
    from training.checkpoints import origin_of, read_state

    if os.path.exists(resume) or not os.path.isfile(path):  # unlike Path's, no errors where a name cannot be
        return False
    theirs = origin_of(read_state(path, f"what {origin['command']} makes", "Replace it with --restart"))
    decided = {key: value for key, value in origin.items() if key != "precision" or args.precision != "auto"}
    differ = [f"{key} was {theirs.get(key)}, is {value}" for key, value in decided.items() if theirs.get(key) != value]
    if differ:
        raise UserError(
            f"{path} exists and was made otherwise ({'; '.join(differ)}). "
            "Name another --params-dict-name, or replace it with --restart"
        )
    if show:
        print(f"{path} is complete already; --restart trains it anew")
    return True


def train_to_checkpoint(
    path: Path,
    model,
    optimizer,
    data,
    objective,
    *,
    config,
    what: dict,
    about: str,
    copies: int,
    processes,
    args: argparse.Namespace,
    schedule: Callable[[float], float] | None = None,
) -> bool:
    """Train `model`, on its device already, from where an earlier run stopped, and write its state dict to `path`.

    Args:
        data, objective, config, processes, schedule: of `training.loop.fit`.
        what: the run is, beside its configuration: recorded, and compared when it is resumed.
        about: the same in words, for the line that is printed first.
        copies: a resumable state holds so many times the network's bytes: itself and the optimizer's moments.
        args: the options of `add_run_arguments`.

    Returns:
        whether this process is the one that reports.

    Raises:
        UserError: as `fit`; a file cannot be written, or there is no room for it.
    """
    from dataclasses import asdict

    import torch

    from training.checkpoints import save_network
    from training.loop import Recorder, fit

    resume = resume_path(path)
    if processes.is_main:
        remove_leftovers(path)
    # An old state stays until the new one is complete.
    room = copies * (1 if os.path.exists(resume) else 2) * sum(t.nbytes for t in model.state_dict().values())
    check_writable(path, room)
    check_outputs(path, resume, args.log)
    if processes.is_main:
        print(
            f"{about}, {counted(len(data), 'image')}, {counted(config.epochs, 'epoch')} on {processes.device} in "
            f"{config.precision}",
            flush=True,
        )
    recorder = Recorder(
        name=what["command"],
        resume=resume,
        save_every=args.save_every or -(-IMAGES_PER_STATE // len(data)),
        identity=what,
        log=args.log,
        watch=tensorboard_writer(args.tensorboard if processes.is_main else None),
    )
    fit(model, optimizer, data.to(processes.device), objective, config, processes, recorder, args.compile, schedule)
    if processes.is_main:
        save_network(path, model, what | asdict(config) | {"torch": str(torch.__version__)})
        resume.unlink(missing_ok=True)
    return processes.is_main


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of a run that was killed while it wrote `path` or its resumable state."""
    ours = re.compile(rf"\.{re.escape(path.name)}(\.resume)?\.[a-z0-9_]{{8}}")  # as `replacing` names them
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if ours.fullmatch(leftover.name) and leftover.is_file():
            leftover.unlink(missing_ok=True)  # another process may be at the same


def tensorboard_writer(folder: Path | None) -> Callable[[dict], None]:
    """A function that writes an epoch's line for TensorBoard, or does nothing without a folder."""
    if folder is None:
        return lambda line: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: tensorboard is not installed; pip install tensorboard, or use --log") from None
    check_writable(folder / "events")
    writer = SummaryWriter(folder)

    def write(line: dict) -> None:
        for name, value in line.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, line["epoch"])
        writer.flush()

    return write


def format_figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
