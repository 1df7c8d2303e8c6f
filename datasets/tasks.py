"""The registry of tasks: everything that differs between experiments, as data.

A new task is one entry in `TASKS`; argparse choices, sizes of networks and schedules derive from it. A task of the
user's own images, `--task custom`, is made from their folders in `datasets.experiments`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cli.errors import UserError
from cli.files import short_name

HELD_OUT = "held-out-classes"  # the OOD set of Setting 1: the test images of the classes that are not IND
IND_TEST, PSEUDO = "IND test", "pseudo-OOD"  # image sets of every task, beside the OOD sets
PRETRAINED = "pretrained"  # in results: the step of the classifier before fine-tuning

# What results and options call something else: an OOD set of that name would take its place.
RESERVED = (HELD_OUT, IND_TEST, PSEUDO, "IND training", "IND validation", "all")

PARTITIONS = {f"partition{k + 1}": tuple(range(k, k + 6)) for k in range(5)}
ALL_CLASSES = {"all": tuple(range(10))}

CUSTOM = "custom"  # the task of the user's own images

OOD_OF_CIFAR10 = ("SVHN", "LSUN", "LSUN-FIX", "tinyImageNet", "ImageNet-FIX", "CIFAR100")


@dataclass(frozen=True)
class UserFolder:
    """A user's own images.

    Attributes:
        root: of IND images the folder with train/CLASS and test/CLASS; of OOD images the folder itself.
        classes: names of the class folders, in the order of their numbers; empty for OOD images.
    """

    root: Path
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BackboneChoice:
    """A pre-trained network as the extractor.

    Attributes:
        name: a model of torchvision or timm, or MODULE:FUNCTION.
        weights: state dict to fill it with; None: its own.
        size: side in pixels of the images that it sees; None: its own.
    """

    name: str
    weights: Path | None = None
    size: int | None = None


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
        fine_tuning: options of stage 2, fields of `cmg.config.FineTuneConfig`, that are not the method's defaults.
        kl_weight: factor on the KL term of the CVAE's loss.
        epochs: of each training command.
        feature_epochs: of the CVAE where it is one of features.
        batch_size: of the training commands.
        precision: what `--precision auto` takes; "auto" takes bf16 where the hardware has it.
        augment: random crop and flip while the classifier trains.
        space: one of `SPACES`.
        backbone: a pre-trained extractor; what the networks see in the place of images is its features then, of
            `image_channels` channels and one pixel, see `training.backbone.prepare`.
        folders: the data sets that are the user's own, by name; names not found here are keys of `READERS`.
        options: of the command line that make this task, where --task alone does not.
    """

    dataset: str
    partitions: Mapping[str, tuple[int, ...]]
    ood_datasets: tuple[str, ...]
    image_channels: int
    image_size: int
    networks: str
    logits: int
    epochs: Mapping[str, int]
    fine_tuning: Mapping[str, object]
    embedded_classes: int = 10
    batch_size: int = 512
    feature_epochs: int = 20
    kl_weight: float = 1.0
    precision: str = "auto"
    augment: bool = False
    space: str = "images"
    backbone: BackboneChoice | None = None
    folders: Mapping[str, UserFolder] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    @property
    def read_shape(self) -> tuple[int, int]:
        """Channels and side to which a user's own images are brought when they are read."""
        return (3, self.backbone.size) if self.backbone else (self.image_channels, self.image_size)


# Stride and depth tie each family of networks to an image size; either takes grey and colour images.
FAMILIES = {
    28: {
        "networks": "mnist",
        "epochs": {"train_classifier": 100, "train_cvae": 100},
        "fine_tuning": {"sigma": 3.0, "eval_every": 20},
    },
    32: {
        "networks": "cifar10",
        "epochs": {"train_classifier": 200, "train_cvae": 200},
        "augment": True,
        "fine_tuning": {"sigma": 5.0, "eval_every": 20},
    },
}

FEATURE_SIGMA = 2.0  # of a CVAE of features, with any images

# Of the tasks whose images are features of a backbone.
OF_BACKBONES = {
    "networks": "features",
    "epochs": {"train_classifier": 20},
    "feature_epochs": 20,
    "batch_size": 128,
    "augment": False,
    "fine_tuning": {},
}

# What --networks may be, for images of 32x32 pixels -> family.
WIDTHS = {"full": "cifar10", "narrow": "narrow"}

MNIST = Task(
    dataset="mnist",
    partitions=PARTITIONS,
    ood_datasets=(HELD_OUT,),
    image_channels=1,
    image_size=28,
    logits=11,
    **FAMILIES[28],
)

