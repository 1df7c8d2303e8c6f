"""From scores to figures, and from figures to tables, as text and in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from datasets import tasks
from evaluation.metrics import accuracy, detection_metrics, expected_calibration_error
from evaluation.scores import energy, msp_score

IND_TEST, PSEUDO = tasks.IND_TEST, tasks.PSEUDO
THE_METHOD = "the method"  # what is compared with changes of it
POSITIVE_CLASS = "OOD is the positive class; a larger score means more likely OOD"

FIGURES = {"auroc": "AUROC", "fpr95": "FPR95", "aupr_out": "AUPR-out", "aupr_in": "AUPR-in"}
IND_FIGURES = {"accuracy": "accuracy", "ece": "ECE (15 bins)"}
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


# --- means ---------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """The "mean", "sd" (the sample's; 0 of one value) and "n" of values."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "sd": sd, "n": len(values)}


def summarise(rows: Iterable[dict], keys: Sequence[str], figures: Iterable[str]) -> list[dict]:
    """Rows that agree in `keys` as one, with the `spread` of each figure that some of them have."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, key, strict=True))
        | {
            figure: spread(values)
            for figure in figures
            if (values := [row[figure] for row in members if figure in row])
        }
        for key, members in groups.items()
    ]


def means(rows: Iterable[dict], keys: Sequence[str], figures: Sequence[str]) -> list[dict]:
    """Rows that agree in `keys` as one row of the means."""
    return [
        {name: value if name in keys else value["mean"] for name, value in row.items()}
        for row in summarise(rows, keys, figures)
    ]


def cell(figure: dict[str, float] | None) -> str:
    """A `spread` in per cent: "97.12 ± 0.34", or "97.12" of one value, or "-" of none."""
    if figure is None:
        return "-"
    mean = f"{100 * figure['mean']:.2f}"
    return f"{mean} ± {100 * figure['sd']:.2f}" if figure["n"] > 1 else mean


def mean_and_sd(values: Sequence[float]) -> str:
    """Likewise, of the values themselves."""
    return cell(spread(values) if values else None)


def cells(summary: Iterable[dict], keys: Sequence[str], figures: Iterable[str]) -> list[list[str]]:
    """A line of a table for each row of `summarise`."""
    return [[*(row[key] for key in keys), *(cell(row.get(figure)) for figure in figures)] for row in summary]


# --- the table ----------------------------------------------------------------------------------

NOTES = {
    "last": "after the last step, nothing selected: the figure to report",
    "validated": "at the step chosen on IND images kept from training, against pseudo-OOD images",
    "max": "best AUROC over the checks: the paper's protocol, selected on the test images",
    "untouched": "the classifier before fine-tuning",
}


def format_table(rows: list[dict], left_out: Mapping[str, str] | None = None) -> str:
    """Detection rows as text in per cent, seeds merged into mean ± standard deviation, and under them the detectors
    that are left out, with the reasons."""
    keys = ("ood_dataset", "method", "at")
    table = cells(summarise(rows, keys, FIGURES), keys, FIGURES)
    used = {row["at"] for row in rows}
    notes = [f"{at}: {note}." for at, note in NOTES.items() if at in used]
    return "\n".join(
        [align([["OOD set", "method", "step", *FIGURES.values()], *table]), "", f"{POSITIVE_CLASS}.", *notes]
        + [f"{name} is left out {reason}." for name, reason in (left_out or {}).items()]
    )


def format_ind_table(rows: list[dict]) -> str:
    """Rows of figures on IND test images, likewise."""
    keys = ("method", "at")
    table = cells(summarise(rows, keys, IND_FIGURES), keys, IND_FIGURES)
    return align([["IND test images", "step", *IND_FIGURES.values()], *table])


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
