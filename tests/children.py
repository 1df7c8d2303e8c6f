"""Processes that tests start, stop and kill.

They are forked from a server that has imported everything and done nothing else, so that each starts in a
fraction of a second whatever the tests did before.
"""

from __future__ import annotations

import importlib
import itertools
import math
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import sklearn.datasets  # noqa: F401  # imported in the server, once for all
import sklearn.model_selection  # noqa: F401
import torch
import torchvision  # noqa: F401
from torch import nn

import cmg.evaluate  # noqa: F401
import figure.draw_samples  # noqa: F401
import reproduction.report
import training.stage1  # noqa: F401
from cli.errors import UserError, run_command
from datasets.datasetsHelper import READERS, Images
from datasets.tasks import TASKS
from train import get_parser, main
from training.config import LoopConfig
from training.loop import fit
from training.processes import joined_processes
from training.run_state import Recorder
from training.stages import STAGES
from training.train_classifier import ClassifierObjective
from utils import save_checkpoint

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.children"])


def start(function: Callable, *args: object, output: Path) -> multiprocessing.Process:
    """Run `function(*args)` in a new process whose output goes to a file and whose exit status is what it returns."""
    process = CONTEXT.Process(target=_run, args=(function, args, output))
    process.start()
    return process


def _run(function: Callable, args: tuple, output: Path) -> None:
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(function(*args))


def start_two(function: Callable, *args: object, output: Path) -> list[multiprocessing.Process]:
    """Two processes as torchrun would start them: `function(*args)` in each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        start(_as_rank, str(rank), port, function, args, output=output.with_name(f"{output.name}.{rank}"))
        for rank in range(2)
    ]


def _as_rank(rank: str, port: str, function: Callable, args: tuple) -> object:
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return function(*args)


def finish(processes: list[multiprocessing.Process], seconds: float = 120) -> list[int | None]:
    """The exit statuses of the processes, which are killed when their time is up."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


# --- what they run ------------------------------------------------------------------------------


def build_tiny(task: object = None) -> nn.Module:
    """A network for digits that trains in milliseconds, with batch norm and dropout as the real ones have."""
    layers = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(36, 11))


def train(argv: list[str]) -> int:
    """`python -m train`."""
    return run_command(main, get_parser(), argv)


def train_tiny(argv: list[str]) -> int:
    """`python -m train` with the tiny network as classifier."""
    STAGES["train_classifier"] = replace(STAGES["train_classifier"], build=build_tiny)
    return train(argv)


def run(name: str, argv: list[str]) -> int:
    """`python -m NAME`."""
    module = importlib.import_module(name)
    return run_command(module.main, module.get_parser(), argv)


def import_without_matplotlib(name: str) -> int:
    """Import a module, and what it takes of this repository, where matplotlib is not installed."""
    ours = [
        known for known in sys.modules if known.split(".")[0] in ("cli", "cmg", "evaluation", "matplotlib", "utils")
    ]
    for known in ours:
        del sys.modules[known]
    sys.modules["matplotlib"] = None
    importlib.import_module(name)
    return 0


class ForkedJob:
    """What `reproduction.launchers` needs of a `Popen`, but the job is forked instead of started anew."""

    def __init__(self, command: list[str], stdin: int, stdout: BinaryIO, stderr: BinaryIO, env: dict[str, str]):
        assert command[1:4] == ["-P", "-m", "reproduction.jobs"] and stdin == subprocess.PIPE
        ours, theirs = os.pipe()  # the job reads until nobody can write any more
        self.process = multiprocessing.get_context("fork").Process(
            target=self._run, args=(command[4:], ours, theirs, stdout.fileno())
        )
        self.process.start()
        os.close(ours)
        self.stdin = theirs

    @staticmethod
    def _run(argv: list[str], ours: int, theirs: int, log: int) -> None:
        os.close(theirs)
        os.dup2(ours, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdin = open(0)
        sys.exit(run("reproduction.jobs", argv))

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> None:
        self.process.join()

    def terminate(self) -> None:
        self.process.terminate()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode


def reproduce_with_forked_jobs(argv: list[str]) -> int:
    """`python -m reproduce` without pictures, whose jobs need not import everything again."""
    subprocess.Popen = ForkedJob
    reproduction.report.draw = lambda *args: []
    return run("reproduce", argv)


def run_waiting_for_images(name: str, argv: list[str]) -> int:
    """`python -m NAME` where reading the digits takes forever."""
    module = importlib.import_module(name)

    def read(data_dir: Path, split: str) -> Images:
        print("reading", flush=True)
        while True:
            time.sleep(0.01)

    READERS["digits"] = read
    return run_command(module.main, module.get_parser(), argv)


def train_with_one_failing(moment: str, argv: list[str]) -> int:
    """`train_tiny` where the second process fails at a moment: reading, or in a step of the second epoch."""
    if os.environ["RANK"] == "1":
        FAILURES[moment]()
    return train_tiny(argv)


def fail(*args: object) -> None:
    raise UserError("this process fails")


def at_step(number: int, event: Callable[[dict], dict]) -> None:
    """Let `event` change what the classifier's objective returns at a step, counted from 1."""
    stage, steps = STAGES["train_classifier"], itertools.count(1)

    class Eventful(ClassifierObjective):
        def __call__(self, *args):
            means = super().__call__(*args)
            return event(means) if next(steps) == number else means

    STAGES["train_classifier"] = replace(stage, objective=lambda task: Eventful(task.augment))


FAILURES = {
    "reading": lambda: READERS.update(digits=fail),
    "step": lambda: at_step(15, fail),
    "nan": lambda: at_step(15, lambda means: means | {"loss": means["loss"] * math.nan}),
}


def wait_for_the_other() -> int:
    """The first of two processes joins their group, the second never does."""

    def main(args: object) -> None:
        print("joining", flush=True)
        with joined_processes("cpu"):
            pass

    return run_command(main, get_parser(), []) if os.environ["RANK"] == "0" else 0


def fit_linear(count: int, epochs: int, file: Path) -> None:
    """Fit two linear layers, without batch norm or dropout, by plain SGD; the main process saves weights and losses."""
    with joined_processes("cpu") as processes:
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(256, (count, 1, 4, 4), generator=draw, dtype=torch.uint8)
        data = Images(images, torch.randint(3, (count,), generator=draw))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
        objective = STAGES["train_classifier"].objective(TASKS["same_dataset_digits"])
        config = LoopConfig(epochs=epochs, batch_size=8, learning_rate=0.5, seed=3, precision="fp32")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        history = fit(model, optimizer, data, objective, config, processes, Recorder(name="linear"))
        if processes.is_main:
            torch.save({"model": model.state_dict(), "losses": [line["loss"] for line in history]}, file)


def save_with_little_room(path: Path, room: int) -> int:
    """Write a checkpoint of 4 MB where no file may grow beyond `room` bytes, as on a full disk."""

    def save(args: object) -> None:
        save_checkpoint(path, {"weights": torch.zeros(1_000_000)})

    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    return run_command(save, get_parser(), [])
