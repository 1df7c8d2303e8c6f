"""Own images from a folder to a table, by a pre-trained backbone: CIFAR-10 in the part of the photos.

    python -m examples.own_images --data-dir datasets --folder own

writes CIFAR-10, and CIFAR100 and SVHN as OOD sets, to folders of PNG files, and runs what a user of such folders would:

    python -m reproduce --task custom --ind-dir own/cifar10 --ood-dir own/CIFAR100 --ood-dir own/SVHN \\
        --backbone examples.efficientnet_lite0:backbone --image-size 128 --seeds 1 --tuning-seeds 3 --baselines
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from PIL import Image
from torch import Tensor

import reproduce
from cli.errors import run_command
from cli.options import positive_int
from datasets.datasetsHelper import load_ind, load_ood
from datasets.tasks import TASKS, Experiment

OOD = ("CIFAR100", "SVHN")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "examples.own_images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("datasets"), help="Folder of the data sets")
    parser.add_argument("--folder", type=Path, default=Path("own"), help="Folder to write to (default: %(default)s)")
    parser.add_argument(
        "--ood-dir", type=Path, action="append", default=[], help="Further folder of OOD images; may be repeated"
    )
    parser.add_argument("--train", type=positive_int, default=8000, help="IND training images (default: %(default)s)")
    parser.add_argument("--test", type=positive_int, default=2000, help="Images of each other kind (default: 2000)")
    parser.add_argument("--image-size", type=positive_int, default=128, help="Pixels that the backbone sees")
    return parser


def main(args: argparse.Namespace) -> int:
    experiment = Experiment.of("different_dataset", TASKS["different_dataset"])
    for split, images, count in zip(
        ("train", "test"), load_ind(experiment, args.data_dir), (args.train, args.test), strict=True
    ):
        for label in range(experiment.num_ind):
            chosen = images.images[images.labels == label][: count // experiment.num_ind]
            write(chosen, args.folder / "cifar10" / split / f"class{label}")
    for name in OOD:
        write(load_ood(experiment, name, args.data_dir)[: args.test], args.folder / name)
    argv = ["--task", "custom", "--ind-dir", str(args.folder / "cifar10")]
    for folder in (*(args.folder / name for name in OOD), *args.ood_dir):
        argv += ["--ood-dir", str(folder)]
    argv += ["--backbone", "examples.efficientnet_lite0:backbone", "--image-size", str(args.image_size)]
    argv += ["--seeds", "1", "--tuning-seeds", "3", "--baselines", "--data-dir", str(args.folder)]
    print(f"$ python -m reproduce {shlex.join(argv)}", flush=True)
    return run_command(reproduce.main, reproduce.get_parser(), argv)


def write(images: Tensor, folder: Path) -> None:
    """Write images, uint8 [N, 3, S, S], as folder/NUMBER.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{number}.png")


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
