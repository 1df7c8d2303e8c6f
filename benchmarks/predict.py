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

from utils import add_device_arguments, positive_int, run_command

TASKS = ("same_dataset_mnist", "same_dataset_cifar10")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few images, one round: seconds, rough figures")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="whose networks (default: %(default)s)")
    parser.add_argument("--images", type=positive_int, help="(default: 10,000; 500 with --quick)")
    parser.add_argument("--rounds", type=positive_int, help="of which the median counts (default: 3; 1)")
    add_device_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    import torch

    from benchmarks.measure import in_turn, peak_mib, print_json
    from datasets.datasetsHelper import to_float
    from evaluation.predictions import predict_files, write_csv
    from models.inference import CHUNK, in_chunks
    from predict import image_files
    from utils import environment, pick_device, pick_precision

    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    count, rounds = args.images or (500 if args.quick else 10_000), args.rounds or (1 if args.quick else 3)
    detector = untrained_detector(args.task, device)
    channels, size = detector.config.image_channels, detector.config.image_size
    images = torch.randint(256, (count, channels, size, size), generator=torch.Generator().manual_seed(0))
    resident = to_float(images.to(torch.uint8)).to(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        write_pngs(folder, images.to(torch.uint8).numpy())

        def run_predict():
            predictions = predict_files(detector, image_files([folder])[0], CHUNK[device.type], precision)
            write_csv(Path(name) / "predictions.csv", predictions)

        def run_floor():
            in_chunks(detector.model, resident, precision)

        times = in_turn({"predict": run_predict, "floor": run_floor}, rounds, device)
    rate = {who: count / taken for who, taken in times.items()}
    share = rate["predict"] / rate["floor"]
    print(f"{args.task} on {device} in {precision}: {count:,} images, ", end="")
    print(f"predict {rate['predict']:,.0f} images/s, floor {rate['floor']:,.0f}, share {share:.2f}")
    print_json(
        {
            "images": count,
            "images_per_second": round(rate["predict"], 1),
            "floor_images_per_second": round(rate["floor"], 1),
            "floor_share": round(share, 3),
            "peak_mib": peak_mib(device),
            "precision": precision,
        }
        | environment(device)
    )


def untrained_detector(task_name: str, device):
    """A detector of the task's size, whose weights are chance."""
    import torch

    import datasets.tasks
    from evaluation.detector import Detector, DetectorConfig
    from training.train_classifier import build_classifier

    torch.manual_seed(0)
    task = datasets.tasks.TASKS[task_name]
    config = DetectorConfig(
        task=task_name,
        classes=task.class_names("partition1"),
        image_size=task.image_size,
        image_channels=task.image_channels,
        logits=task.logits,
        networks=task.networks,
        score="CMG-energy",
        threshold=0.0,
        threshold_from="no",
    )
    return Detector(build_classifier(task).to(device, memory_format=torch.channels_last), config)


def write_pngs(folder: Path, images) -> None:
    """Images, uint8 [N, C, S, S], as the files 00000.png, 00001.png, …"""
    from PIL import Image

    folder.mkdir()
    for number, image in enumerate(images):
        array = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        Image.fromarray(array).save(folder / f"{number:05d}.png")


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
