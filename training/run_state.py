"""Where a training stands, and its resumable state: saved, checked when it is read, and gone on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cli.errors import UserError
from cli.files import fits, writing
from training.checkpoints import is_plain
from training.config import LoopConfig
from training.processes import Processes
from utils import check_values, load_checkpoint, oddity, save_checkpoint


def is_number(value: object) -> bool:
    """A tensor of one number, without dimensions."""
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


STATE = {
    "identity": lambda value: isinstance(value, dict) and is_plain(value),
    "model": dict,
    "optimizer": dict,
    "step": lambda value: fits(value, int) and value >= 0,
    "history": [lambda line: isinstance(line, dict) and is_plain(line)],
    "losses": [is_number],
    "sums": lambda value: isinstance(value, dict) and all(map(is_number, value.values())),
}


SAVING = 0.05  # the share of a run's time that its resumable states may take, where nothing else is asked for


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Where a run leaves traces; nothing here changes its result.

    Attributes:
        name: of the run, in progress lines.
        resume: file of the resumable state, or None to keep none.
        save_every: epochs between two resumable states, or None: after an epoch whenever all that writing has taken so
            far is at most `SAVING` of the time.
        identity: what a run that is resumed must have in common with this one, beside its configuration.
        log: file of one JSON line per epoch, or None.
        watch: called with every such line.
    """

    name: str
    resume: Path | None = None
    save_every: int | None = None
    identity: dict | None = None
    log: Path | None = None
    watch: Callable[[dict], None] = lambda line: None


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
        self.started, self.spent_saving = time.monotonic(), 0.0

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
                f"lower --lr, or what else was raised{self.or_fp32()}.{kept}"
            )

    def or_fp32(self) -> str:
        """Another remedy, where there is one."""
        return ", or use --precision fp32" if self.config.precision == "bf16" else ""

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
        if self.is_due() or self.epoch == self.config.epochs:
            self.save()

    def is_due(self) -> bool:
        """Whether this end of an epoch is one after which a state is to be kept; the same on every process."""
        if self.recorder.save_every:
            return self.epoch % self.recorder.save_every == 0
        due = self.spent_saving <= SAVING * (time.monotonic() - self.started)
        return self.processes.any(self.processes.is_main and due)

    def identity(self) -> dict:
        # More epochs only go on; everything else would make another result.
        return {k: v for k, v in asdict(self.config).items() if k != "epochs"} | (self.recorder.identity or {})

    def save(self) -> None:
        """Write the resumable state, whole or not at all; one with a loss or weights that are not finite never."""
        began = time.monotonic()
        self.check_finite()
        check_weights(self.model, -(-self.step // self.steps_per_epoch), self.or_fp32())
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
        self.spent_saving += time.monotonic() - began

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
            theirs, ours = saved["identity"], self.identity()
            if theirs != ours:
                keys = sorted(theirs.keys() | ours.keys(), key=str)
                differ = [f"{k} was {theirs.get(k)}, is {ours.get(k)}" for k in keys if theirs.get(k) != ours.get(k)]
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
            check_values(path, saved["model"], remedy)
            device = self.processes.device
            try:
                if len(saved["losses"]) != saved["step"] % self.steps_per_epoch:
                    raise ValueError(f"{len(saved['losses'])} losses at step {saved['step']}")
                behind = range(1, saved["step"] // self.steps_per_epoch + 1)
                if [line.get("epoch") for line in saved["history"]] != list(behind):
                    raise ValueError(f"its history is not of the epochs up to step {saved['step']}")
                self.model.load_state_dict(saved["model"])
                load_optimizer(self.optimizer, saved["optimizer"], saved["step"])
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


def check_weights(model: nn.Module, epoch: int, or_fp32: str) -> None:
    """Raise `UserError` where training has left weights that are not finite, though the losses up to there were."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()  # waits for the device once
    if not all(finite):
        name = list(tensors)[finite.index(False)]
        raise UserError(f"{name} is not finite any more in epoch {epoch}: lower --lr{or_fp32}; nothing is saved")


def json_line(line: dict) -> str:
    """An epoch's figures as a line of a log; one that is not finite, which no JSON can hold, as null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, step: int) -> None:
    """Load the state of an optimizer, or of several as one, but for what its options decide: these stay its own.

    Args:
        step: how many steps have been made.

    Raises:
        ValueError, and what torch raises: the state is another's.
    """
    parts = getattr(optimizer, "optimizers", (optimizer,))
    own = [[{k: v for k, v in group.items() if k != "params"} for group in part.param_groups] for part in parts]
    check_moments(state)
    optimizer.load_state_dict(state)
    for part, options in zip(parts, own, strict=True):
        for group, given in zip(part.param_groups, options, strict=True):
            group.update(given)
            for parameter in group["params"]:
                check_moments_of(part, parameter, step)


MOMENTS = {torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}}  # what there is of each parameter after a step
ALL_MOMENTS = set().union(*MOMENTS.values())


def check_moments(state: object) -> None:
    """Raise `ValueError` where what is kept of a parameter, at any depth of `state`, are no real numbers: torch would
    turn them into some."""
    if isinstance(state, list):
        state = dict(enumerate(state))
    for name, value in state.items() if isinstance(state, dict) else ():
        is_moment = isinstance(value, Tensor)
        if name in ALL_MOMENTS and not is_moment or is_moment and (oddity(value) or not value.is_floating_point()):
            raise ValueError(f"{name} of a parameter holds what no step gives")
        check_moments(value)


def check_moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, step: int) -> None:
    """Raise `ValueError` where an optimizer lacks moments of a parameter, or has some of another shape or after other
    than `step` steps: torch would read beyond their end, or go on to another result."""
    state = optimizer.state.get(parameter, {})
    if step and (lacking := MOMENTS.get(type(optimizer), set()) - state.keys()):
        raise ValueError(f"the optimizer has no {min(lacking)} of a parameter")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.shape != (() if name == "step" else parameter.shape):
            raise ValueError(f"{name} is {list(value.shape)}, its parameter {list(parameter.shape)}")
        if name == "step" and value != step:
            raise ValueError(f"the optimizer has made {value:g} steps, not {step}")
        if not value.isfinite().all() or (name == "exp_avg_sq" and (value < 0).any()):
            raise ValueError(f"{name} of a parameter holds what no step gives")
