"""One epoch loop for every network: order, precision, several processes, resume, interruption.

All random numbers of an epoch are drawn on the CPU before it starts, from streams that follow from the
seed and the epoch's number alone, and dropout is seeded at every step: a run that was stopped anywhere
repeats the very numbers of one that was not, and no generator state has to be saved.
"""

from __future__ import annotations

import signal
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from cli.errors import Stopped, UserError, handling
from cli.progress import Progress
from datasets.datasetsHelper import Images
from training.config import LoopConfig
from training.processes import Processes
from training.run_state import Recorder, RunState
from utils import autocast, derive_seed, generator

STEPS_BETWEEN_STOP_CHECKS = 20  # with several processes, which have to agree


class Objective(Protocol):
    """What is minimised, and the random numbers it needs."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The random numbers for one pass over `count` images, one row per image."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *draws: Tensor) -> dict[str, Tensor]:
        """Means over the batch; "loss" is minimised, the others are reported. `images` are those of `Images`."""


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
    progress.skip(state.epoch * len(data) + state.step_in_epoch * config.batch_size)
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
