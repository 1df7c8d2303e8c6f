"""The ablation that the paper warns of: the whole classifier trained against pseudo-OOD images from the start.

A new classifier sees in each batch IND images and as many pseudo-OOD images, under the loss of the mode; nothing is
fine-tuned. The margins of CMG-energy are those of the trained classifier, as in the method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datasets.datasetsHelper import Images, to_float
from models.main_model import MainModel
from models.vae import Codes, decode_pseudo_ood
from training.fine_tune import MODES, FineTuneConfig, Margins, PseudoOOD
from training.loop import LoopConfig, Recorder, fit
from training.processes import Processes
from training.train_classifier import ClassifierObjective


@dataclass(frozen=True)
class JointObjective:
    """The loss of a mode on IND images, augmented as for the classifier, and as many pseudo-OOD images.

    `margins` are those of one seed, two tensors [], or None where the mode has none.
    """

    classifier: ClassifierObjective
    pseudo: PseudoOOD
    mode: str
    margins: Margins | None
    config: FineTuneConfig

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (*self.pseudo.draw(count, generator), *self.classifier.draw(count, generator))

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *draws: Tensor) -> dict[str, Tensor]:
        codes, augmentation = Codes(*draws[: len(Codes._fields)]), draws[len(Codes._fields) :]
        ind = to_float(self.classifier.augmented(images, *augmentation))
        with torch.no_grad():
            pseudo = decode_pseudo_ood(self.pseudo.vae, codes, self.pseudo.sigma).float()
        ind_logits, pseudo_logits = model(torch.cat([ind, pseudo])).float().split(len(ind))
        return {"loss": MODES[self.mode].loss(ind_logits, labels, pseudo_logits, self.margins, self.config)}


def train_jointly(
    model: MainModel, train: Images, objective: JointObjective, config: FineTuneConfig, seed: int
) -> MainModel:
    """Train an untrained classifier in place, on the device of the images; return it in eval mode."""
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
    return model.eval().requires_grad_(False)
