"""The registry of tasks: everything that differs between experiments, as data.

A new task is one entry in `TASKS`; argparse choices, sizes of networks and schedules derive from it. A task of the
user's own images, `--task custom`, is made from their folders:

    add_experiment_arguments(parser)
    add_data_arguments(parser)
    experiment = experiment_from_arguments(parser.parse_args())
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cli.errors import UserError, printable
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
        batch_size: of the training commands.
        precision: what `--precision auto` takes; "auto" takes bf16 where the hardware has it.
        augment: random crop and flip while the classifier trains.
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
    kl_weight: float = 1.0
    precision: str = "auto"
    augment: bool = False
    folders: Mapping[str, UserFolder] = field(default_factory=dict)
    options: tuple[str, ...] = ()


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
    def options(self) -> tuple[str, ...]:
        """Of the command line, by which it is chosen."""
        which = ("--partition", self.partition) if len(self.task.partitions) > 1 else ()
        return (*(self.task.options or ("--task", self.name)), *which)

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
        options = (*(task.options or ("--task", self.name)), "--networks", width)
        return replace(self, name=f"{self.name}_{width}", task=replace(task, networks=WIDTHS[width], options=options))

    def checkpoint(self, command: str) -> Path:
        """Where a training command writes when it isn't told: ckpt/TASK_PARTITION_NETWORK.pkl."""
        return Path("ckpt") / f"{short_name(f'{self.name}_{self.partition}_{COMMANDS[command]}')}.pkl"


# --- the user's own images ----------------------------------------------------------------------


def custom_task(ind_dir: Path, ood_dirs: Sequence[Path] = (), image_size: int = 32, image_channels: int = 3) -> Task:
    """The task whose IND classes are the folders in `ind_dir`/train, in the order of their names.

    Images are brought to `image_size` and to grey (1 channel) or colour (3) when they are read.

    Raises:
        UserError: a folder is missing, train and test hold other classes, or there are fewer than two.
    """
    ind_dir = Path(ind_dir)
    classes = class_folders(ind_dir / "train")
    if len(classes) < 2:
        raise UserError(
            f"--ind-dir {ind_dir}: train holds {len(classes)} class folder(s), expected at least 2 (train/CLASS/IMAGE)"
        )
    differing = set(classes) ^ set(class_folders(ind_dir / "test"))
    if differing:
        raise UserError(
            f"--ind-dir {ind_dir}: the class {min(differing)} is in one of train and test only; expected it in both"
        )
    for split in ("train", "test"):
        same = first_twin([ind_dir / split / name for name in classes])
        if same:
            raise UserError(f"{same[0]} and {same[1]} are the same folder: a class needs one of its own; remove a link")
    name = printable(ind_dir.resolve().name)
    task = Task(
        dataset=name,
        partitions={"all": tuple(range(len(classes)))},
        ood_datasets=(),
        image_channels=image_channels,
        image_size=image_size,
        logits=len(classes) + 1,
        embedded_classes=len(classes),
        folders={name: UserFolder(ind_dir, classes)},
        options=custom_options(ind_dir, image_size, image_channels),
        **FAMILIES[image_size],
    )
    return with_ood_folders(task, ood_dirs)


