"""One epoch loop for every network: order, precision, several processes, resume, interruption.

All random numbers of an epoch are drawn on the CPU before it starts, from streams that follow from the
seed and the epoch's number alone, and dropout is seeded at every step: a run that was stopped anywhere
repeats the very numbers of one that was not, and no generator state has to be saved.
"""

from __future__ import annotations

import json
import math
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from cli.errors import Stopped, UserError, handling
from cli.files import fits, writing
from cli.progress import Progress
from datasets.datasetsHelper import Images
from training.config import LoopConfig
from training.processes import Processes
from utils import autocast, check_finite, derive_seed, generator, load_checkpoint, save_checkpoint

STATE = {
    "identity": dict,
    "model": dict,
    "optimizer": dict,
    "step": int,
    "history": [dict],
    "losses": list,
    "sums": dict,
}
STEPS_BETWEEN_STOP_CHECKS = 20  # with several processes, which have to agree


class Objective(Protocol):
    """What is minimised, and the random numbers it needs."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The random numbers for one pass over `count` images, one row per image."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *draws: Tensor) -> dict[str, Tensor]:
        """Means over the batch; "loss" is minimised, the others are reported. `images` are uint8 [B, C, S, S]."""


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Where a run leaves traces; nothing here changes its result.

    Attributes:
        name: of the run, in progress lines.
        resume: file of the resumable state, or None to keep none.
        save_every: epochs between two resumable states.
        identity: what a run that is resumed must have in common with this one, beside its configuration.
        log: file of one JSON line per epoch, or None.
        watch: called with every such line.
    """

    name: str
    resume: Path | None = None
    save_every: int = 1
    identity: dict | None = None
    log: Path | None = None
    watch: Callable[[dict], None] = lambda line: None


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Images,
    objective: Objective,
    config: LoopConfig,
    processes: Processes,
    recorder: Recorder,
    compile_model: bool = False,
    schedule: Callable[[float], float] | None = None,
) -> list[dict]:
    """Train `model` in place; return one dict of mean losses per epoch.

    `model` and `data` are on the device of this process already. `schedule` gives the learning rate of a step from
    the epochs behind it (2.5: in the middle of the third); it has no state, so that a resumed run follows it exactly.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        UserError: the loss is not finite, the saved state belongs to another run, or the network cannot be compiled.
    """
    steps_per_epoch = -(-len(data) // config.batch_size)
    state = RunState(model, optimizer, config, recorder, processes, steps_per_epoch)
    state.resume()
    network = processes.wrap(torch.compile(model) if compile_model else model)
    progress = Progress(config.epochs * len(data), recorder.name, enabled=processes.is_main)
    progress.skip(min(state.step * config.batch_size, progress.total))
    with noting_signals() as received, naming_compiler() if compile_model else nullcontext():
        while state.epoch < config.epochs:
            _run_epoch(network, optimizer, data, objective, config, processes, state, progress, received, schedule)
    progress.close()
    return state.history


def _run_epoch(network, optimizer, data, objective, config, processes, state, progress, received, schedule) -> None:
    """Run from `state.step` to the end of its epoch and record the epoch's means."""
    device, epoch, count = processes.device, state.epoch, len(data)
    order = torch.randperm(count, generator=generator(config.seed, "order", epoch)).to(device)
    draws = [d.to(device) for d in objective.draw(count, generator(config.seed, "draws", epoch))]
    started, first = time.monotonic(), state.step_in_epoch
    network.train()
    for step in range(first, state.steps_per_epoch):
        _check_stop(received, step, processes, state)
        start, stop_row = step * config.batch_size, min((step + 1) * config.batch_size, count)
        rows, weight = processes.share(torch.arange(start, stop_row, device=device))
        batch = data.at(order[rows])
        torch.manual_seed(derive_seed(config.seed, "dropout", epoch, step, processes.rank))
        optimizer.zero_grad(set_to_none=True)  # before the forward pass, which needs the memory
        try:
            with autocast(device, config.precision):
                means = objective(network, batch.images, batch.labels, *(d[rows] for d in draws))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"a batch of {len(rows)} image cannot be normalised: choose a --batch-size with a larger last batch"
            ) from None
        if schedule:
            for group in optimizer.param_groups:
                group["lr"] = schedule(state.step / state.steps_per_epoch)
        (means["loss"] * weight).backward()
        optimizer.step()
        state.add({name: value.detach() * weight for name, value in means.items()}, stop_row - start)
        progress.advance(stop_row - start, lambda: f"epoch {epoch + 1}/{config.epochs}  loss {state.latest_loss():.4f}")
    state.end_epoch(count, (count - first * config.batch_size) / max(time.monotonic() - started, 1e-9))


