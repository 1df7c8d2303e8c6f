"""The detector to take: the best of those in the table, named in one sentence and written for `predict`."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import eval
from cli.errors import UserError
from cli.options import parse_options
from cmg.config import config_for
from cmg.detector import CMGDetector
from cmg.evaluate import load, make_detector, make_post_hoc, precision_of
from cmg.losses import MODES
from cmg.stage2 import run_stage2
from evaluation.post_hoc import POST_HOC
from evaluation.report import NO_OOD, PRETRAINED, PSEUDO
from reproduction.jobs import Job
from utils import load_checkpoint, start_computing


class Best(NamedTuple):
    """The name of the best detector, and the sentence that says so."""

    method: str
    sentence: str


def best_detector(summary: Sequence[dict]) -> Best:
    """The detector with the best mean AUROC over the OOD sets, CMG after its last step, and how much better than MSP it
    is; without OOD images the best of those that were not trained against pseudo-OOD images. What reads images again
    to judge them cannot be saved, and is named if it is better."""
    found: dict[str, list[float]] = {}
    most = max(row["auroc"]["n"] for row in summary if row["at"] == PRETRAINED)
    blind = {row["ood_dataset"] for row in summary} == {PSEUDO}
    for row in summary:
        if row["at"] in (PRETRAINED, *(() if blind else ("last",))) and row["auroc"]["n"] >= most:
            found.setdefault(row["method"], []).append(row["auroc"]["mean"])  # not what some runs left out
    sets = max(map(len, found.values()))
    means = {method: sum(aurocs) / sets for method, aurocs in found.items() if len(aurocs) == sets}
    can_be_saved = [method for method in means if method in MODES or POST_HOC[method].reads != "images"]
    best, first = max(can_be_saved, key=means.get), max(means, key=means.get)
    if blind:
        return Best(best, f"{NO_OOD} Of the detectors that were not trained against them, {best} is the best on them.")
    over = f" over the {sets} OOD sets" if sets > 1 else ""
    ahead = 100 * (means[best] - means["MSP"])
    than = f", {ahead:.2f} points above MSP" if best != "MSP" else ""
    but = f" (only {first}, which cannot be saved, has more: {100 * means[first]:.2f})" if first != best else ""
    return Best(
        best, f"Best on these OOD images: {best}, with a mean AUROC of {100 * means[best]:.2f}{over}{than}{but}."
    )


def save_best(job: Job, method: str, path: Path) -> CMGDetector:
    """Write a detector of the table, on the networks of a job that is done, to `path`: CMG as it was tuned there with
    its first seed, or a post-hoc detector. One that is there already, of the same results, stays.

    Raises:
        UserError: the images or networks are not what they were, or the file cannot be written.
    """
    (step,) = (step for step in job.steps if step.name == "eval")
    args = parse_options("--eval-args", eval.get_parser(), [*step.argv, *job.machine])
    args.argv = list(step.argv)
    request = eval.read_run(args)
    device = start_computing(request.machine.device)
    origin = {"method": method, "results": hashlib.sha256(step.outputs[0].read_bytes()).hexdigest()}
    with contextlib.suppress(UserError, KeyError, TypeError):  # there is none yet, or no whole one
        if load_checkpoint(path)["origin"] == origin:
            return CMGDetector.load(path, device)
    config = config_for(request.experiment, precision_of(request, device), **request.options)
    inputs = load(request, device)
    if method in MODES:
        detector = make_detector(inputs, run_stage2(inputs, config, [method], request.seeds[:1]))
    else:
        detector = make_post_hoc(inputs, config.precision, method)
    detector.save(path, origin, request.experiment.name)
    return detector
