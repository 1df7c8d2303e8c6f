"""A detector's judgement of image files: decoded in threads, a chunk at a time, and sent through the network."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from datasets.datasetsHelper import to_float
from datasets.folders import Chunk, read_chunks
from evaluation.detector import Detector
from evaluation.report import align
from utils import Progress, autocast, printable, replacing

VERDICTS = ("IND", "OOD")
DECODED = 2048  # images at once: a processor that turns from decoding to the network and back loses time
AHEAD = {"cuda": 2, "cpu": 0}  # chunks decoded while the network works; on a processor each would hold up the other
COLUMNS = ("file", "class", "score", "verdict", "error")


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
    detector: Detector, paths: Sequence[Path], count: int, precision: str, progress: Progress | None = None
) -> list[Prediction]:
    """Judge image files in their order, `count` at a time; a file that cannot be decoded is a prediction with an error.

    Images are brought to the detector's size and channels as those of `--task custom` are.
    """
    config, predictions = detector.config, []
    device = next(detector.model.parameters()).device
    shape = config.image_channels, config.image_size
    with autocast(device, precision):
        for chunk in read_chunks(paths, *shape, max(count, DECODED), AHEAD[device.type]):
            predictions += _judge(detector, chunk, count)
            if progress:
                progress.advance(len(chunk.paths))
    return predictions


def _judge(detector: Detector, chunk: Chunk, count: int) -> Iterator[Prediction]:
    config, device = detector.config, next(detector.model.parameters()).device
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
        yield Prediction(str(path), config.classes[number], score, VERDICTS[score > config.threshold], None, changed)


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
