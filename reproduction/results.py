"""The JSON files of `python -m eval` and `reproduction.ablations`, as the report reads them back.

Imports no torch: jobs that are done are found in no time.
"""

from __future__ import annotations

from pathlib import Path

from cli.errors import UserError
from cli.files import fits, read_json
from reproduction.former import with_todays_names

DETECTION_ROW = {"method": str, "ood_dataset": str, "seed": object, "at": str, "auroc": float} | dict.fromkeys(
    ("fpr95", "aupr_out", "aupr_in"), (float,)
)
IND_ROW = {"method": str, "at": str, "accuracy": float, "ece": float}
RUN = {"mode": str, "margins": object, "curve": [{"step": int, "auroc": dict}]}
RESULT = {
    "task": str,
    "partition": str,
    "config": {"loss_energy": str, "score": object},
    "seeds": [int],
    "detection": [DETECTION_ROW],
    "ind": [IND_ROW],
    "runs": [RUN],
    "images": dict,
    "environment": dict,
    "left_out": (dict,),
}
VARIANT = {"config": dict, "detection": [DETECTION_ROW], "ind": [IND_ROW], "runs": [RUN]}
ABLATIONS = {"config": {"sigma": float, "mixing_probability": float}, "pretrained": [DETECTION_ROW]}


def read_reported(path: Path) -> dict:
    """What eval wrote, under today's names. Raises `UserError` when the file is missing or is something else."""
    return read(path, RESULT, "a JSON file that python -m eval wrote")


def read_ablations(path: Path) -> dict:
    """What reproduction.ablations wrote. Raises `UserError` when the file is missing or is something else."""
    what = "a JSON file that python -m reproduction.ablations wrote"
    content = read(path, ABLATIONS | {"variants": dict}, what)
    if not fits(content["variants"], dict.fromkeys(content["variants"], VARIANT)):
        raise UserError(f"{path}: holds something else; expected {what}")
    return content


def read(path: Path, shape: object, what: str) -> dict:
    """A JSON file of ours, which may have been written under former names."""
    try:
        content = with_todays_names(read_json(path, {}, what))
    except (AttributeError, KeyError, TypeError):
        content = None
    if not fits(content, shape):
        raise UserError(f"{path}: holds something else; expected {what}")
    return content
