"""What the three commands share before torch is imported: data sets, places of files, arguments."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

from cli.errors import UserError
from cli.files import short_name
from cli.options import add_machine_arguments, number, option, positive_int
from datasets.experiments import add_data_arguments, experiment_from_arguments
from datasets.tasks import CUSTOM, Experiment

# What --dataset may be -> task of the root's registry, and partition.
DATASETS = {
    "cifar10": ("different_dataset", "all"),
    "digits": ("same_dataset_digits_rgb", "partition1"),
    CUSTOM: (CUSTOM, None),
}


@dataclass(frozen=True)
class CSIData:
    """The images of a run: those of an experiment of the root, whose CVAE is taken as well.

    Attributes:
        name: in checkpoints and in names of files.
    """

    name: str
    experiment: Experiment

    @property
    def options(self) -> tuple[str, ...]:
        """Of the command line, by which it is chosen."""
        return self.experiment.task.options or ("--dataset", self.name)


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


BATCH_SIZE = 128  # images in a step, of either mode

REPRESENTATION = {"mode": ("sup_simclr_CSI",)}  # whose options the linear layers take over


@dataclass(frozen=True, kw_only=True)
class CSIOptions:
    """What decides a CSI network beside the loop."""

    load_path: Path | None = option(
        None,
        "--load_path",
        "--load-path",
        help="Checkpoint of the representation that the linear layers are trained on",
        type=Path,
        default_of="where sup_simclr_CSI writes it",
        needs={"mode": ("sup_CSI_linear",)},
    )
    warmup: int = option(
        10,
        help="Epochs over which the learning rate rises to its peak",
        type=number(int, least=0),
        needs=REPRESENTATION,
    )
    width: int = option(64, help="Channels of the first stage", type=positive_int, needs=REPRESENTATION)
    val_fraction: float = option(
        0.0,
        help="Share of the IND training images kept out, as in the root's train",
        type=number(float, least=0, below=1),
        needs=REPRESENTATION,
    )


def root() -> Path:
    """Where data, checkpoints and results are, which are shared with the rest: the commands run in this folder, or as
    `python CSI+CMG/train.py` in the one above."""
    return Path(".") if Path("CSI+CMG", "csi").is_dir() else Path("..")


def add_csi_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every CSI command shares."""
    parser.add_argument(
        "--dataset", "--task", choices=list(DATASETS), default="cifar10", help="Images and classes (default: cifar10)"
    )
    add_machine_arguments(parser, data_dir=root() / "datasets")
    add_data_arguments(parser)


def experiment_from_csi_arguments(args: argparse.Namespace) -> CSIData:
    """The images that the parsed arguments ask for.

    Raises:
        UserError: as `datasets.experiments.experiment_from_arguments`, or the images have another shape than CSI's.
    """
    task_name, partition = DATASETS[args.dataset]
    # So that it means the same in the root, where the CVAE is trained.
    ind_dir = args.ind_dir and args.ind_dir.resolve()
    asked = {"task": task_name, "partition": partition, "ind_dir": ind_dir, "networks": None, "space": "images"}
    if args.backbone:
        raise UserError("CSI trains its own network; leave out --backbone")
    experiment = experiment_from_arguments(argparse.Namespace(**vars(args) | asked))
    if (experiment.task.image_channels, experiment.task.image_size) != (3, 32):
        raise UserError("CSI takes images of 3 channels and 32x32 pixels only; leave out --grey and --image-size")
    return CSIData(experiment.name if args.dataset == CUSTOM else args.dataset, experiment)


def default_checkpoint(data: CSIData, mode: str) -> Path:
    """Where a training mode writes when it isn't told: ../ckpt/csi_DATASET….pkl."""
    return root() / "ckpt" / f"{short_name(f'csi_{data.name}{TRAINING_MODES[mode].suffix}')}.pkl"


def remedy(data: CSIData, mode: str) -> str:
    """How to make the checkpoint of a training mode."""
    return f"Make it, in CSI+CMG, with: {shlex.join(['python', '-m', 'train', '--mode', mode, *data.options])}"
