"""Make a "fix" OOD set from your own copy of LSUN or ImageNet-30, after the recipe of Tack et al. (CSI, NeurIPS 2020).

    python -m datasets.make_fix --source imagenet30/train --name ImageNet-FIX

takes a folder with one folder of images per class and writes 10,000 PNG files of 32x32 pixels below --data-dir: short
side to 256, the middle 256x256, then 32x32. Pillow averages when it shrinks; the older "resize" sets were made
by dropping pixels, and the aliasing made their images easy to detect.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cli.errors import UserError, run_command
from cli.options import seed_number
from datasets.decoding import decoded, in_mode, square
from datasets.experiments import class_folders
from datasets.folders import for_each, read_images
from datasets.obtain import locked, write_record
from datasets.search import list_images, raise_all

MIDDLE, SIDE = 256, 32  # pixels: of the cut-out, of the result


@dataclass(frozen=True)
class Recipe:
    """What a fix set is made of.

    Attributes:
        folder: its place below the data folder.
        classes: names of the class folders; a folder of that name with an ending such as _train will do.
        count: images in all.
        even: the same number from each class, instead of drawing from all images together.
        omitted: classes of the source left out, which resemble IND classes.
    """

    folder: str
    classes: tuple[str, ...]
    count: int = 10_000
    even: bool = False
    omitted: tuple[str, ...] = ()


RECIPES = {
    "LSUN-FIX": Recipe(
        folder="LSUN_fix",
        classes=(
            "bedroom",
            "bridge",
            "church_outdoor",
            "classroom",
            "conference_room",
            "dining_room",
            "kitchen",
            "living_room",
            "restaurant",
            "tower",
        ),
        even=True,
    ),
    "ImageNet-FIX": Recipe(
        folder="Imagenet_fix",
        classes=tuple(
            (
                "acorn american_alligator banjo barn bikini digital_clock dragonfly dumbbell forklift goblet "
                "grand_piano hotdog hourglass manhole_cover mosque nail pillow revolver rotary_dial_telephone "
                "snowmobile soccer_ball stingray strawberry tank toaster volcano"
            ).split()
        ),
        omitted=("airliner", "ambulance", "parking_meter", "schooner"),
    ),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "datasets.make_fix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="Folder with one folder of images per class")
    parser.add_argument("--name", choices=list(RECIPES), required=True, help="Set to make")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("datasets"),
        help="Folder to write the set's folder to (default: ./datasets)",
    )
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="Random seed of the choice of images (default: %(default)s)"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    make_fix(args.name, RECIPES[args.name], args.source, args.data_dir, args.seed)


def make_fix(name: str, recipe: Recipe, source: Path, data_dir: Path, seed: int) -> None:
    """Write `data_dir`/`recipe.folder`/correct_resize_<i>.png, whole or not at all, and a record beside it.

    Raises:
        UserError: the source lacks classes or images, one cannot be decoded, or the folder exists.
    """
    with locked(data_dir):
        target = data_dir / recipe.folder
        if target.exists():
            raise UserError(f"{target} exists; remove it or name another --data-dir")
        make(name, target, choose(recipe, source, seed))
        figures = record_figures(target)
        write_record(name, data_dir, {recipe.folder: {"from": str(source), "seed": seed}}, {"test": figures})
    print(f"wrote {figures['count']:,} images to {target}, SHA-256 of their pixels {figures['sha256']}")


def make(name: str, target: Path, chosen: Sequence[Path]) -> None:
    """Write the images as `target`/correct_resize_<i>.png, whole or not at all. Raises `UserError`."""
    staging = target.parent / f".{target.name}.making"

    def convert(index: int) -> str | None:
        try:
            with decoded(chosen[index]) as image:
                small = shrink(in_mode(image, channels=3))
        except UserError as error:
            return str(error)
        small.save(staging / f"correct_resize_{index}.png")
        return None

    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        raise_all(for_each(convert, len(chosen), f"making {name}"))
        staging.replace(target)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}. Choose another --data-dir, with free space"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def record_figures(folder: Path) -> dict:
    """Count and SHA-256 of the pixels of a finished set, by which --check knows it again."""
    images, _ = read_images(folder, channels=3, size=SIDE)
    return {"count": len(images), "sha256": hashlib.sha256(images).hexdigest()}


def choose(recipe: Recipe, source: Path, seed: int) -> list[Path]:
    """The images to take, in the order of their new numbers: drawn by `seed` alone, from the names in their order.

    Raises:
        UserError: the source lacks classes, has others, or has too few images.
    """
    from utils import derive_seed

    pools = [[folder / name for name in list_images(folder)] for folder in find_classes(recipe, source)]
    if not recipe.even:
        pools = [[path for pool in pools for path in pool]]
    each = recipe.count // len(pools)
    chosen = []
    for number, pool in enumerate(pools):
        if len(pool) < each:
            where = pool[0].parent if recipe.even and pool else source
            raise UserError(
                f"{where}: {len(pool):,} images{' of one class' if recipe.even else ''}, expected at least {each:,}"
            )
        chosen += sorted(random.Random(derive_seed(seed, "fix set", number)).sample(pool, each))
    return chosen


def find_classes(recipe: Recipe, source: Path) -> list[Path]:
    """The class folders of a recipe, in its order. Raises `UserError` if `source` lacks some."""
    folders = {_plain(name): source / name for name in class_folders(source)}
    for omitted in recipe.omitted:
        folders.pop(_plain(omitted), None)
    found, missing = [], []
    for name in recipe.classes:
        matching = [key for key in folders if key.removesuffix("train").removesuffix("val") == _plain(name)]
        key = min(
            matching, key=lambda key: (key.endswith("val"), key), default=None
        )  # the training images, if there are both
        found.append(folders.get(key))
        if key is None:
            missing.append(name)
    if missing:
        raise UserError(
            f"{source}: no class folder {', '.join(missing)}; expected one folder of images for each of "
            f"{', '.join(recipe.classes)}"
        )
    return found


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def shrink(image: Image.Image) -> Image.Image:
    """A PIL image of any size -> 32x32: short side to 256, the middle 256x256, then 32x32, averaging throughout."""
    return square(image, MIDDLE).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
