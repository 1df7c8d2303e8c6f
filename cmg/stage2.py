"""Stage 2 from checkpoints and images to results: encode once, fine-tune, score every OOD set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cli.errors import UserError
from cmg.config import JOINT, FineTuneConfig
from cmg.data import FeatureBank, Stage2Data, load_data
from cmg.engine import Run, fine_tune
from cmg.joint import train_jointly
from cmg.pseudo_ood import PseudoOOD
from cmg.results import Results, Scored, compare, pretrained_scores, run_scores
from datasets.datasetsHelper import Images
from datasets.tasks import Experiment
from evaluation.report import PSEUDO
from models.backbone import Backbone
from models.inference import for_inference
from models.main_model import MainModel
from models.vae import ClassConditionalVAE
from training.backbone import identity, prepare
from training.networks import load_networks
from training.train_cvae import reconstruct
from training.train_feature_cvae import share_explained
from utils import check_memory, generator

TUNABLE = {"head": "classifier", "last-layer": "classifier.fc2"}  # what --tune names -> submodule of MainModel


@dataclass(frozen=True)
class Stage2Inputs:
    """The networks that stage 1 made, how each was made by training command, and the images."""

    experiment: Experiment
    classifier: MainModel
    cvae: ClassConditionalVAE
    origins: dict[str, dict]
    data: Stage2Data
    backbone: Backbone | None = None


def load_inputs(
    experiment: Experiment,
    paths: Mapping[str, Path],
    ood_names: Sequence[str],
    data_dir: Path,
    device: torch.device,
    precision: str = "fp32",
) -> Stage2Inputs:
    """Everything that stage 2 needs; see `prepare`, `load_networks` and `load_data`, whose `UserError`s it raises.

    `precision` is that of a backbone.
    """
    experiment, encode, backbone = prepare(experiment, data_dir)
    classifier, cvae, origins = load_networks(experiment, paths, device)
    made = {"the classifier": origins["train_classifier"], "the CVAE": origins["train_cvae"]}
    ours = identity(backbone) if backbone else {}
    for name, origin in made.items():
        if any(origin.get(key, value) != value for key, value in ours.items()):
            raise UserError(
                f"{name} was trained on the features of another backbone, or of other weights of it: give the "
                "same --backbone-weights, or train it again with --restart"
            )
    data = load_data(experiment, ood_names, data_dir, made, device, lambda images: encode(images, precision, device))
    return Stage2Inputs(experiment, classifier, cvae, origins, data, backbone)


class Split(NamedTuple):
    """A classifier in two.

    Attributes:
        features: the frozen part, images [B, C, S, S] -> [B, F].
        head: the part that is fine-tuned, [B, F] -> [B, classes].
        of_extracted: what of the frozen part lies behind the extractor, the extractor's features -> [B, F].
        hidden: what of the head lies before the last layer, [B, F] -> [B, 512].
    """

    features: Callable[[Tensor], Tensor]
    head: nn.Module
    of_extracted: Callable[[Tensor], Tensor] = lambda extracted: extracted
    hidden: Callable[[Tensor], Tensor] = lambda features: features


def split_model(model: MainModel, tune: str) -> Split:
    """`tune` is "head", as in the method, or "last-layer", which freezes the head's first layer too."""
    tuned = model.get_submodule(TUNABLE[tune])
    if tune == "head":
        return Split(model.features, tuned, hidden=model.classifier.hidden)
    return Split(lambda images: model.classifier.hidden(model.features(images)), tuned, model.classifier.hidden)