def custom_options(ind_dir: Path, image_size: int, image_channels: int) -> tuple[str, ...]:
    """The options that make a task of the user's own images."""
    grey = ("--grey",) if image_channels == 1 else ()
    return ("--task", CUSTOM, "--ind-dir", str(ind_dir), "--image-size", str(image_size), *grey)


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the folders in `folder`, sorted; hidden ones left out.

    Raises:
        UserError: it is not there, or what may be a class cannot be read, such as a link that leads nowhere.
    """
    from datasets.folders import kind_of, unreadable  # and numpy with it, which --help does without

    try:
        paths = sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror or error}; expected a folder with one folder of images per class"
        ) from None
    names = []
    for path in paths:
        try:
            names += [path.name] if kind_of(path) == "folder" else []
        except OSError as error:
            raise UserError(unreadable(path, error)) from None
    return tuple(names)


def first_twin(folders: Sequence[Path]) -> tuple[Path, Path] | None:
    """The first two that are one folder, by links, or None."""
    seen: dict[str, Path] = {}
    for folder in folders:
        if (other := seen.setdefault(os.path.realpath(folder), folder)) != folder:
            return other, folder
    return None


def with_ood_folders(task: Task, ood_dirs: Sequence[Path]) -> Task:
    """The task with further OOD sets, each named after its folder.

    Raises:
        UserError: a folder is missing, or its name is taken or reserved.
    """
    folders = dict(task.folders)
    for folder in map(Path, ood_dirs):
        name = printable(folder.resolve().name)
        if not folder.is_dir():
            raise UserError(f"--ood-dir {folder}: no such folder; expected a folder of images")
        if name in RESERVED:
            raise UserError(f"--ood-dir {folder}: the name {name} is reserved by results or options; rename the folder")
        if name in folders or name == task.dataset or name in task.ood_datasets:
            raise UserError(f"--ood-dir {folder}: there is a data set called {name} already; rename the folder")
        folders[name] = UserFolder(folder)
    return replace(
        task,
        folders=folders,
        ood_datasets=(*task.ood_datasets, *(name for name in folders if name not in task.folders)),
    )


def task_names() -> list[str]:
    """What --task may be."""
    return [*TASKS, CUSTOM]


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """Which task and partition."""
    parser.add_argument(
        "--task",
        choices=task_names(),
        default=task_names()[0],
        help="What is IND and what is OOD (default: %(default)s)",
    )
    parser.add_argument(
        "--partition", choices=all_partitions(), help="Which classes are IND (default: the task's first)"
    )
    add_networks_argument(parser)


def add_networks_argument(parser: argparse.ArgumentParser, of: str = "") -> None:
    """How wide the networks are."""
    parser.add_argument(
        "--networks",
        choices=list(WIDTHS),
        help=f"Width{of}, for images of 32x32 pixels: full as in the method, or narrow, a quarter of the channels, for "
        "computers without a GPU (default: the task's)",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments about the user's own images, which every command shares."""
    group = parser.add_argument_group("your own images")
    group.add_argument(
        "--ind-dir", type=Path, help="Folder of --task custom, with train/CLASS/IMAGE and test/CLASS/IMAGE"
    )
    group.add_argument(
        "--ood-dir",
        type=Path,
        action="append",
        default=[],
        help="Folder of OOD images, beside any task; may be repeated",
    )
    group.add_argument(
        "--image-size",
        type=int,
        choices=list(FAMILIES),
        help="Side of the images of --task custom in pixels (default: 32)",
    )
    group.add_argument("--grey", action="store_true", help="Read the images of --task custom in grey instead of colour")


def experiment_from_arguments(args: argparse.Namespace) -> Experiment:
    """The experiment that the parsed arguments ask for.

    Raises:
        UserError: as `custom_task`, `Experiment.of` and `with_networks`, or an argument does not go with the task.
    """
    name, task = custom_from_arguments(args) if args.task == CUSTOM else registered_from_arguments(args)
    return Experiment.of(name, task, args.partition).with_networks(args.networks)


def custom_from_arguments(args: argparse.Namespace) -> tuple[str, Task]:
    """The task of the user's own images, named after what sets it apart, such as custom_birds_3x32."""
    if args.ind_dir is None:
        raise UserError(
            "--task custom needs --ind-dir DIR, your IND images: DIR/train/CLASS/IMAGE, DIR/test/CLASS/IMAGE"
        )
    size, channels = args.image_size or 32, 1 if args.grey else 3
    task = custom_task(args.ind_dir, args.ood_dir, size, channels)
    return f"{CUSTOM}_{task.dataset}_{channels}x{size}", task


def registered_from_arguments(args: argparse.Namespace) -> tuple[str, Task]:
    """A task of the registry, with the user's OOD sets beside its own."""
    own = {"--ind-dir": args.ind_dir, "--image-size": args.image_size, "--grey": args.grey}
    given = [flag for flag, value in own.items() if value]
    if given:
        raise UserError(f"{given[0]} goes with --task custom only; {args.task} has its own images")
    return args.task, with_ood_folders(TASKS[args.task], args.ood_dir)
