"""From scores to metrics, and from metrics to tables, as text and in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from datasets import tasks
from evaluation.metrics import accuracy, detection_metrics, expected_calibration_error

IND_TEST, PSEUDO, PRETRAINED = tasks.IND_TEST, tasks.PSEUDO, tasks.PRETRAINED
THE_METHOD = "the method"  # what is compared with changes of it
POSITIVE_CLASS = "OOD is the positive class; a larger score means more likely OOD"

NO_OOD = (
    "No OOD images were given: these figures are of pseudo-OOD samples only, of the kind that CMG is trained against, "
    "and say nothing about real ones. Name a folder of images that should be rejected with --ood-dir."
)

METRICS = {"auroc": "AUROC", "fpr95": "FPR95", "aupr_out": "AUPR-out", "aupr_in": "AUPR-in"}
IND_METRICS = {"accuracy": "accuracy", "ece": "ECE (15 bins)"}


def ind_metrics(logits: Tensor, labels: Tensor, num_ind: int) -> dict[str, float]:
    """Accuracy and calibration on the IND test images."""
    return {"accuracy": accuracy(logits, labels, num_ind), "ece": expected_calibration_error(logits, labels, num_ind)}


def detection_row(
    method: str, ood_dataset: str, seed: int | None, at: str, ind_scores: Tensor, ood_scores: Tensor
) -> dict:
    """One line of results: a method, an OOD set, a seed (None where there is no chance in it) and its step."""
    return {"method": method, "ood_dataset": ood_dataset, "seed": seed, "at": at} | detection_metrics(
        ind_scores, ood_scores
    )


# --- means ---------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """The "mean", "sd" (the sample's; 0 of one value) and "n" of values."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "sd": sd, "n": len(values)}


def aggregate(rows: Iterable[dict], keys: Sequence[str], metrics: Iterable[str]) -> list[dict]:
    """Rows that agree in `keys` as one, with the `spread` of each metric that some of them have."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, key, strict=True))
        | {
            metric: spread(values)
            for metric in metrics
            if (values := [row[metric] for row in members if metric in row])
        }
        for key, members in groups.items()
    ]


def means(rows: Iterable[dict], keys: Sequence[str], metrics: Sequence[str]) -> list[dict]:
    """Rows that agree in `keys` as one row of the means."""
    return [
        {name: value if name in keys else value["mean"] for name, value in row.items()}
        for row in aggregate(rows, keys, metrics)
    ]


def cell(metric: dict[str, float] | None) -> str:
    """A `spread` in per cent: "97.12 ± 0.34", or "97.12" of one value, or "-" of none."""
    if metric is None:
        return "-"
    mean = f"{100 * metric['mean']:.2f}"
    return f"{mean} ± {100 * metric['sd']:.2f}" if metric["n"] > 1 else mean


def mean_and_sd(values: Sequence[float]) -> str:
    """The mean and standard deviation of values in per cent, as `cell` writes them."""
    return cell(spread(values) if values else None)


def cells(summary: Iterable[dict], keys: Sequence[str], metrics: Iterable[str]) -> list[list[str]]:
    """A line of a table for each row of `aggregate`."""
    return [[*(row[key] for key in keys), *(cell(row.get(metric)) for metric in metrics)] for row in summary]


def left_out(results: Iterable[dict]) -> dict[str, str]:
    """Each post-hoc detector that some of the results have left out -> "(the reason)", of several the first, and in how
    many of them."""
    reasons: dict[str, list[str]] = {}
    results = list(results)
    for result in results:
        for name, reason in result.get("left_out", {}).items():
            reasons.setdefault(name, []).append(reason)
    return {
        name: f"({found[0]})" if len(results) == 1 else f"in {len(found)} of {len(results)} results ({found[0]})"
        for name, found in reasons.items()
    }


def heads_left_alone(results: Sequence[dict]) -> str:
    """In how many of the results the head stayed as it was, and why in the first of them; "" where it did in none."""
    reasons = [reason for result in results if (reason := result.get("unchanged"))]
    where = f" in {len(reasons)} of {len(results)} results" if len(results) > 1 else ""
    return f"The head stays as it was{where}: {reasons[0]}" if reasons else ""


# --- the table ----------------------------------------------------------------------------------

NOTES = {
    "last": "after the last step, nothing selected: what to report",
    "validated": "at the step chosen on IND images kept from training, against pseudo-OOD images",
    "max": "best AUROC over the evaluations: the paper's protocol, selected on the test images",
    PRETRAINED: "the classifier before fine-tuning",
}


def format_table(rows: list[dict], left_out: Mapping[str, str] | None = None) -> str:
    """Detection rows as text in per cent, seeds merged into mean ± standard deviation, and under them the detectors
    that are left out, with the reasons."""
    keys = ("ood_dataset", "method", "at")
    table = cells(aggregate(rows, keys, METRICS), keys, METRICS)
    used = {row["at"] for row in rows}
    notes = [f"{at}: {note}." for at, note in NOTES.items() if at in used]
    return "\n".join(
        [align([["OOD set", "method", "step", *METRICS.values()], *table]), "", f"{POSITIVE_CLASS}.", *notes]
        + [f"{name} is left out {reason}." for name, reason in (left_out or {}).items()]
    )


def format_ind_table(rows: list[dict]) -> str:
    """Rows of metrics on IND test images as text in per cent, seeds merged likewise."""
    keys = ("method", "at")
    table = cells(aggregate(rows, keys, IND_METRICS), keys, IND_METRICS)
    return align([["IND test images", "step", *IND_METRICS.values()], *table])


def align(lines: list[list[str]]) -> str:
    """Lines of cells as text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