@dataclass(frozen=True)
class Stage2:
    """Stage 2 of one classifier, put together: `eval`, `CMGDetector`, CSI+CMG and the benchmark run this.

    Attributes:
        head: what is fine-tuned, features [B, F] -> logits [B, classes]; copies are tuned, it stays as it is.
        pseudo: the source of pseudo-OOD images; its `features` is the frozen part, images [B, C, S, S] -> [B, F].
    """

    head: nn.Module
    pseudo: PseudoOOD

    @classmethod
    def of(cls, split: Split, cvae: ClassConditionalVAE, config: FineTuneConfig) -> Stage2:
        """From a classifier's two parts and the CVAE, which is copied into its faster form."""
        pseudo = PseudoOOD(for_inference(cvae), split.features, config, split.of_extracted, split.head)
        return cls(split.head, pseudo)

    def encode(self, data: Stage2Data) -> FeatureBank:
        """The features of all real images."""
        return data.encode(self.pseudo.features, self.pseudo.config.precision)

    def fine_tune(
        self, bank: FeatureBank, modes: Sequence[str], seeds: Sequence[int], show_progress: bool = True
    ) -> list[Run]:
        """A copy of the head, fine-tuned, for every mode and seed."""
        return fine_tune(self.head, bank, self.source_for(bank)[0], modes, seeds, show_progress)

    def source_for(self, bank: FeatureBank) -> tuple[PseudoOOD, str]:
        """The source of pseudo-OOD images with the residuals that it needs, and "". Or where the CVAE explains less of
        the IND training features than `least_explained`, so that its images would teach nothing: the same asked for no
        epochs, and the reason.

        Raises:
            MemoryShortage: there is no room for the residuals.
            ValueError: `config.residuals` or `least_explained` without a CVAE of the features that are tuned on.
        """
        pseudo, config = self.pseudo, self.pseudo.config
        if not (config.residuals or config.least_explained):
            return pseudo, ""
        if pseudo.vae.makes != "features" or config.tune != "head":
            raise ValueError("residuals and least_explained need a CVAE of features, and tune head")
        check_memory(3 * bank.train.nbytes, bank.train.device, f"the residuals of {len(bank.train):,} IND images")
        made, _ = reconstruct(pseudo.vae, Images(bank.train, bank.train_labels), config.precision)
        if config.residuals:
            pseudo = replace(pseudo, residuals=bank.train - made)
        least = config.least_explained
        if not least or share_explained(pseudo.vae, bank.train, made) >= least:
            return pseudo, ""
        reason = f"the generator explains less than {100 * least:.0f} % of the variance of the IND training features"
        return replace(pseudo, config=replace(config, epochs=0)), f"{reason} (--least-explained)"

    def results(
        self,
        bank: FeatureBank,
        modes: Sequence[str],
        seeds: Sequence[int],
        score_pseudo: bool = False,
        compared: Sequence[Scored] = (),
    ) -> Results:
        """Fine-tune for every mode and seed, and score every OOD set; `compared` are other detectors."""
        pseudo, reason = self.source_for(bank)
        runs = fine_tune(self.head, bank, pseudo, modes, seeds)
        scored = [*pretrained_scores(self.head, bank), *compared]
        for run in runs:
            scored += run_scores(self.head, bank, run, pseudo, score_pseudo)
        return Results(scored, runs, bank, pseudo.config, unchanged=reason)


def run_stage2(
    inputs: Stage2Inputs,
    config: FineTuneConfig,
    modes: Sequence[str],
    seeds: Sequence[int],
    *,
    score_pseudo: bool = False,
    baselines: Sequence[str] = (),
    banks: dict[tuple[str, str], FeatureBank] | None = None,
) -> Results:
    """Fine-tune what `config.tune` names of the classifier for every mode and seed, and score every OOD set; or, where
    it is "joint", train the task's classifier anew for each, see `cmg.joint`.

    Args:
        score_pseudo: score as many new pseudo-OOD images as there are IND test images, too. Where there are no OOD
            images these take their place.
        baselines: post-hoc detectors to report beside it, of `evaluation.baselines.POST_HOC`.
        banks: keeps the features of the images, by what is split off and precision, from one call with the same
            inputs to the next.
    """
    tune = "head" if config.tune == JOINT else config.tune
    split = split_model(for_inference(inputs.classifier), tune)
    stage2 = Stage2.of(split, inputs.cvae, config)
    banks, key = {} if banks is None else banks, (tune, config.precision)
    if key not in banks:
        banks[key] = stage2.encode(inputs.data)
    bank = banks[key]
    extracted = {} if inputs.data.ood else {PSEUDO: samples(inputs, config, seeds[0], bank)}
    with torch.no_grad():
        bank = replace(bank, ood=bank.ood | {name: split.of_extracted(part) for name, part in extracted.items()})
    compared, left_out = [], {}
    if baselines:
        compared, left_out = compare(inputs.classifier, split.hidden, bank, inputs.data, config.num_ind, baselines)
    if config.tune != JOINT:
        results = stage2.results(bank, modes, seeds, score_pseudo, compared)
        return replace(results, left_out=left_out)
    scored = [*pretrained_scores(stage2.head, bank), *compared]
    runs, more = train_jointly(
        inputs.experiment.task, inputs.data, stage2.head, bank, stage2.pseudo, modes, seeds, score_pseudo
    )
    return Results(scored + more, runs, bank, config, left_out)


@torch.no_grad()
def samples(inputs: Stage2Inputs, config: FineTuneConfig, seed: int, bank: FeatureBank) -> Tensor:
    """What stands for OOD images where there are none: pseudo-OOD samples that fine-tuning does not see, as many as
    there are IND test images; the extractor's features of them, [N, F]."""
    split = split_model(for_inference(inputs.classifier), "head")
    pseudo, _ = Stage2.of(split, inputs.cvae, config).source_for(bank)
    return pseudo.encode(pseudo.draw(len(inputs.data.test), generator(seed, "scored")))
