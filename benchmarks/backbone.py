"""How fast the features of images are computed, against the backbone's own forward pass.

    python -m benchmarks.backbone [--backbone NAME] [--image-size 128] [--quick] [--device cuda]

features: what train and eval do from images as they were read (uint8, on the CPU) to features kept on disk.
floor: the backbone on the same images as floats that are already on the device, in the same chunks and precision, and
nothing else. The weights are random; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import in_turn, print_share
from cli.errors import run_command
from cli.options import add_device_arguments, positive_int
from datasets.datasetsHelper import to_float
from datasets.tasks import BackboneChoice
from models.inference import in_chunks
from training.backbone import encoder, load_backbone
from utils import pick_precision, start_computing


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.backbone", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="Few images, one round: seconds, rough numbers")
    parser.add_argument("--backbone", default="mobilenet_v3_small", help="As of train (default: %(default)s)")
    parser.add_argument("--image-size", type=positive_int, default=128, help="Pixels (default: %(default)s)")
    parser.add_argument("--images", type=positive_int, help="Number of images (default: 1,000; 32 with --quick)")
    parser.add_argument(
        "--rounds", type=positive_int, help="Rounds, of which the median counts (default: 5; 1 with --quick)"
    )
    add_device_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    device = start_computing(args.device)
    precision = pick_precision(args.precision, device)
    count, rounds = args.images or (32 if args.quick else 1000), args.rounds or (1 if args.quick else 5)
    backbone = load_backbone(BackboneChoice(args.backbone, None, args.image_size), pretrained=False)
    size = (count, 3, args.image_size, args.image_size)
    images = torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    resident = to_float(images).to(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "features"
        _, encode = encoder(backbone, folder)

        def run_features():
            encode(images, precision, device)
            shutil.rmtree(folder)  # or the next round would read them

        def run_floor():
            in_chunks(backbone, resident, precision)

        times = in_turn({"features": run_features, "floor": run_floor}, rounds, device)
    print_share(f"{args.backbone} at {args.image_size} pixels", "features", count, times, device, precision)


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
