"""From the results of many jobs to one table: mean ± sd over partitions and training seeds, and paired differences."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cli.errors import UserError
from cli.files import replacing
from evaluation.bootstrap import Pair, paired_auroc_difference
from evaluation.metrics import detection_metrics
from evaluation.report import (
    IND_METRICS,
    IND_TEST,
    METRICS,
    NOTES,
    POSITIVE_CLASS,
    PRETRAINED,
    aggregate,
    cell,
    cells,
    heads_left_alone,
    left_out,
)
from reproduction.former import with_todays_keys
from reproduction.results import read_reported

SHOWN_STEPS = 7  # columns of the table of AUROC over steps, beside the first


@dataclass(frozen=True)
class JobResult:
    """What one job made: the partition and training seed, eval's JSON file and its archive of scores."""

    partition: str
    seed: int
    content: dict
    scores: dict[str, np.ndarray]

    def of(self, method: str, at: str, images: str) -> list[torch.Tensor]:
        """A detector's scores of a set of images, for each of its seeds."""
        return [
            torch.from_numpy(scores)
            for key, scores in self.scores.items()
            if key.startswith(f"{method}/") and key.endswith(f"/{at}/{images}") and key.count("/") == 3
        ]


def read_result(
    partition: str, seed: int, output: Path, scores: Path, expected: Mapping[str, object] | None = None
) -> JobResult:
    """What eval left in its JSON file and its archive of scores.

    Args:
        expected: what the file must say of how it was made, such as its task.

    Raises:
        UserError: a file is damaged, is of something else, or the two do not belong together.
    """
    content, again = read_reported(output), "remove both and run the same command again"
    for key, value in (expected or {}).items():
        if content[key] != value:
            raise UserError(
                f"{output}: is of {key} {content[key]}, expected {value}; remove it and {scores}, then rerun"
            )
    try:
        with np.load(scores) as archive:
            arrays = with_todays_keys(archive)
    except Exception:  # a damaged archive fails in any way that zipfile and numpy know
        raise UserError(f"{scores}: is damaged: remove it and run the same command again") from None
    for key, array in arrays.items():
        if array.dtype.kind != "f" or array.ndim != 1 or not len(array) or not np.isfinite(array).all():
            raise UserError(f"{scores}: {key} is not a list of finite scores: {again} (the other is {output})")
    lengths = {}
    for key, array in arrays.items():
        if lengths.setdefault(key.rsplit("/", 1)[-1], len(array)) != len(array):
            raise UserError(f"{scores}: {key} is of another number of images than the others: {again}")
    for row in content["detection"]:
        if row["at"] == "max":
            continue
        detector = "/".join([row["method"], "-" if row["seed"] is None else str(row["seed"]), row["at"]])
        keys = [f"{detector}/{images}" for images in (IND_TEST, row["ood_dataset"])]
        if lacking := [key for key in keys if key not in arrays]:
            raise UserError(f"{scores}: lacks {lacking[0]}, of which {output} has metrics: {again}")
        found = detection_metrics(*(torch.from_numpy(arrays[key]) for key in keys))
        for name, value in found.items():
            if name in row and abs(value - row[name]) > 1e-6:
                raise UserError(
                    f"{scores}: {detector} has {METRICS[name]} {value:.6f} on {row['ood_dataset']}, in {output} it is "
                    f"{row[name]:.6f}: {again}"
                )
    return JobResult(partition, seed, content, arrays)


def detection_summary(results: Sequence[JobResult]) -> list[dict]:
    """For each OOD set the method's modes, then the others, the best first."""
    rows = [row for result in results for row in result.content["detection"]]
    summary = aggregate(rows, ("ood_dataset", "method", "at"), METRICS)
    sets = list(dict.fromkeys(row["ood_dataset"] for row in summary))
    steps = list(NOTES)

    def place(row: dict) -> tuple:
        ours = row["at"] != PRETRAINED
        order = (row["method"], steps.index(row["at"])) if ours else (-row["auroc"]["mean"],)
        return sets.index(row["ood_dataset"]), not ours, *order

    return sorted(summary, key=place)


def ind_summary(results: Sequence[JobResult]) -> list[dict]:
    """Metrics on the IND test images."""
    return aggregate([row for result in results for row in result.content["ind"]], ("method", "at"), IND_METRICS)


def differences(results: Sequence[JobResult], summary: Sequence[dict]) -> list[dict]:
    """Each mode's last step against the best of the pretrained classifier's detectors, for each OOD set.

    The best is the one with the largest mean AUROC on the test images, so the comparison favours it. The interval is
    `evaluation.bootstrap.paired_auroc_difference`'s over the images, the networks as they are.
    """
    found = []
    for ood in dict.fromkeys(row["ood_dataset"] for row in summary):
        of_set = [row for row in summary if row["ood_dataset"] == ood]
        # Of those that some runs have left out there is no difference over all.
        others = [row for row in of_set if row["at"] == PRETRAINED and row["auroc"]["n"] == len(results)]
        best = max(others, key=lambda row: row["auroc"]["mean"])["method"]
        for mode in (row["method"] for row in of_set if row["at"] == "last"):
            pairs, partitions = [], []
            for result in results:
                (ind,), (out,) = (result.of(best, PRETRAINED, images) for images in (IND_TEST, ood))
                tuned = zip(*(result.of(mode, "last", images) for images in (IND_TEST, ood)), strict=True)
                pairs += [Pair(*scores, ind, out) for scores in tuned]
                partitions += [result.partition] * (len(pairs) - len(partitions))
            value, low, high = paired_auroc_difference(pairs, partitions)
            found.append(
                {
                    "ood_dataset": ood,
                    "method": mode,
                    "best_baseline": best,
                    "difference": value,
                    "low": low,
                    "high": high,
                }
            )
    return found