def _check_stop(received: list[int], step: int, processes: Processes, state: RunState) -> None:
    if processes.world > 1 and step % STEPS_BETWEEN_STOP_CHECKS:
        return
    if processes.any(bool(received)):
        state.save()
        where = (
            f"the state is saved in {state.recorder.resume}: the same command goes on from there"
            if state.recorder.resume
            else "nothing is saved"
        )
        raise Stopped(f"stopped in epoch {state.epoch + 1}, {where}", received[-1] if received else signal.SIGTERM)


class RunState:
    """Where a run stands: its step, the losses of the epoch under way, the epochs behind it."""

    def __init__(
        self, model, optimizer, config: LoopConfig, recorder: Recorder, processes: Processes, steps_per_epoch: int
    ):
        self.model, self.optimizer, self.config = model, optimizer, config
        self.recorder, self.processes, self.steps_per_epoch = recorder, processes, steps_per_epoch
        self.step = 0
        self.history: list[dict] = []
        self.losses: list[Tensor] = []  # of this epoch's steps, on the device
        self.sums: dict[str, Tensor] = {}  # of this epoch, each mean times the images it is over

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        return self.step % self.steps_per_epoch

    def add(self, means: dict[str, Tensor], count: int) -> None:
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0) + value.double() * count
        self.losses.append(means["loss"])
        self.step += 1

    def latest_loss(self) -> float:
        """The last step's loss. This waits for the device, and stops a run of one process whose loss is not finite:
        several find out together, at the end of the epoch, since only the main one shows its loss."""
        loss = self.losses[-1].item()
        if self.processes.world == 1 and not math.isfinite(loss):
            self.check_finite()
        return loss

    def check_finite(self) -> None:
        """Raise `UserError` naming the first step of the epoch whose loss is not finite."""
        if not self.losses:
            return
        losses = self.processes.mean(torch.stack(self.losses))
        bad = (~torch.isfinite(losses)).nonzero().flatten()
        if len(bad):
            index = int(bad[0])
            kept = (
                f" The last good state is kept in {self.recorder.resume}."
                if self.recorder.resume and self.recorder.resume.exists()
                else ""
            )
            step = self.step - len(self.losses) + index + 1
            raise UserError(
                f"the loss is {losses[index].item()} at step {step} (epoch {(step - 1) // self.steps_per_epoch + 1}): "
                f"lower --lr, or use --precision fp32.{kept}"
            )

    def end_epoch(self, count: int, images_per_second: float) -> None:
        """Close the epoch that has just been completed: check it, record it, save the state."""
        self.check_finite()
        line = {"epoch": self.epoch}
        line |= {name: self.processes.mean(total).item() / count for name, total in self.sums.items()}
        line |= {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": round(images_per_second, 1),
        }
        line["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.history.append(line)
        self.losses, self.sums = [], {}
        if self.processes.is_main:
            self.recorder.watch(line)
            if self.recorder.log:
                with writing(self.recorder.log), open(self.recorder.log, "a") as log:
                    log.write(json_line(line))
        if self.epoch % self.recorder.save_every == 0 or self.epoch == self.config.epochs:
            self.save()

    def identity(self) -> dict:
        # More epochs only go on; everything else would make another result.
        return {k: v for k, v in asdict(self.config).items() if k != "epochs"} | (self.recorder.identity or {})

    def save(self) -> None:
        """Write the resumable state, whole or not at all; one with a loss or weights that are not finite never."""
        self.check_finite()
        check_weights(self.model, self.epoch)
        if self.losses:  # the same on every process, so that one file can restore all
            self.losses = list(self.processes.mean(torch.stack(self.losses)))
            self.sums = {name: self.processes.mean(total) for name, total in self.sums.items()}
        if self.recorder.resume and self.processes.is_main:
            save_checkpoint(
                self.recorder.resume,
                {
                    "identity": self.identity(),
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "step": self.step,
                    "history": self.history,
                    "losses": self.losses,
                    "sums": self.sums,
                },
            )
        self.processes.barrier()

    def resume(self) -> None:
        """Go on from the saved state, if there is one; write the log's lines up to there.

        Raises:
            UserError: the state is damaged, of another configuration, or beyond the epochs asked for.
        """
        path = self.recorder.resume
        if path and path.exists():
            remedy = "Start over with --restart"
            saved = load_checkpoint(path, remedy)
            if not fits(saved, STATE):
                raise UserError(f"{path}: is not a state of a training. {remedy}")
            if saved["identity"] != self.identity():
                theirs, ours = saved["identity"], self.identity()
                differ = [
                    f"{k} was {theirs.get(k)}, is {ours.get(k)}"
                    for k in sorted(theirs.keys() | ours.keys())
                    if theirs.get(k) != ours.get(k)
                ]
                raise UserError(
                    f"{path} holds the state of a different run ({'; '.join(differ)}). "
                    "Give the same options to resume it, or --restart to start over"
                )
            begun = -(-saved["step"] // self.steps_per_epoch)
            if begun > self.config.epochs:
                raise UserError(
                    f"{path} holds a run in or after its epoch {begun}, but --epochs is {self.config.epochs}. "
                    f"Ask for {begun} epochs or more, or --restart to start over"
                )
            check_finite(path, saved["model"], remedy)
            device = self.processes.device
            try:
                self.model.load_state_dict(saved["model"])
                self.optimizer.load_state_dict(saved["optimizer"])
                self.losses = [loss.to(device) for loss in saved["losses"]]
                self.sums = {name: value.to(device) for name, value in saved["sums"].items()}
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                reason = str(error).partition("\n")[0]
                raise UserError(f"{path}: is not a state of this training ({reason}). {remedy}") from None
            self.step, self.history = saved["step"], saved["history"]
            if self.processes.is_main:
                print(
                    f"{self.recorder.name}: resuming at epoch {self.epoch + 1}, step {self.step_in_epoch}, from {path}",
                    flush=True,
                )
        if self.recorder.log and self.processes.is_main:
            with writing(self.recorder.log):
                self.recorder.log.parent.mkdir(parents=True, exist_ok=True)
                self.recorder.log.write_text("".join(map(json_line, self.history)))


def check_weights(model: nn.Module, epoch: int) -> None:
    """Raise `UserError` where training has left weights that are not finite, though the losses up to there were."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{name} is not finite any more in epoch {epoch}: lower --lr, or use --precision fp32; nothing is saved"
            )


def json_line(line: dict) -> str:
    """An epoch's figures as a line of a log; one that is not finite, which no JSON can hold, as null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def warmup_schedule(config: LoopConfig, count: int) -> Callable[[float], float] | None:
    """The schedule of `fit` that rises linearly over `warmup_steps`, if there are any, and stays, for `count` training
    images."""
    if not config.warmup_steps:
        return None
    steps_per_epoch = -(-count // config.batch_size)
    return lambda epochs: config.learning_rate * min(1.0, (epochs * steps_per_epoch + 1) / config.warmup_steps)


@contextmanager
def naming_compiler() -> Iterator[None]:
    """Turn a failure of torch.compile within the block, which compiles when the network is first used, into a
    `UserError`."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise UserError(
            f"--compile: the network cannot be compiled ({str(error).splitlines()[0]}). On a CPU it needs a C++ "
            "compiler such as g++: install one, or leave out --compile"
        ) from None


@contextmanager
def noting_signals() -> Iterator[list[int]]:
    """Within the block the stop signals end nothing: the list that is given holds those that came."""
    received: list[int] = []
    with handling(lambda signum, frame: received.append(signum)):
        yield received


def fingerprint(data: Images) -> int:
    """A checksum of images and labels, by which a resumed run knows its data."""
    return zlib.crc32(data.labels.numpy().tobytes(), zlib.crc32(data.images.numpy().tobytes()))
