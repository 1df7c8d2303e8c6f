"""What the three commands share before torch is imported: data sets, places of files, arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from datasets.tasks import TASKS, Task
from utils import add_machine_arguments

ROOT = Path("..")  # the commands run in this folder and share data, checkpoints and results with the rest


@dataclass(frozen=True)
class CSIData:
    """A choice of --dataset: the task of the root's registry whose images, and whose CVAE, are taken."""

    task_name: str
    partition: str

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

    @property
    def classes(self) -> int:
        """IND classes."""
        return len(self.task.partitions[self.partition])


DATASETS = {
    "cifar10": CSIData("different_dataset", "all"),
    "digits": CSIData("same_dataset_digits_rgb", "partition1"),
}


@dataclass(frozen=True)
class ModeDefaults:
    """A training mode: the end of its checkpoint's name, the views its network can be tested with, the paper's run."""

    suffix: str
    views: tuple[str, ...]
    epochs: int
    learning_rate: float


TRAINING_MODES = {
    "sup_simclr_CSI": ModeDefaults("_representation", ("single view",), epochs=700, learning_rate=1.0),
    "sup_CSI_linear": ModeDefaults("", ("single view", "rotation ensemble"), epochs=100, learning_rate=0.1),
}


def add_csi_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every CSI command shares."""
    parser.add_argument(
        "--dataset", choices=list(DATASETS), default="cifar10", help="images and classes (default: %(default)s)"
    )
    add_machine_arguments(parser, data_dir=ROOT / "datasets")


def default_checkpoint(dataset: str, mode: str) -> Path:
    """Where a training mode writes when it isn't told: ../ckpt/csi_DATASET….pkl."""
    return ROOT / "ckpt" / f"csi_{dataset}{TRAINING_MODES[mode].suffix}.pkl"


def remedy(dataset: str, mode: str) -> str:
    """How to make the checkpoint of a training mode."""
    return f"Make it with, in CSI+CMG: python -m train --mode {mode} --dataset {dataset}"
