"""From the command line, and from the user's own folders, to an experiment.

add_experiment_arguments(parser)
add_data_arguments(parser)
experiment = experiment_from_arguments(parser.parse_args())
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cli.errors import UserError, printable
from cli.files import kind_of, unreadable
from cli.options import number
from datasets.search import is_hidden
from datasets.tasks import (
    CUSTOM,
    FAMILIES,
    RESERVED,
    SPACES,
    TASKS,
    WIDTHS,
    BackboneChoice,
    Experiment,
    Task,
    UserFolder,
    all_partitions,
)

LARGEST_SIDE = 4096  # pixels: more than any backbone was made for, and no more than memory holds


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
    if os.path.realpath(ind_dir / "train") == os.path.realpath(ind_dir / "test"):
        raise UserError(f"--ind-dir {ind_dir}: train and test are the same folder; expected other images in each")
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
    try:
        paths = sorted(path for path in Path(folder).iterdir() if not is_hidden(path.name))
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


def overlap(one: Path, other: Path) -> bool:
    """Whether two folders are the same, or one lies in the other."""
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)


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
        for known in (known for known in task.folders.values() if known.classes):
            for images in (known.root / split for split in ("train", "test")):
                if overlap(folder, images):
                    raise UserError(f"--ood-dir {folder}: holds IND images of {images}; name a folder of other images")
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
    add_space_argument(parser)


def add_space_argument(parser: argparse.ArgumentParser) -> None:
    """What the CVAE makes."""
    parser.add_argument(
        "--space",
        choices=SPACES,
        help="What the CVAE makes: images, as in the method, or features of the classifier's frozen extractor "
        f"(default: {SPACES[0]})",
    )


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
        type=number(int, above=0, most=LARGEST_SIDE),
        help="Side in pixels of the images of --task custom, "
        f"{' or '.join(map(str, FAMILIES))} (default: 32), or of those that the backbone sees (default: its own)",
    )
    group.add_argument(
        "--backbone",
        metavar="NAME",
        help="Pre-trained extractor, whose features take the place of the images: a model of torchvision or timm, or "
        "MODULE:FUNCTION, which gives a torch.nn.Module from images to features",
    )
    group.add_argument(
        "--backbone-weights", type=Path, metavar="FILE", help="State dict of the backbone (default: its own weights)"
    )
    group.add_argument("--grey", action="store_true", help="Read the images of --task custom in grey instead of colour")


def experiment_from_arguments(args: argparse.Namespace) -> Experiment:
    """The experiment that the parsed arguments ask for.

    Raises:
        UserError: as `custom_task`, `Experiment.of` and `with_networks`, or an argument does not go with the task.
    """
    backbone = backbone_from_arguments(args)
    name, task = custom_from_arguments(args) if args.task == CUSTOM else registered_from_arguments(args)
    if backbone:
        return Experiment.of(name, task, args.partition).with_backbone(backbone)
    return Experiment.of(name, task, args.partition).with_networks(args.networks).in_space(args.space or SPACES[0])


def backbone_from_arguments(args: argparse.Namespace) -> BackboneChoice | None:
    """The backbone that the parsed arguments ask for. Raises `UserError`."""
    if args.backbone is None:
        if args.backbone_weights:
            raise UserError("--backbone-weights goes with --backbone NAME only; leave it out")
        if args.image_size not in (None, *FAMILIES):
            raise UserError(
                f"--image-size {args.image_size}: the networks that are trained from nothing take "
                f"{' or '.join(map(str, FAMILIES))} pixels; another size goes with --backbone NAME"
            )
        return None
    for flag, value in {"--grey": args.grey, "--networks": args.networks}.items():
        if value:
            raise UserError(f"{flag} does not go with --backbone; leave it out")
    if args.backbone_weights and not args.backbone_weights.is_file():
        raise UserError(f"--backbone-weights {args.backbone_weights}: no such file; expected a state dict")
    return BackboneChoice(args.backbone, args.backbone_weights, args.image_size)


def custom_from_arguments(args: argparse.Namespace) -> tuple[str, Task]:
    """The task of the user's own images, named after what sets it apart, such as custom_birds_3x32."""
    if args.ind_dir is None:
        raise UserError(
            "--task custom needs --ind-dir DIR, your IND images: DIR/train/CLASS/IMAGE, DIR/test/CLASS/IMAGE"
        )
    if args.backbone:
        task = custom_task(args.ind_dir, args.ood_dir)
        options = ("--task", CUSTOM, "--ind-dir", str(args.ind_dir))
        return f"{CUSTOM}_{task.dataset}", replace(task, options=options)
    size, channels = args.image_size or 32, 1 if args.grey else 3
    task = custom_task(args.ind_dir, args.ood_dir, size, channels)
    return f"{CUSTOM}_{task.dataset}_{channels}x{size}", task


def registered_from_arguments(args: argparse.Namespace) -> tuple[str, Task]:
    """A task of the registry, with the user's OOD sets beside its own."""
    own = {"--ind-dir": args.ind_dir, "--grey": args.grey}
    own |= {} if args.backbone else {"--image-size": args.image_size}
    given = [flag for flag, value in own.items() if value]
    if given:
        raise UserError(f"{given[0]} goes with --task custom only; {args.task} has its own images")
    return args.task, with_ood_folders(TASKS[args.task], args.ood_dir)
