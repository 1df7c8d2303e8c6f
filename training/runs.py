"""What every training command has around the loop: whether it is done already, where its metrics go, what it leaves."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from cli.errors import UserError
from cli.files import check_outputs, check_writable
from cli.options import Machine
from cli.progress import counted
from datasets.datasetsHelper import Images, load_ind, split_validation
from datasets.obtain import files_read
from datasets.tasks import Experiment
from training.checkpoints import origin_of, read_state, save_network
from training.config import LoopConfig, RunOptions, resume_path
from training.loop import Objective, fingerprint, fit
from training.processes import Processes, joined_processes
from training.run_state import Recorder
from utils import derive_seed, pick_precision


def is_done(path: Path, origin: dict, options: RunOptions, any_precision: bool, show: bool) -> bool:
    """Whether `path` holds the result of this very run already (`show` says so); with --restart, forget it.

    With `any_precision`, as --precision auto has it, a result in either will do.

    Raises:
        UserError: it holds something else, which would be lost.
    """
    resume = resume_path(path)
    if options.restart:
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


@dataclass(frozen=True, kw_only=True)
class Training:
    """A network to be trained: all that differs from one training command to another.

    Attributes:
        command: its name.
        about: which network it is, in words.
        what: what decides the network beside the loop and the images, with "val_fraction" among it: recorded, and
            compared when the run is resumed.
        build: the network as the training starts from it; what is random follows from torch's seed.
        optimizer: (network, learning rate) -> optimizer; freezes what is not trained.
        moments: tensors that the optimizer keeps for each parameter, of its size.
        objective: of `training.loop.fit`.
        report: (network in eval mode, test images, precision) -> what is printed in the end.
        schedule: (loop, number of training images) -> of `training.loop.fit`.
        encode: (images, precision, device) -> what the network sees in their place.
        start: takes from what the network sees all that it needs to know before the first step.
        compact, expand: bring the network into the form in which it is trained, and back, both in place.
        whole_batches: whether each of several processes needs images of every batch.
        reads: checkpoints that it starts from, which nothing may be written over.
    """

    command: str
    about: str
    what: dict
    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    moments: int
    objective: Objective
    report: Callable[[nn.Module, Images, str], str]
    schedule: Callable[[LoopConfig, int], Callable[[float], float] | None]
    encode: Callable[[Images, str, torch.device], Images] = lambda images, precision, device: images
    start: Callable[[nn.Module, Images], None] = lambda model, images: None
    compact: Callable[[nn.Module], None] = lambda model: None
    expand: Callable[[nn.Module], None] = lambda model: None
    whole_batches: bool = False
    reads: tuple[Path, ...] = ()


def train(
    training: Training,
    experiment: Experiment,
    path: Path,
    loop: dict[str, object],
    options: RunOptions,
    machine: Machine,
) -> None:
    """Train a network from where an earlier run stopped, in this process or as one of torchrun's, write its state dict
    to `path`, and print what it reaches.

    Args:
        loop: fields of `LoopConfig`, all but the precision.

    Raises:
        UserError: as `fit`; the images cannot be read; a file cannot be written, or there is no room for it.
    """
    with joined_processes(machine.device) as processes:
        precision = pick_precision(machine.precision, processes.device, experiment.task.precision)
        config = LoopConfig(precision=precision, **loop)
        read_files = partial(files_read, experiment, machine.data_dir)
        check_outputs(options.log, images=read_files)
        images, test_images = load_ind(experiment, machine.data_dir)
        images, _ = split_validation(images, training.what["val_fraction"])
        what = training.what | {"command": training.command, "data": fingerprint(images)}
        if options.restart:  # before anything is forgotten
            check_outputs(path, resume_path(path), options.log, inputs=training.reads, images=read_files)
        if is_done(path, what | asdict(config), options, machine.precision == "auto", show=processes.is_main):
            return
        if training.whole_batches and 0 < len(images) % config.batch_size < processes.world:
            raise UserError(
                f"--batch-size {config.batch_size}: the last batch of an epoch has fewer images than there are "
                f"processes ({processes.world}); choose another size"
            )
        images = training.encode(images, precision, processes.device)
        torch.manual_seed(derive_seed(config.seed, "initialisation", training.command))
        model = training.build().to(processes.device, memory_format=torch.channels_last)
        training.start(model, images)
        training.compact(model)
        _fit_to_checkpoint(training, model, images, what, path, config, options, processes)
        if processes.is_main:
            test_images = training.encode(test_images, precision, processes.device).to(processes.device)
            print(training.report(model.eval(), test_images, precision))
            print(f"wrote {path}")


def _fit_to_checkpoint(
    training: Training,
    model: nn.Module,
    images: Images,
    what: dict,
    path: Path,
    config: LoopConfig,
    options: RunOptions,
    processes: Processes,
) -> None:
    """The part of `train` between the untrained network, on its device, and the checkpoint."""
    resume, optimizer = resume_path(path), training.optimizer(model, config.learning_rate)
    if processes.is_main:
        remove_leftovers(path)
    moments = training.moments * sum(p.nbytes for p in model.parameters())
    state = sum(t.nbytes for t in model.state_dict().values()) + moments
    check_writable(path, state * (1 if os.path.exists(resume) else 2))  # an old one stays until the new one is complete
    check_outputs(path, resume, options.log, inputs=training.reads)
    if processes.is_main:
        print(
            f"{training.about}, {counted(len(images), 'image')}, {counted(config.epochs, 'epoch')} on "
            f"{processes.device} in {config.precision}",
            flush=True,
        )
    recorder = Recorder(
        name=training.command,
        resume=resume,
        save_every=options.save_every,
        identity=what,
        log=options.log,
        watch=tensorboard_writer(options.tensorboard if processes.is_main else None),
    )
    schedule = training.schedule(config, len(images))
    images = images.to(processes.device)
    fit(model, optimizer, images, training.objective, config, processes, recorder, options.compile, schedule)
    training.expand(model)
    if processes.is_main:
        save_network(path, model, what | asdict(config) | {"torch": str(torch.__version__)})
        resume.unlink(missing_ok=True)


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