def unchanged(results: Sequence[JobResult]) -> list[dict]:
    """The jobs whose heads stayed as they were, and why."""
    return [
        {"partition": one.partition, "seed": one.seed, "reason": reason}
        for one in results
        if (reason := one.content.get("unchanged"))
    ]


def at_all_steps(runs: Sequence[dict]) -> list[dict]:
    """The runs, where some head was tuned: one that stayed as it was, and was evaluated once, is the same at all steps
    at which the first of the others was evaluated."""
    curves = [run["curve"] for run in runs if len(run["curve"]) > 1]
    if not curves:
        return []
    steps = [{"step": check["step"]} for check in curves[0]]
    return [
        run | {"curve": [run["curve"][0] | step for step in steps]} if len(run["curve"]) == 1 else run for run in runs
    ]


def steps_summary(results: Sequence[JobResult]) -> list[dict]:
    """AUROC on the way, the mean over all runs: for each OOD set and mode at the last step of each, which is "last"
    where partitions of other sizes make other numbers of steps, and before at 0 and about the half, the quarter, … of
    it, at steps after which all runs were evaluated."""
    runs = at_all_steps([run for result in results for run in result.content["runs"]])
    if not runs:
        return []
    ends = {run["curve"][-1]["step"] for run in runs}
    common = set.intersection(*({check["step"] for check in run["curve"][:-1]} for run in runs)) or {0}
    halves = [min(ends) / 2**k for k in range(1, SHOWN_STEPS)]
    shown = {0, *(min(common, key=lambda step: abs(step - half)) for half in halves)}
    end = ends.pop() if len(ends) == 1 else "last"
    points = [
        (run["mode"], end if check is run["curve"][-1] else check["step"], check["auroc"])
        for run in runs
        for check in run["curve"]
        if check is run["curve"][-1] or check["step"] in shown
    ]
    points.sort(key=lambda point: math.inf if point[1] == "last" else point[1])
    rows = [
        {"ood_dataset": ood, "method": mode, "step": step, "auroc": auroc}
        for mode, step, aurocs in points
        for ood, auroc in aurocs.items()
    ]
    return aggregate(rows, ("ood_dataset", "method", "step"), ("auroc",))


# --- text ---------------------------------------------------------------------------------------


def detection_cells(summary: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of detection."""
    rows = cells(summary, ("ood_dataset", "method", "at"), METRICS)
    counts = [str(row["auroc"]["n"]) for row in summary]
    header = ["OOD set", "method", "step", *METRICS.values(), "n"]
    return without_single_set(header, [[*row, n] for row, n in zip(rows, counts, strict=True)])


def without_single_set(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without its first column, the OOD set, where there is but one, which the notes name: the metrics are what
    a narrow screen should show."""
    if len({row[0] for row in rows}) > 1:
        return header, rows
    return header[1:], [row[1:] for row in rows]


def ind_cells(summary: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of metrics on IND test images."""
    return ["IND test images", "step", *IND_METRICS.values()], cells(summary, ("method", "at"), IND_METRICS)


def steps_cells(summary: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of AUROC over steps: a row for each OOD set and mode, a column for each step."""
    steps = list(dict.fromkeys(row["step"] for row in summary))
    found = {(row["ood_dataset"], row["method"], row["step"]): cell(row["auroc"]) for row in summary}
    lines = dict.fromkeys((row["ood_dataset"], row["method"]) for row in summary)
    rows = [[*line, *(found[(*line, step)] for step in steps)] for line in lines]
    names = (f"step {step:,}" if isinstance(step, int) else f"{step} step" for step in steps)
    return without_single_set(["OOD set", "mode", *names], rows)


def difference_cells(found: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of differences, with what they say."""
    rows = [
        [
            one["ood_dataset"],
            f"{one['method']} (last)",
            one["best_baseline"],
            f"{100 * one['difference']:+.2f}",
            f"{100 * one['low']:+.2f} … {100 * one['high']:+.2f}",
            "wins" if one["low"] > 0 else "loses" if one["high"] < 0 else "undecided",
        ]
        for one in found
    ]
    header = ["OOD set", "mode", "best of the others", "AUROC difference", "95 % interval", "CMG"]
    return without_single_set(header, rows)


def notes(summary: Sequence[dict], results: Sequence[dict]) -> str:
    """What the words in the table mean, what is not in it, and whether heads stayed as they were."""
    used = {row["at"] for row in summary}
    sets = ", ".join(dict.fromkeys(row["ood_dataset"] for row in summary))
    lines = [f"OOD images: {sets}. {POSITIVE_CLASS}. Mean ± standard deviation over n runs: partitions and seeds."]
    lines += [f"{at}: {note}." for at, note in NOTES.items() if at in used]
    lines += [f"{name} is left out {reason}." for name, reason in left_out(results).items()]
    return "\n".join([*lines, *filter(None, [heads_left_alone(results)])])


def write_csv(path: Path, summary: Sequence[dict]) -> None:
    """The table of detection as numbers between 0 and 1."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [f"{metric}_{part}" for metric in METRICS for part in ("mean", "sd")]
        writer.writerow(["ood_dataset", "method", "step", *names, "n"])
        for row in summary:
            values = [row[metric][part] if metric in row else "" for metric in METRICS for part in ("mean", "sd")]
            writer.writerow([row["ood_dataset"], row["method"], row["at"], *values, row["auroc"]["n"]])
