"""The JSON files of `python -m eval` and `reproduction.ablations`, as the report reads them back.

Imports no torch: jobs that are done are found in no time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from cli.errors import UserError
from cli.files import fits, read_json
from cmg.scores import SCORES
from datasets.tasks import PRETRAINED
from reproduction.former import with_todays_names


def share(value: object) -> bool:
    """From 0 to 1."""
    return fits(value, float) and 0 <= value <= 1


def some(shape: object) -> Callable[[object], bool]:
    """A list that is not empty."""
    return lambda value: fits(value, [shape]) and len(value) > 0


def optional(shape: object) -> Callable[[object], bool]:
    return lambda value: value is None or fits(value, shape)


def one_of(names: Collection[str]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value in names


def shares(value: object) -> bool:
    """By name, at least one."""
    return isinstance(value, dict) and len(value) > 0 and all(map(share, value.values()))


ALWAYS = ("MSP", "energy")  # of the pretrained classifier: rows of every result
DETECTION_ROW = {"method": str, "ood_dataset": str, "seed": optional(int), "at": str, "auroc": share}
DETECTION_ROW |= dict.fromkeys(("fpr95", "aupr_out", "aupr_in"), (share,))
IND_ROW = {"method": str, "at": str, "accuracy": share, "ece": share}
MARGINS = {"m_in": float, "m_out": float}
RUN = {"mode": str, "seed": int, "margins": optional(MARGINS), "curve": [{"step": int, "auroc": shares}]}
RESULT = {
    "task": str,
    "partition": str,
    "config": {"loss_energy": one_of(("all", "ind")), "score": optional(one_of(SCORES))},
    "seeds": [int],
    "detection": some(DETECTION_ROW),
    "ind": [IND_ROW],
    "runs": some(RUN),
    "images": dict,
    "environment": dict,
    "left_out": (dict,),
    "unchanged": (str,),
}
VARIANT = {"config": dict, "detection": [DETECTION_ROW], "ind": [IND_ROW], "runs": [RUN]}
ABLATIONS = {"config": {"sigma": float, "mixing_probability": float}, "pretrained": [DETECTION_ROW]}


def read_reported(path: Path) -> dict:
    """What eval wrote, under today's names. Raises `UserError` when the file is missing or is something else."""
    content = read(path, RESULT, "a JSON file that python -m eval wrote")
    rows = [(row["ood_dataset"], row["method"], row["seed"], row["at"]) for row in content["detection"]]
    tuned = {method for _, method, _, at in rows if at == "last"}
    sets = {ood for ood, _, _, at in rows if at != "max"}
    always = {(ood, method) for ood in sets for method in ALWAYS}
    if (
        len(set(rows)) < len(rows)
        or not always <= {(ood, method) for ood, method, _, at in rows if at == PRETRAINED}
        or not {ood for ood, *_ in rows} <= sets
        or not {run["mode"] for run in content["runs"]} <= tuned
    ):
        raise UserError(f"{path}: its rows do not go together; remove it and run python -m eval again")
    return content


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