TASKS: dict[str, Task] = {
    "same_dataset_digits": Task(
        dataset="digits",
        partitions=PARTITIONS,
        ood_datasets=(HELD_OUT,),
        image_channels=1,
        image_size=8,
        networks="mnist",
        logits=11,
        kl_weight=0.1,
        epochs={"train_classifier": 60, "train_cvae": 100},
        feature_epochs=200,
        batch_size=64,
        precision="fp32",  # as fast on networks so small, and the same on more processors
        fine_tuning={
            "sigma": 3.0,
            "epochs": 705,  # of 6 steps: as many steps as the method's 15 epochs of MNIST have, 4,230
            "pseudo_pool": 12_000,  # docs/findings.md: no other result, in a fraction of the time
            "eval_every": 20,
        },
    ),
    "same_dataset_digits_rgb": Task(
        dataset="digits_rgb",
        partitions=PARTITIONS,
        ood_datasets=(HELD_OUT,),
        image_channels=3,
        image_size=32,
        networks="narrow",
        logits=11,
        kl_weight=0.1,
        epochs={"train_classifier": 30, "train_cvae": 60},
        feature_epochs=200,
        batch_size=64,
        fine_tuning={"sigma": 5.0, "epochs": 60, "eval_every": 20},
    ),
    "same_dataset_mnist": MNIST,
    "same_dataset_fashion_mnist": replace(MNIST, dataset="fashion_mnist"),
    "same_dataset_kmnist": replace(MNIST, dataset="kmnist"),
    "same_dataset_cifar10": Task(
        dataset="cifar10",
        partitions=PARTITIONS,
        ood_datasets=(HELD_OUT,),
        image_channels=3,
        image_size=32,
        logits=11,
        **FAMILIES[32],
    ),
    "different_dataset": Task(
        dataset="cifar10",
        partitions=ALL_CLASSES,
        ood_datasets=OOD_OF_CIFAR10,
        image_channels=3,
        image_size=32,
        logits=110,
        **FAMILIES[32] | {"fine_tuning": {"sigma": 5.0}},
    ),
}


def all_partitions() -> list[str]:
    """The partitions of all tasks, for argparse choices."""
    return list(dict.fromkeys(name for task in TASKS.values() for name in task.partitions))


SPACES = ("images", "features")  # what the CVAE makes: images, or features of the frozen extractor

COMMANDS = {"train_classifier": "classifier", "train_cvae": "cvae"}  # training command -> network


@dataclass(frozen=True)
class Experiment:
    """A task by its name, and which of its classes are IND: what checkpoints and results are made for."""

    name: str
    task: Task
    partition: str

    @classmethod
    def of(cls, name: str, task: Task, partition: str | None = None) -> Experiment:
        """The partition asked for, or the task's first.

        Raises:
            UserError: the task has no such partition.
        """
        if partition is not None and partition not in task.partitions:
            raise UserError(f"--partition {partition}: {name} has {', '.join(task.partitions)}")
        return cls(name, task, partition or next(iter(task.partitions)))

    def __str__(self) -> str:
        return f"{self.name} {self.partition}"

    @property
    def classes(self) -> tuple[int, ...]:
        """The IND classes by their numbers in the data set, in the order of the logits."""
        return self.task.partitions[self.partition]

    @property
    def num_ind(self) -> int:
        """IND classes."""
        return len(self.classes)

    @property
    def class_names(self) -> tuple[int | str, ...]:
        """The IND classes in the order of the logits: names of the user's folders, or numbers in the data set."""
        folder = self.task.folders.get(self.task.dataset)
        return tuple(folder.classes[k] for k in self.classes) if folder else self.classes

    @property
    def task_options(self) -> tuple[str, ...]:
        """Of the command line, by which the task is chosen."""
        return self.task.options or ("--task", self.name)

    @property
    def options(self) -> tuple[str, ...]:
        """Of the command line, by which it is chosen."""
        which = ("--partition", self.partition) if len(self.task.partitions) > 1 else ()
        return (*self.task_options, *which)

    def with_networks(self, width: str | None) -> Experiment:
        """The same with networks of another width, a key of `WIDTHS`, of which its name tells; None: the task's own.

        Raises:
            UserError: the task's images are too small for them.
        """
        task = self.task
        if width is None or WIDTHS[width] == task.networks:
            return self
        if task.networks not in WIDTHS.values():
            raise UserError(
                f"--networks {width}: {self.name} has images of {task.image_size}x{task.image_size} pixels, and these "
                "networks take 32x32; leave it out"
            )
        options = (*self.task_options, "--networks", width)
        return replace(self, name=f"{self.name}_{width}", task=replace(task, networks=WIDTHS[width], options=options))

    def with_backbone(self, backbone: BackboneChoice | None) -> Experiment:
        """The same on the features of a pre-trained network, which its name tells; None: as it is."""
        if backbone is None:
            return self
        given = {"--backbone": backbone.name, "--backbone-weights": backbone.weights, "--image-size": backbone.size}
        options = [*self.task_options]
        options += [word for flag, value in given.items() if value for word in (flag, str(value))]
        name = "_".join([self.name, re.sub(r"\W+", "-", backbone.name), *([str(backbone.size)] * bool(backbone.size))])
        task = replace(self.task, backbone=backbone, options=tuple(options), **OF_BACKBONES)
        return replace(self, name=name, task=task).in_space("features")

    def in_space(self, space: str) -> Experiment:
        """The same with a CVAE that makes what `space`, one of `SPACES`, names: features have a schedule, a
        weight of the KL term and a sigma of their own."""
        if space == self.task.space:
            return self
        task = self.task
        epochs = task.epochs | {"train_cvae": task.feature_epochs}
        options = (*self.task_options, "--space", space)
        fine_tuning = task.fine_tuning | {"sigma": FEATURE_SIGMA}
        changed = {"space": space, "epochs": epochs, "kl_weight": 1.0, "fine_tuning": fine_tuning, "options": options}
        return replace(self, task=replace(task, **changed))

    def checkpoint(self, command: str) -> Path:
        """Where a training command writes when it isn't told: ckpt/TASK_PARTITION_NETWORK.pkl."""
        space = "_features" if command == "train_cvae" and self.task.space == "features" else ""
        return Path("ckpt") / f"{short_name(f'{self.name}_{self.partition}_{COMMANDS[command]}{space}')}.pkl"
