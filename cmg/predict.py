"""What `python -m predict` does once its arguments are read: image files, decoded in threads, a chunk at a time, and
sent through a detector."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cli.errors import UserError, complain, printable
from cli.files import check_outputs, kind_of, replacing
from cli.progress import Progress, counted
from cmg.detector import CMGDetector
from datasets.datasetsHelper import to_float
from datasets.folders import Chunk, read_chunks
from datasets.search import no_images, search
from evaluation.report import align
from models.inference import chunk_size
from utils import autocast, start_computing

VERDICTS = ("IND", "OOD")
DECODED = 2048  # images at once: a processor that turns from decoding to the network and back loses time
AHEAD = {"cuda": 2, "cpu": 0}  # chunks decoded while the network works; on a processor each would hold up the other
COLUMNS = ("file", "class", "score", "verdict", "error")


def predict(
    images: Sequence[Path],
    detector_path: Path,
    output: Path | None,
    batch_size: int | None,
    device_name: str | None,
    precision: str,
) -> int:
    """Judge images and the images in folders, print the results or write them to `output`, and return the exit status:
    1 if a file could not be decoded.

    Raises:
        UserError: the detector or an image is not there, or a file cannot be written.
    """
    paths, complaints = image_files(images)
    if output:
        check_outputs(output, inputs=[detector_path, *paths])
    device = start_computing(device_name)
    detector = CMGDetector.load(detector_path, device, precision)
    # Without --csv the output is the table, which lines of progress would spoil where it is redirected.
    progress = Progress(len(paths), "predicting", enabled=bool(output) or sys.stderr.isatty())
    predictions = predict_files(
        detector, paths, batch_size or chunk_size(device, detector.read_shape[1] ** 2), progress
    )
    predictions += [Prediction(str(path), error=complaint) for path, complaint in complaints.items()]
    progress.close()

    if output:
        write_csv(output, predictions)
    errors = [prediction.error for prediction in predictions if prediction.error]
    for error in errors:
        complain(f"predict: {printable(error)}")
    if output:
        print(f"wrote {output}")
    else:
        print(f"{format_predictions(predictions)}\n")
    changed = sum(prediction.changed for prediction in predictions)
    if changed:
        channels, size = detector.read_shape
        colour = "grey" if channels == 1 else "colour"
        print(f"converted to {size}x{size} pixels in 8-bit {colour}: {changed:,} of {len(predictions) - len(errors):,}")
    verdicts = [prediction.verdict for prediction in predictions]
    counts = [f"{verdicts.count(verdict):,} {verdict}" for verdict in VERDICTS]
    counts += [f"{len(errors):,} unreadable"] if errors else []
    print(f"{counted(len(predictions), 'image')}: {', '.join(counts)}; {detector.rule()}")
    return 1 if errors else 0


def image_files(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """The files named and those in the folders named, each once; a folder's in the order of their names. And a
    complaint about each thing in a folder that cannot be read.

    Raises:
        UserError: there is no such file or folder, or a folder holds nothing that could be an image.
    """
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


class Prediction(NamedTuple):
    """What a detector makes of one file.

    Attributes:
        label: the IND class that the image looks like most, whatever the verdict.
        score: larger means more likely OOD.
        verdict: one of `VERDICTS`, by the detector's threshold.
        error: why the file could not be decoded; label, score and verdict are None then.
        changed: whether the image was brought to another size or mode.
    """

    file: str
    label: int | str | None = None
    score: float | None = None
    verdict: str | None = None
    error: str | None = None
    changed: bool = False


def predict_files(
    detector: CMGDetector, paths: Sequence[Path], count: int, progress: Progress | None = None
) -> list[Prediction]:
    """Judge image files in their order, `count` at a time; a file that cannot be decoded is a prediction with an error.

    Images are brought to the detector's size and channels as those of `--task custom` are.
    """
    device, predictions = detector.device, []
    with autocast(device, detector.finetuning.precision):  # once for all, which keeps the weights' bf16 copies
        for chunk in read_chunks(paths, *detector.read_shape, max(count, DECODED), AHEAD[device.type]):
            predictions += _judge(detector, chunk, count)
            if progress:
                progress.advance(len(chunk.paths))
    return predictions


def _judge(detector: CMGDetector, chunk: Chunk, count: int) -> Iterator[Prediction]:
    device = detector.device
    readable = [complaint is None for complaint in chunk.complaints]
    judged = iter(())
    if any(readable):
        pixels = chunk.pixels if all(readable) else chunk.pixels[readable]
        parts = torch.from_numpy(pixels).to(device).split(count)
        scores, classes = detector.judge(torch.cat([detector.features(to_float(part)) for part in parts]))
        judged = zip(scores.tolist(), classes.tolist(), strict=True)
    for path, complaint, changed in zip(chunk.paths, chunk.complaints, chunk.changed, strict=True):
        if complaint is not None:
            yield Prediction(str(path), error=complaint)
            continue
        score, number = next(judged)
        if not math.isfinite(score):  # neither above the threshold nor below
            yield Prediction(str(path), error=f"{path}: its score is {score}, no finite number: there is no verdict")
            continue
        yield Prediction(
            str(path), detector.classes[number], score, VERDICTS[score > detector.threshold], None, changed
        )


def write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    """One line for each file under the names `COLUMNS`, whole or not at all."""
    with (
        replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as f,
    ):
        writer = csv.writer(f)
        writer.writerow(COLUMNS)
        writer.writerows(prediction[: len(COLUMNS)] for prediction in predictions)


def format_predictions(predictions: Sequence[Prediction]) -> str:
    """The same without the errors, as a table with aligned columns."""
    lines = [
        [printable(p.file), printable(str(p.label)), f"{p.score:.6g}", p.verdict]
        if p.error is None
        else [printable(p.file), "-", "-", "unreadable"]
        for p in predictions
    ]
    return align([list(COLUMNS[:4]), *lines])
