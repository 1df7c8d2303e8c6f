"""The ablation that the paper advises against: the whole classifier trained against pseudo-OOD images from the start.

A new classifier sees in each batch IND images and as many pseudo-OOD images, under the loss of the mode; nothing is
fine-tuned. The margins of CMG-energy are those of the trained classifier, as in the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cmg.config import JOINT, FineTuneConfig
from cmg.data import FeatureBank, Stage2Data
from cmg.engine import Run, margins_of, start_runs
from cmg.losses import MODES, Margins
from cmg.pseudo_ood import Codes, FreshFeatures, PseudoOOD, decode
from cmg.results import Scored, run_scores
from datasets.datasetsHelper import Images, to_float
from datasets.tasks import Task
from models.main_model import MainModel
from training.config import LoopConfig
from training.loop import fit
from training.processes import Processes
from training.run_state import Recorder
from training.train_classifier import ClassifierObjective, build_classifier
from utils import derive_seed


def train_jointly(
    task: Task,
    data: Stage2Data,
    head: nn.Module,
    bank: FeatureBank,
    pseudo: PseudoOOD,
    modes: Sequence[str],
    seeds: Sequence[int],
    score_pseudo: bool,
) -> tuple[list[Run], list[Scored]]:
    """Train the task's classifier anew for every mode and seed; its runs, which have no curve, and its scores.

    Args:
        head, bank: of the classifier that stage 1 trained, from which the margins come.
        score_pseudo: score pseudo-OOD images, too.
    """
    config = pseudo.config
    uses_margins = any(MODES[mode].uses_margins for mode in modes)
    margins = margins_of(head, bank, FreshFeatures(pseudo, seeds), config) if uses_margins else None
    runs, scored = start_runs(modes, seeds, margins), []
    for (mode, s), run in runs.items():
        of_seed = Margins(margins.m_in[s], margins.m_out[s]) if MODES[mode].uses_margins else None
        torch.manual_seed(derive_seed(run.seed, "initialisation", JOINT))
        model = build_classifier(task).to(bank.train.device, memory_format=torch.channels_last)
        fit_jointly(
            model, data.train, JointObjective(ClassifierObjective(task.augment), pseudo, mode, of_seed), run.seed
        )
        run.last = {name: p.detach() for name, p in model.classifier.named_parameters()}
        own_bank = data.encode(model.features, config.precision)
        scored += run_scores(model.classifier, own_bank, run, replace(pseudo, features=model.features), score_pseudo)
    return list(runs.values()), scored


@dataclass(frozen=True)
class JointObjective:
    """The loss of a mode on IND images, augmented as for the classifier, and as many pseudo-OOD images.

    `margins` are those of one seed, two tensors [], or None where the mode has none.
    """

    classifier: ClassifierObjective
    pseudo: PseudoOOD
    mode: str
    margins: Margins | None

    @property
    def config(self) -> FineTuneConfig:
        return self.pseudo.config

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (*self.pseudo.draw(count, generator), *self.classifier.draw(count, generator))

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *draws: Tensor) -> dict[str, Tensor]:
        codes, augmentation = Codes(*draws[: len(Codes._fields)]), draws[len(Codes._fields) :]
        ind = to_float(self.classifier.augmented(images, *augmentation))
        with torch.no_grad():
            pseudo = decode(self.pseudo.vae, codes, self.config.sigma).float()
        ind_logits, pseudo_logits = model(torch.cat([ind, pseudo])).float().split(len(ind))
        return {"loss": MODES[self.mode].loss(ind_logits, labels, pseudo_logits, self.margins, self.config)}


def fit_jointly(model: MainModel, train: Images, objective: JointObjective, seed: int) -> None:
    """Train an untrained classifier in place, on the device of the images, and leave it in eval mode."""
    config = objective.config
    loop = LoopConfig(
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=seed,
        precision=config.precision,
    )
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate, fused=True)
    recorder = Recorder(name=f"joint {objective.mode}, seed {seed}")
    fit(model, optimizer, train, objective, loop, Processes(train.images.device), recorder)
    model.eval().requires_grad_(False)
