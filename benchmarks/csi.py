"""Speed of CSI's representation step, and the share of it that the network itself takes.

    python -m benchmarks.csi [--quick] [--device cuda]

times whole steps (views, augmentation, forward, loss, backward, LARS and Adam) and, in turn with them, the network's
forward and backward alone on views made before. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "CSI+CMG"))

from csi.augmentation import make_views  # noqa: E402
from csi.network import CSINet  # noqa: E402
from csi.stages import TRAININGS  # noqa: E402

from benchmarks.measure import in_turn, print_json  # noqa: E402
from cli.errors import run_command  # noqa: E402
from cli.options import add_device_arguments, positive_int  # noqa: E402
from datasets.datasetsHelper import to_float  # noqa: E402
from utils import autocast, environment, pick_precision, start_computing

CLASSES = 10


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.csi", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="Take 16 images and 2 repeats instead of 128 and 10")
    parser.add_argument("--batch-size", type=positive_int, help="Images per step, of 8 views each")
    parser.add_argument("--repeats", type=positive_int, help="Rounds, of which the median counts (default: 10)")
    parser.add_argument("--width", type=positive_int, default=64, help="Channels of the first stage (default: 64)")
    add_device_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    device = start_computing(args.device)
    precision = pick_precision(args.precision, device)
    count, repeats = args.batch_size or (16 if args.quick else 128), args.repeats or (2 if args.quick else 10)
    torch.manual_seed(0)
    model = CSINet(CLASSES, args.width).to(device, memory_format=torch.channels_last)
    stage = TRAININGS["sup_simclr_CSI"]
    optimizer, objective = stage.prepare(model, 1.0), stage.objective(CLASSES)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.arange(count, device=device) % CLASSES
    flips = torch.rand(count, 2, device=device) < 0.5
    views = objective.augment(make_views(to_float(images), flips))

    def whole_step() -> None:
        with autocast(device, precision):
            loss = objective(model, images, labels, flips)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def network_alone() -> None:
        with autocast(device, precision):
            outputs = model(views, "simclr_layer", "linear")
        optimizer.zero_grad()
        torch.autograd.backward(list(outputs.values()), [torch.ones_like(output) for output in outputs.values()])

    times = in_turn({"step": whole_step, "network": network_alone}, repeats, device)
    step, network = times["step"], times["network"]
    result = {
        "images_per_second": round(count / step, 2),
        "views_per_second": round(8 * count / step, 1),
        "step_seconds": round(step, 4),
        "network_seconds": round(network, 4),
        "network_share": round(network / step, 4),
        "batch_size": count,
        "width": args.width,
        "repeats": repeats,
        "precision": precision,
    } | environment(device)
    print(f"{result['images_per_second']} images/s, of whose time the network takes {100 * network / step:.1f} %")
    print_json(result)


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
