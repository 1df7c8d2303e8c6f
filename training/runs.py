"""What every training command has around the loop: whether it is done already, where its metrics go, what it leaves."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from cli.errors import UserError
from cli.files import check_outputs, check_writable
from cli.progress import counted
from datasets.datasetsHelper import Images
from training.checkpoints import origin_of, read_state, save_network
from training.config import IMAGES_PER_STATE, LoopConfig, RunOptions, resume_path
from training.loop import Objective, Recorder, fit
from training.processes import Processes


def is_done(path: Path, origin: dict, options: RunOptions, any_precision: bool, show: bool) -> bool:
    """Whether `path` holds the result of this very run already (`show` says so); with --restart, forget it.

    With `any_precision`, as --precision auto has it, a result in either will do.

    Raises:
        UserError: it holds something else, which would be lost.
    """
    resume = resume_path(path)
    if options.restart:
        check_outputs(path, resume, options.log)
        resume.unlink(missing_ok=True)
        return False
    if os.path.exists(resume) or not os.path.isfile(path):  # unlike Path's, no errors where a name cannot be
        return False
    theirs = origin_of(read_state(path, f"what {origin['command']} makes", "Replace it with --restart"))
    decided = {key: value for key, value in origin.items() if key != "precision" or not any_precision}
    differ = [f"{key} was {theirs.get(key)}, is {value}" for key, value in decided.items() if theirs.get(key) != value]
    if differ:
        raise UserError(
            f"{path} exists and was made with other options ({'; '.join(differ)}). "
            "Name another --params-dict-name, or replace it with --restart"
        )
    if show:
        print(f"{path} is already complete; --restart trains it again")
    return True


def train_to_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Images,
    objective: Objective,
    *,
    config: LoopConfig,
    what: dict,
    about: str,
    moments: int,
    processes: Processes,
    options: RunOptions,
    schedule: Callable[[float], float] | None = None,
    finish: Callable[[nn.Module], None] = lambda model: None,
) -> bool:
    """Train `model`, on its device already, from where an earlier run stopped, and write its state dict to `path`.

    Args:
        data, objective, config, processes, schedule: of `training.loop.fit`.
        what: the run is, beside its configuration: recorded, and compared when it is resumed.
        about: the same in words, for the line that is printed first.
        moments: tensors that the optimizer keeps for each parameter, of its size.
        options: what is kept, shown and compiled.
        finish: makes of the trained model, in place, the network of the checkpoint.

    Returns:
        whether this process is the one that reports.

    Raises:
        UserError: as `fit`; a file cannot be written, or there is no room for it.
    """
    resume = resume_path(path)
    if processes.is_main:
        remove_leftovers(path)
    state = sum(t.nbytes for t in model.state_dict().values()) + moments * sum(p.nbytes for p in model.parameters())
    check_writable(path, state * (1 if os.path.exists(resume) else 2))  # an old one stays until the new one is complete
    check_outputs(path, resume, options.log)
    if processes.is_main:
        print(
            f"{about}, {counted(len(data), 'image')}, {counted(config.epochs, 'epoch')} on {processes.device} in "
            f"{config.precision}",
            flush=True,
        )
    recorder = Recorder(
        name=what["command"],
        resume=resume,
        save_every=options.save_every or -(-IMAGES_PER_STATE // len(data)),
        identity=what,
        log=options.log,
        watch=tensorboard_writer(options.tensorboard if processes.is_main else None),
    )
    fit(model, optimizer, data.to(processes.device), objective, config, processes, recorder, options.compile, schedule)
    finish(model)
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


def format_metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
