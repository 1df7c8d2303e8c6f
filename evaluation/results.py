"""The JSON files of `python -m eval` and `benchmarks.ablations`, as other commands read them back.

Imports no torch: summarising takes no time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from utils import read_json

DETECTION_ROW = {"method": str, "ood_dataset": str, "seed": object, "at": str, "auroc": float} | dict.fromkeys(
    ("fpr95", "aupr_out", "aupr_in"), (float,)
)
IND_ROW = {"method": str, "at": str, "accuracy": float, "ece": float}
RUN = {"mode": str, "margins": object, "curve": [{"step": int, "auroc": dict}]}
RESULT = {
    "task": str,
    "partition": str,
    "config": dict,
    "seeds": [int],
    "detection": [DETECTION_ROW],
    "ind": [IND_ROW],
    "left_out": (dict,),
}
REPORTED = RESULT | {  # with what pictures and pages show
    "config": {"loss_energy": str, "score_energy": str},
    "images": dict,
    "environment": dict,
    "runs": [RUN],
}
VARIANT = {"config": dict, "detection": [DETECTION_ROW], "ind": [IND_ROW], "runs": [RUN]}
ABLATIONS = {"config": {"sigma": float, "mixing": {"probability": float}}, "untouched": [DETECTION_ROW]}


def read_result(path: Path, shape: dict = RESULT) -> dict:
    """What eval wrote. Raises `UserError` when the file is missing or is something else."""
    return read_json(path, shape, "a JSON file that python -m eval wrote")


def read_reported(path: Path) -> dict:
    """The same, with what a report shows of it."""
    return read_result(path, REPORTED)


def read_ablations(path: Path) -> dict:
    """What benchmarks.ablations wrote. Raises `UserError` when the file is missing or is something else."""
    what = "a JSON file that python -m benchmarks.ablations wrote"
    variants = read_json(path, ABLATIONS | {"variants": dict}, what)["variants"]
    return read_json(path, ABLATIONS | {"variants": dict.fromkeys(variants, VARIANT)}, what)


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
