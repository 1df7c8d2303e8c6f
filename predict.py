"""Judge images with a fine-tuned detector: the class of each, its OOD score, and whether it is IND or OOD.

    python -m eval --mode CMG-energy --save-detector detector.pt
    python -m predict --detector detector.pt photo.png folder
    python -m predict --detector detector.pt folder --csv predictions.csv

Images may have any size, in grey or colour: they are brought to what the detector takes. Folders are searched at any
depth, hidden files left out. A file that cannot be decoded and a folder that cannot be searched are named and left out;
the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils import UserError, add_device_arguments, check_outputs, counted, positive_int, printable, run_command


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="what is to be judged")
    parser.add_argument("--detector", type=Path, required=True, help="file that eval --save-detector wrote")
    parser.add_argument("--csv", type=Path, help="write the predictions to this file instead of the terminal")
    parser.add_argument(
        "--batch-size", type=positive_int, help="images at once through the network (default: by the device)"
    )
    add_device_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    from evaluation.detector import load_detector
    from evaluation.predictions import VERDICTS, Prediction, format_predictions, predict_files, write_csv
    from models.inference import CHUNK
    from utils import Progress, pick_device, pick_precision

    paths, complaints = image_files(args.images)
    if args.csv:
        check_outputs(args.csv, inputs=[args.detector, *paths])
    device = pick_device(args.device)
    detector = load_detector(args.detector, device)
    # Without --csv the output is the table, which lines of progress would spoil where it is redirected.
    progress = Progress(len(paths), "predicting", enabled=bool(args.csv) or sys.stderr.isatty())
    count, precision = args.batch_size or CHUNK[device.type], pick_precision(args.precision, device)
    predictions = predict_files(detector, paths, count, precision, progress)
    predictions += [Prediction(str(path), error=complaint) for path, complaint in complaints.items()]
    progress.close()

    if args.csv:
        write_csv(args.csv, predictions)
    errors = [prediction.error for prediction in predictions if prediction.error]
    for error in errors:
        print(f"predict: {printable(error)}", file=sys.stderr)
    if args.csv:
        print(f"wrote {args.csv}")
    else:
        print(f"{format_predictions(predictions)}\n")
    changed = sum(prediction.changed for prediction in predictions)
    if changed:
        size, colour = detector.config.image_size, "grey" if detector.config.image_channels == 1 else "colour"
        print(f"brought to {size}x{size} pixels in 8-bit {colour}: {changed:,} of {len(predictions) - len(errors):,}")
    verdicts = [prediction.verdict for prediction in predictions]
    counts = [f"{verdicts.count(verdict):,} {verdict}" for verdict in VERDICTS]
    counts += [f"{len(errors):,} unreadable"] if errors else []
    print(f"{counted(len(predictions), 'image')}: {', '.join(counts)}; {detector.config.rule()}")
    return 1 if errors else 0


def image_files(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """The files named and those in the folders named, each once; a folder's in the order of their names. And a
    complaint about each thing in a folder that cannot be read.

    Raises:
        UserError: there is no such file or folder, or a folder holds nothing that could be an image.
    """
    from datasets.folders import kind_of, no_images, search

    files: list[Path] = []
    complaints: dict[Path, str] = {}
    for path in paths:
        try:
            kind = kind_of(path)
        except OSError as error:
            reason = "no such file or folder" if isinstance(error, FileNotFoundError) else error.strerror
            raise UserError(f"{path}: {reason}; expected an image or a folder of images") from None
        if kind == "folder":
            names, of_folder = search(path)
            if not names and not of_folder:
                raise UserError(no_images(path))
            files += [path / name for name in names]
            complaints |= of_folder
        elif kind == "file":
            files.append(path)
        else:
            raise UserError(f"{path}: is a {kind}; expected an image or a folder of images")
    return list(dict.fromkeys(files)), complaints


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
