"""Judge images with a fine-tuned detector: the class of each, its OOD score, and whether it is IND or OOD.

    python -m eval --mode CMG-energy --save-detector detector.pt
    python -m predict --detector detector.pt photo.png folder
    python -m predict --detector detector.pt folder --csv predictions.csv
    python -m predict --detector detector.pt --export detector.onnx

Images may have any size, in grey or colour: they are brought to what the detector takes. Folders are searched at any
depth, hidden files left out. A file that cannot be decoded and a folder that cannot be searched are named and left out;
the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cli.errors import UserError, run_command
from cli.options import add_device_arguments, positive_int


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE_OR_FOLDER", help="Image or folder of images to judge"
    )
    parser.add_argument("--detector", type=Path, required=True, help="File that eval --save-detector wrote")
    parser.add_argument("--csv", type=Path, help="Write the predictions to this file instead of the terminal")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE.onnx",
        help="Write the detector as an ONNX graph, instead of judging images",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, help="Images at once through the network (default: by the device)"
    )
    add_device_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    if args.export and args.images:
        raise UserError("--export writes the detector and judges no images; leave one of them out")
    if args.export and args.csv:
        raise UserError("--export writes the detector and no predictions; leave --csv out")
    if not args.images and not args.export:
        raise UserError("name images or folders to judge, or --export FILE.onnx")
    from cmg import export, predict

    if args.export:
        return export.export_detector(args.detector, args.export)
    return predict.predict(args.images, args.detector, args.csv, args.batch_size, args.device, args.precision)


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
