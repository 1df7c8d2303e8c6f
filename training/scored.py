"""What stage 2 reports: every detector's scores of all images, and the figures that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from evaluation.report import BASELINES, IND_TEST, PSEUDO, detection_row, ind_figures
from training.fine_tune import FeatureBank, FineTuneConfig, PseudoOOD, Run, head_logits, score_logits
from utils import generator, replacing


@dataclass(frozen=True)
class Scored:
    """The images as one detector sees them.

    Attributes:
        method, seed, at: which detector: its name, its seed (None where there is no chance in it), its step.
        logits: of the IND test images, or None where the detector is no classifier of its own.
        scores: OOD scores [N] by image set: `IND_TEST`, the OOD sets, perhaps `PSEUDO`.
    """

    method: str
    seed: int | None
    at: str
    logits: Tensor | None
    scores: dict[str, Tensor]


def untouched_scores(head: nn.Module, bank: FeatureBank) -> list[Scored]:
    """The classifier before fine-tuning under the scores of `BASELINES`."""
    start = dict(head.named_parameters())
    logits = {name: head_logits(head, start, features) for name, features in test_sets(bank).items()}
    scores = {method: {name: score(values) for name, values in logits.items()} for method, score in BASELINES.items()}
    return [Scored(method, None, "untouched", logits[IND_TEST], scores[method]) for method in BASELINES]


def run_scores(
    head: nn.Module, bank: FeatureBank, run: Run, config: FineTuneConfig, pseudo: PseudoOOD | None = None
) -> list[Scored]:
    """A run's head after the last step and at the validated one; with `pseudo` its images too."""
    sets, scored = test_sets(bank), []
    if pseudo:
        sets[PSEUDO] = pseudo.encode(pseudo.draw(len(bank.test), generator(run.seed, "scored")))
    for at, parameters in (("last", run.last), ("validated", run.validated)):
        if parameters is not None:
            logits = {name: head_logits(head, parameters, features) for name, features in sets.items()}
            scores = {name: score_logits(values, run.mode, config) for name, values in logits.items()}
            scored.append(Scored(run.mode, run.seed, at, logits[IND_TEST], scores))
    return scored


def test_sets(bank: FeatureBank) -> dict[str, Tensor]:
    return {IND_TEST: bank.test} | bank.ood


def summarise(scored: list[Scored], runs: list[Run], bank: FeatureBank, num_ind: int) -> dict:
    """Scores and runs as figures; see `fine_tune_and_score`."""
    detection, ind = [], []
    for one in scored:
        classifier = {"method": "classifier" if one.at == "untouched" else one.method, "seed": one.seed, "at": one.at}
        if one.logits is not None and classifier not in [{key: row[key] for key in classifier} for row in ind]:
            ind.append(classifier | ind_figures(one.logits, bank.test_labels, num_ind))
        for name in bank.ood:
            detection.append(detection_row(one.method, name, one.seed, one.at, one.scores[IND_TEST], one.scores[name]))
    for run in runs:
        for name in bank.ood if run.curve else ():
            best = max(check.auroc[name] for check in run.curve)
            detection.append({"method": run.mode, "ood_dataset": name, "seed": run.seed, "at": "max", "auroc": best})
    methods = list(dict.fromkeys(one.method for one in scored))
    detection.sort(key=lambda row: (list(bank.ood).index(row["ood_dataset"]), methods.index(row["method"])))
    return {
        "detection": detection,
        "ind": ind,
        "runs": [run_summary(run) for run in runs],
        "scores": scored,
        "tuned": runs,
    }


def save_scores(path: Path, scored: Sequence[Scored]) -> None:
    """Write the scores of all images as a compressed numpy archive: METHOD/SEED/STEP/IMAGES -> [N]."""
    arrays = {
        f"{one.method}/{'-' if one.seed is None else one.seed}/{one.at}/{name}": scores.cpu().numpy()
        for one in scored
        for name, scores in one.scores.items()
    }
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def run_summary(run: Run) -> dict:
    """A run as plain values, without its parameters."""
    return {
        "mode": run.mode,
        "seed": run.seed,
        "margins": run.margins and {"m_in": run.margins[0], "m_out": run.margins[1]},
        "validated_step": run.validated_step,
        "curve": [check._asdict() for check in run.curve],
    }
