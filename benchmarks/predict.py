"""How fast a folder of images is judged, against the detector on images that are already there.

    python -m benchmarks.predict [--quick] [--device cuda]

predict: what `python -m predict --csv` does from the folder's name to the file written, decoding included.
floor: the classifier as it was trained, its layers not merged as predict has them, on the same images as resident
floats, in the same chunks and precision, and nothing else.
The images are PNG files of noise, which compress worst. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from benchmarks.measure import in_turn, print_share
from cli.errors import run_command
from cli.options import add_device_arguments, positive_int
from cmg.config import FineTuneConfig
from cmg.detector import CMGDetector
from cmg.predict import image_files, predict_files, write_csv
from datasets import tasks
from datasets.datasetsHelper import to_float
from models.inference import CHUNK, in_chunks
from training.train_classifier import build_classifier
from utils import pick_precision, start_computing

TASKS = ("same_dataset_mnist", "same_dataset_cifar10")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="Few images, one round: seconds, rough numbers")
    parser.add_argument(
        "--task", choices=TASKS, default=TASKS[0], help="Task whose networks are taken (default: %(default)s)"
    )
    parser.add_argument("--images", type=positive_int, help="Number of images (default: 10,000; 500 with --quick)")
    parser.add_argument(
        "--rounds", type=positive_int, help="Rounds, of which the median counts (default: 3; 1 with --quick)"
    )
    add_device_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    device = start_computing(args.device)
    precision = pick_precision(args.precision, device)
    count, rounds = args.images or (500 if args.quick else 10_000), args.rounds or (1 if args.quick else 3)
    detector = untrained_detector(args.task, device, precision)
    channels, size = detector.model.image_channels, detector.model.image_size
    images = torch.randint(256, (count, channels, size, size), generator=torch.Generator().manual_seed(0))
    resident = to_float(images.to(torch.uint8)).to(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        write_pngs(folder, images.to(torch.uint8).numpy())

        def run_predict():
            predictions = predict_files(detector, image_files([folder])[0], CHUNK[device.type])
            write_csv(Path(name) / "predictions.csv", predictions)

        def run_floor():
            in_chunks(detector.model, resident, precision)

        times = in_turn({"predict": run_predict, "floor": run_floor}, rounds, device)
    print_share(args.task, "predict", count, times, device, precision)


def untrained_detector(task_name: str, device: torch.device, precision: str) -> CMGDetector:
    """A detector of the task's size, with random weights."""
    torch.manual_seed(0)
    model = build_classifier(tasks.TASKS[task_name]).to(device, memory_format=torch.channels_last)
    detector = CMGDetector(model, None, FineTuneConfig(num_ind=6, sigma=1.0, precision=precision))
    detector.adopt(model.classifier.state_dict()).threshold = 0.0
    return detector


def write_pngs(folder: Path, images) -> None:
    """Images, uint8 [N, C, S, S], as the files 00000.png, 00001.png, …"""
    folder.mkdir()
    for number, image in enumerate(images):
        array = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(array).save(folder / f"{number:05d}.png")


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
