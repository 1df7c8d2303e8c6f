"""The registry of tasks: everything that differs between experiments, as data.

A new task is one entry in `TASKS`; argparse choices, sizes of networks and schedules derive from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from utils import UserError

HELD_OUT = "held-out-classes"  # the OOD set of Setting 1: the test images of the classes that are not IND

PARTITIONS = {f"partition{k + 1}": tuple(range(k, k + 6)) for k in range(5)}
ALL_CLASSES = {"all": tuple(range(10))}

OOD_OF_CIFAR10 = ("SVHN", "LSUN", "LSUN-FIX", "tinyImageNet", "ImageNet-FIX", "CIFAR100")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One experiment: its images, its networks and its schedule.

    Attributes:
        dataset: name of the IND data set, a key of `datasets.datasetsHelper.READERS`.
        partitions: for each partition its IND classes, which are renumbered 0, 1, … in that order.
        ood_datasets: names of the OOD sets, keys of `READERS` or `HELD_OUT`.
        image_channels, image_size: images are [image_channels, image_size, image_size].
        networks: family of networks, a key of `models.layers.EXTRACTORS`.
        logits: outputs of the classifier: the IND classes, one OOD slot, spare ones.
        embedded_classes: inputs of the CVAE's class embedding.
        sigma: standard deviation of the latent under which pseudo-OOD images are decoded.
        kl_weight: factor on the KL term of the CVAE's loss.
        epochs: of each training command.
        batch_size: of the training commands.
        fine_tune_epochs: of stage 2.
        check_every: optimizer steps of stage 2 between two evaluations.
        augment: random crop and flip while the classifier trains.
    """

    dataset: str
    partitions: Mapping[str, tuple[int, ...]]
    ood_datasets: tuple[str, ...]
    image_channels: int
    image_size: int
    networks: str
    logits: int
    sigma: float
    epochs: Mapping[str, int]
    check_every: int
    embedded_classes: int = 10
    batch_size: int = 512
    kl_weight: float = 1.0
    fine_tune_epochs: int = 15
    augment: bool = False


TASKS: dict[str, Task] = {
    "same_dataset_digits": Task(
        dataset="digits",
        partitions=PARTITIONS,
        ood_datasets=(HELD_OUT,),
        image_channels=1,
        image_size=8,
        networks="mnist",
        logits=11,
        sigma=3.0,
        kl_weight=0.1,
        epochs={"train_classifier": 60, "train_cvae": 200},
        batch_size=64,
        fine_tune_epochs=60,
        check_every=20,
    ),
    "same_dataset_mnist": Task(
        dataset="mnist",
        partitions=PARTITIONS,
        ood_datasets=(HELD_OUT,),
        image_channels=1,
        image_size=28,
        networks="mnist",
        logits=11,
        sigma=3.0,
        epochs={"train_classifier": 100, "train_cvae": 100},
        check_every=20,
    ),
    "same_dataset_cifar10": Task(
        dataset="cifar10",
        partitions=PARTITIONS,
        ood_datasets=(HELD_OUT,),
        image_channels=3,
        image_size=32,
        networks="cifar10",
        logits=11,
        sigma=5.0,
        epochs={"train_classifier": 200, "train_cvae": 200},
        check_every=20,
        augment=True,
    ),
    "different_dataset": Task(
        dataset="cifar10",
        partitions=ALL_CLASSES,
        ood_datasets=OOD_OF_CIFAR10,
        image_channels=3,
        image_size=32,
        networks="cifar10",
        logits=110,
        sigma=5.0,
        epochs={"train_classifier": 200, "train_cvae": 200},
        check_every=100,
        augment=True,
    ),
}


def all_partitions() -> list[str]:
    """The partitions of all tasks, for argparse choices."""
    return list(dict.fromkeys(name for task in TASKS.values() for name in task.partitions))


def all_ood_datasets() -> list[str]:
    """The OOD sets of all tasks, for argparse choices."""
    return list(dict.fromkeys(name for task in TASKS.values() for name in task.ood_datasets))


COMMANDS = {"train_classifier": "classifier", "train_cvae": "cvae"}  # training command -> network


def find_partition(task_name: str, partition: str | None) -> str:
    """The partition asked for, or the task's first.

    Raises:
        UserError: the task has no such partition.
    """
    partitions = TASKS[task_name].partitions
    if partition is not None and partition not in partitions:
        raise UserError(f"--partition {partition}: {task_name} has {', '.join(partitions)}")
    return partition or next(iter(partitions))


def default_checkpoint(task_name: str, partition: str, command: str) -> Path:
    """Where a training command writes when it isn't told: ckpt/TASK_PARTITION_NETWORK.pkl."""
    return Path("ckpt") / f"{task_name}_{partition}_{COMMANDS[command]}.pkl"
