"""From scores to figures, and from figures to tables, as text and in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from datasets import tasks
from evaluation.metrics import accuracy, detection_metrics, expected_calibration_error
from evaluation.scores import energy, msp_score

IND_TEST, PSEUDO = tasks.IND_TEST, tasks.PSEUDO
THE_METHOD = "the method"  # what is compared with changes of it
POSITIVE_CLASS = "OOD is the positive class; a larger score means more likely OOD"

# Scores of the untouched classifier, over all its logits.
BASELINES: dict[str, Callable[[Tensor], Tensor]] = {"MSP": msp_score, "energy": energy}


def ind_figures(logits: Tensor, labels: Tensor, num_ind: int) -> dict[str, float]:
    """Accuracy and calibration on the IND test images."""
    return {"accuracy": accuracy(logits, labels, num_ind), "ece": expected_calibration_error(logits, labels, num_ind)}


def detection_row(
    method: str, ood_dataset: str, seed: int | None, at: str, ind_scores: Tensor, ood_scores: Tensor
) -> dict:
    """One line of results: a method, an OOD set, a seed (None where there is no chance in it) and its step."""
    return {"method": method, "ood_dataset": ood_dataset, "seed": seed, "at": at} | detection_metrics(
        ind_scores, ood_scores
    )


# --- the table ----------------------------------------------------------------------------------

FIGURES = {"auroc": "AUROC", "fpr95": "FPR95", "aupr_out": "AUPR-out", "aupr_in": "AUPR-in"}
NOTES = {
    "last": "after the last step, nothing selected: the figure to stand for",
    "validated": "at the step chosen on IND images kept from training, against pseudo-OOD images",
    "max": "best AUROC over the checks: the paper's protocol, selected on the test images",
    "untouched": "the classifier before fine-tuning",
}


def format_table(rows: list[dict]) -> str:
    """Detection rows as text in per cent, seeds merged into mean ± standard deviation."""
    table = merge_seeds(rows, ["ood_dataset", "method", "at"], FIGURES)
    used = {row["at"] for row in rows}
    notes = [f"{at}: {note}." for at, note in NOTES.items() if at in used]
    return "\n".join(
        [align([["OOD set", "method", "step", *FIGURES.values()], *table]), "", f"{POSITIVE_CLASS}.", *notes]
    )


def format_ind_table(rows: list[dict]) -> str:
    """Rows of figures on IND test images, likewise."""
    figures = {"accuracy": "accuracy", "ece": "ECE (15 bins)"}
    return align([["IND test images", "step", *figures.values()], *merge_seeds(rows, ["method", "at"], figures)])


def merge_seeds(rows: list[dict], keys: list[str], figures: Iterable[str]) -> list[list[str]]:
    """One line for all rows that agree in `keys`: those, then mean and deviation of each figure."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        [*key, *(mean_and_sd([row[f] for row in members if f in row]) for f in figures)]
        for key, members in groups.items()
    ]


def mean_over_seeds(rows: list[dict]) -> list[dict]:
    """Rows that differ in their seed and figures alone as one row of the means."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        names = tuple((key, row[key]) for key in ("method", "ood_dataset", "at") if key in row)
        groups.setdefault(names, []).append({key: value for key, value in row.items() if isinstance(value, float)})
    return [
        dict(names) | {figure: statistics.mean(row[figure] for row in members) for figure in members[0]}
        for names, members in groups.items()
    ]


def align(lines: list[list[str]]) -> str:
    """Lines of cells as text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_sd(values: list[float]) -> str:
    """Per cent: "97.12", or "97.12 ± 0.34" of several values (sample standard deviation), or "-" of none."""
    if not values:
        return "-"
    mean = f"{100 * statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.2f}"
