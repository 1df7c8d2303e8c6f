"""What stage 2 reports: every detector's scores of all images, and the rows of metrics that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from cli.files import replacing
from cmg.config import FineTuneConfig
from cmg.data import FeatureBank, Stage2Data
from cmg.engine import Run, head_logits
from cmg.pseudo_ood import PseudoOOD
from cmg.scores import PRETRAINED_SCORES, SCORES
from evaluation.baselines import baseline_scores
from evaluation.report import IND_TEST, PRETRAINED, PSEUDO, detection_row, ind_metrics
from models.inference import in_chunks
from models.main_model import MainModel
from utils import generator


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


@dataclass(frozen=True)
class Results:
    """Everything that stage 2 found: the scores of all images, the runs, whose heads can be saved, the reason for each
    post-hoc detector that is left out, and why the head stayed as it was, where it did."""

    scored: list[Scored]
    runs: list[Run]
    bank: FeatureBank
    config: FineTuneConfig
    left_out: dict[str, str] = field(default_factory=dict)
    unchanged: str = ""

    def detection(self) -> list[dict]:
        """Rows of detection metrics, grouped by OOD set; with the best evaluation of each run as the paper has it."""
        rows = [
            detection_row(one.method, name, one.seed, one.at, one.scores[IND_TEST], one.scores[name])
            for one in self.scored
            for name in self.bank.ood
        ]
        for run in self.runs:
            for name in self.bank.ood if run.curve else ():
                best = max(check.auroc[name] for check in run.curve)
                rows.append({"method": run.mode, "ood_dataset": name, "seed": run.seed, "at": "max", "auroc": best})
        methods = list(dict.fromkeys(one.method for one in self.scored))
        return sorted(
            rows, key=lambda row: (list(self.bank.ood).index(row["ood_dataset"]), methods.index(row["method"]))
        )

    def ind(self) -> list[dict]:
        """Rows of accuracy and calibration on the IND test images, one for each classifier."""
        rows = {}
        for one in self.scored:
            classifier = ("classifier" if one.at == PRETRAINED else one.method, one.seed, one.at)
            if one.logits is not None and classifier not in rows:
                rows[classifier] = dict(zip(("method", "seed", "at"), classifier, strict=True)) | ind_metrics(
                    one.logits, self.bank.test_labels, self.config.num_ind
                )
        return list(rows.values())

    def tables(self) -> dict[str, list[dict] | dict[str, str] | str]:
        """All of it as plain values, for a file."""
        runs = [run_summary(run) for run in self.runs]
        why = {"left_out": self.left_out, "unchanged": self.unchanged}
        return {"detection": self.detection(), "ind": self.ind(), "runs": runs} | why


def pretrained_scores(head: nn.Module, bank: FeatureBank) -> list[Scored]:
    """The classifier before fine-tuning under `PRETRAINED_SCORES`."""
    start = dict(head.named_parameters())
    logits = {name: head_logits(head, start, features) for name, features in test_sets(bank).items()}
    return [
        Scored(method, None, PRETRAINED, logits[IND_TEST], {name: score(values) for name, values in logits.items()})
        for method, score in PRETRAINED_SCORES.items()
    ]


def run_scores(
    head: nn.Module, bank: FeatureBank, run: Run, pseudo: PseudoOOD, score_pseudo: bool = False
) -> list[Scored]:
    """A run's head after the last step and at the validated one; on request of new pseudo-OOD images too."""
    sets, scored, config = test_sets(bank), [], pseudo.config
    if score_pseudo and PSEUDO not in sets:
        sets[PSEUDO] = pseudo.encode(pseudo.draw(len(bank.test), generator(run.seed, "scored")))
    score = SCORES[config.score_of(run.mode)]
    for at, parameters in (("last", run.last), ("validated", run.validated)):
        if parameters is not None:
            logits = {name: head_logits(head, parameters, features) for name, features in sets.items()}
            scores = {name: score(values, config.num_ind) for name, values in logits.items()}
            scored.append(Scored(run.mode, run.seed, at, logits[IND_TEST], scores))
    return scored


def compare(
    classifier: MainModel,
    hidden: Callable[[Tensor], Tensor],
    bank: FeatureBank,
    data: Stage2Data,
    num_ind: int,
    names: Sequence[str],
) -> tuple[list[Scored], dict[str, str]]:
    """Post-hoc detectors on the pretrained classifier, but those that are shown always; and the reasons of those that
    are left out, by name.

    Args:
        hidden: from features of the bank to what the last layer sees, [B, F] -> [B, 512]; runs in fp32.
    """

    def seen(features: Tensor) -> Tensor:
        return in_chunks(hidden, features, "fp32").cpu()

    features = {name: seen(part) for name, part in test_sets(bank).items()}
    images = {IND_TEST: data.test.images} | data.ood
    found, left_out = baseline_scores(classifier, seen(bank.train), bank.train_labels, features, images, num_ind, names)
    compared = [Scored(name, None, PRETRAINED, None, found[name]) for name in found if name not in PRETRAINED_SCORES]
    return compared, left_out


def test_sets(bank: FeatureBank) -> dict[str, Tensor]:
    return {IND_TEST: bank.test} | bank.ood


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
