"""Stage 2 from networks and images to figures: encode once, fine-tune, score every OOD set."""

from __future__ import annotations

import copy
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets.datasetsHelper import Images, load_ind, load_ood, split_validation, to_float
from datasets.tasks import COMMANDS, Task, default_checkpoint
from evaluation.baselines import baseline_scores
from evaluation.detector import Detector, DetectorConfig, acceptance_threshold
from evaluation.report import BASELINES, IND_TEST
from models.inference import for_inference, in_chunks
from models.main_model import MainModel
from models.vae import ConditionalVAE
from training.checkpoints import load_network
from training.fine_tune import (
    MODES,
    FeatureBank,
    FineTuneConfig,
    FreshFeatures,
    Margins,
    PseudoOOD,
    Run,
    find_margins,
    fine_tune,
)
from training.joint import JointObjective, train_jointly
from training.loop import fingerprint
from training.scored import Scored, run_scores, summarise, untouched_scores
from training.stages import STAGES
from training.train_classifier import ClassifierObjective, build_classifier
from utils import Progress, UserError, derive_seed, resume_path


def train_command(command: str, task: Task, task_name: str, partition: str, path: Path) -> str:
    """What to type to make a checkpoint: in `path`, or where `train` puts it if `path` is another file."""
    options = task.options or ("--task", task_name, "--partition", partition)
    where = ("--params-dict-name", str(path))
    if path.is_file():
        where = ("--restart",) if path == default_checkpoint(task_name, partition, command) else ()
    return shlex.join(["python", "-m", "train", *options, "--command", command, *where])


def load_stage1(
    command: str, task: Task, task_name: str, partition: str, path: Path, device: torch.device
) -> tuple[nn.Module, dict]:
    """A network that `train --command COMMAND` made, frozen and in eval mode, and how it was made.

    Raises:
        UserError: the file is missing or is not what it should be.
    """
    network = STAGES[command].build(task)
    remedy = f"Make it with: {train_command(command, task, task_name, partition, path)}"
    expected = {"command": command, "task": task_name, "partition": partition}
    origin = load_network(path, network, f"the {COMMANDS[command]} of {task_name}", expected, remedy)
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), origin


def load_networks(
    task: Task, task_name: str, partition: str, paths: dict[str, Path], device: torch.device
) -> tuple[MainModel, ConditionalVAE, dict[str, dict]]:
    """Classifier and CVAE, and how each was made; `paths` and origins are by training command.

    Raises:
        UserError: a file is missing or is not what it should be.
    """
    missing = {command: path for command, path in paths.items() if not path.is_file()}
    if missing:
        files = " and ".join(f"{path}: no such file" for path in missing.values())
        commands = [train_command(command, task, task_name, partition, path) for command, path in missing.items()]
        remedy = " && ".join(commands)
        unfinished = [str(path) for path in missing.values() if resume_path(path).is_file()]
        if unfinished:
            raise UserError(f"{' and '.join(unfinished)}: the training stopped before its end; give its command again")
        raise UserError(f"{files}. Make what is missing with: {remedy}")
    loaded = {command: load_stage1(command, task, task_name, partition, paths[command], device) for command in COMMANDS}
    origins = {command: origin for command, (_, origin) in loaded.items()}
    return loaded["train_classifier"][0], loaded["train_cvae"][0], origins


JOINT = "joint"  # what --tune names beside `TUNABLE`: nothing is tuned, all is trained anew
TUNABLE = {"head": "classifier", "last-layer": "classifier.fc2"}  # what --tune names -> submodule of MainModel


def split_model(model: MainModel, tune: str) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    """The frozen part, images [B, C, S, S] -> [B, F], and the part that is fine-tuned, [B, F] -> [B, classes].

    `tune` is "head", as in the method, or "last-layer", which freezes the head's first layer too.
    """
    tuned = model.get_submodule(TUNABLE[tune])
    if tune == "head":
        return model.features, tuned
    return lambda images: model.classifier.hidden(model.features(images)), tuned


def make_detector(inputs: Stage2Inputs, run: Run, tune: str, config: FineTuneConfig) -> Detector:
    """The classifier with the head that `run` ended with, and the threshold that 95 % of the IND images kept from
    training, or where there are none of the IND test images, do not exceed in the precision of `config`."""
    task, data = inputs.task, inputs.data
    model = copy.deepcopy(inputs.classifier)
    model.get_submodule(TUNABLE[tune]).load_state_dict(run.last)
    threshold_from, images = (
        ("IND validation", data.validation.images) if len(data.validation) else ("IND test", data.test.images)
    )
    about = DetectorConfig(
        task=inputs.task_name,
        classes=task.class_names(inputs.partition),
        image_size=task.image_size,
        image_channels=task.image_channels,
        logits=task.logits,
        networks=task.networks,
        score=MODES[run.mode].scores[config.score_energy],
        threshold=math.inf,
        threshold_from=threshold_from,
    )
    detector = Detector(model, about)
    features = in_chunks(lambda part: detector.features(to_float(part)), images, config.precision)
    threshold = acceptance_threshold(detector.judge(features)[0])
    return Detector(model, replace(about, threshold=threshold))


@dataclass(frozen=True)
class Stage2Data:
    """Real images, uint8 and on the device: IND with labels, OOD sets by name; `validation` may be empty."""

    train: Images
    validation: Images
    test: Images
    ood: dict[str, Tensor]

    def counts(self) -> dict[str, int]:
        """How many images there are of each kind."""
        parts = {"IND training": self.train, "IND validation": self.validation, "IND test": self.test} | self.ood
        return {name: len(images) for name, images in parts.items()}

    def encode(self, features: Callable[[Tensor], Tensor], precision: str) -> FeatureBank:
        """The features of all images."""

        progress = Progress(sum(self.counts().values()), "encoding")

        def run(images: Tensor) -> Tensor:
            return in_chunks(lambda part: features(to_float(part)), images, precision, progress)

        bank = FeatureBank(
            train=run(self.train.images),
            train_labels=self.train.labels,
            validation=run(self.validation.images) if len(self.validation) else torch.empty(0),
            test=run(self.test.images),
            test_labels=self.test.labels,
            ood={name: run(images) for name, images in self.ood.items()},
        )
        progress.close()
        return bank


def load_data(
    task: Task, partition: str, ood_names: Sequence[str], data_dir: Path, origins: dict[str, dict], device: torch.device
) -> Stage2Data:
    """The images of stage 2, with those apart that the networks kept from training.

    Args:
        origins: how each network was made, by what messages call it; {} where that is not known.

    Raises:
        UserError: the networks kept different images from training, or were trained on others than these.
    """
    (first, kept), (second, also_kept) = ((name, origin.get("val_fraction", 0.0)) for name, origin in origins.items())
    if kept != also_kept:
        raise UserError(
            f"{first} was trained with --val-fraction {kept} and {second} with {also_kept}: train both with the same"
        )
    train, test = load_ind(task, partition, data_dir)
    train, validation = split_validation(train, kept)
    trained_on = fingerprint(train)
    place = task.folders[task.dataset].root if task.dataset in task.folders else data_dir
    for name, origin in origins.items():
        if origin.get("data", trained_on) != trained_on:
            raise UserError(
                f"{name} was trained on other images than those now in {place}: put them back, or "
                "train it anew with --restart"
            )
    ood = {name: load_ood(task, partition, name, data_dir).to(device) for name in ood_names}
    return Stage2Data(train.to(device), validation.to(device), test.to(device), ood)


@dataclass(frozen=True)
class Stage2Inputs:
    """The networks that stage 1 made, how each was made by training command, and the images."""

    task_name: str
    task: Task
    partition: str
    classifier: MainModel
    cvae: ConditionalVAE
    origins: dict[str, dict]
    data: Stage2Data

    @property
    def summary(self) -> str:
        """How many images there are, in words."""
        return ", ".join(f"{n:,} {name}" for name, n in self.data.counts().items())


def load_inputs(
    task_name: str,
    task: Task,
    partition: str,
    paths: dict[str, Path],
    ood_names: Sequence[str],
    data_dir: Path,
    device: torch.device,
) -> Stage2Inputs:
    """Everything that stage 2 needs; see `load_networks` and `load_data`, whose `UserError`s it raises."""
    classifier, cvae, origins = load_networks(task, task_name, partition, paths, device)
    made = {"the classifier": origins["train_classifier"], "the CVAE": origins["train_cvae"]}
    data = load_data(task, partition, ood_names, data_dir, made, device)
    return Stage2Inputs(task_name, task, partition, classifier, cvae, origins, data)


def run_stage2(
    inputs: Stage2Inputs,
    config: FineTuneConfig,
    modes: Sequence[str],
    seeds: Sequence[int],
    tune: str,
    score_pseudo: bool = False,
    baselines: Sequence[str] = (),
    banks: dict[tuple[str, str], FeatureBank] | None = None,
) -> dict:
    """Fine-tune what `tune` names of the classifier, see `fine_tune_and_score`; or, where it is "joint", train the
    task's classifier anew, see `training.joint`.

    Args:
        baselines: post-hoc detectors to report beside it, of `evaluation.baselines.POST_HOC`.
        banks: keeps the features of the images, by what is split off and precision, from one call with the same
            inputs to the next.

    Returns:
        what `tune_and_score` does, and "left_out": the reason for each of `baselines` that fails.
    """
    compared, left_out = compare(inputs, config, baselines) if baselines else ([], {})
    task, cvae, data = inputs.task, inputs.cvae, inputs.data
    split = "head" if tune == JOINT else tune
    features, head = split_model(for_inference(inputs.classifier), split)
    banks = {} if banks is None else banks
    if (split, config.precision) not in banks:
        banks[split, config.precision] = data.encode(features, config.precision)
    bank, pseudo = banks[split, config.precision], make_pseudo(cvae, features, config, data.train.images.device)
    if tune != JOINT:
        results = tune_and_score(head, bank, pseudo, config, modes, seeds, score_pseudo, compared)
        return results | {"left_out": left_out}
    scored, runs = untouched_scores(head, bank) + compared, []
    for mode in modes:
        uses_margins, all_margins = MODES[mode].uses_margins, None
        if uses_margins:
            all_margins = find_margins(head, bank, FreshFeatures(pseudo, config, seeds), config)
        for s, seed in enumerate(seeds):
            margins = Margins(all_margins.m_in[s], all_margins.m_out[s]) if uses_margins else None
            run = Run(mode, seed, all_margins.of(s) if uses_margins else None)
            torch.manual_seed(derive_seed(seed, "initialisation", JOINT))
            model = build_classifier(task).to(bank.train.device, memory_format=torch.channels_last)
            objective = JointObjective(ClassifierObjective(task.augment), pseudo, mode, margins, config)
            train_jointly(model, data.train, objective, config, seed)
            run.last = {name: p.detach() for name, p in model.classifier.named_parameters()}
            own = data.encode(model.features, config.precision)
            fresh = make_pseudo(cvae, model.features, config, data.train.images.device) if score_pseudo else None
            scored += run_scores(model.classifier, own, run, config, fresh)
            runs.append(run)
    return summarise(scored, runs, bank, config.num_ind) | {"left_out": left_out}


def compare(inputs: Stage2Inputs, config: FineTuneConfig, names: Sequence[str]) -> tuple[list[Scored], dict[str, str]]:
    """Post-hoc detectors on the untouched classifier, but those that are shown always; and the reasons of those that
    are left out, by name."""
    sets = {IND_TEST: inputs.data.test.images} | inputs.data.ood
    found, left_out = baseline_scores(
        inputs.classifier, inputs.data.train, sets, config.num_ind, config.precision, names
    )
    compared = [Scored(name, None, "untouched", None, found[name]) for name in found if name not in BASELINES]
    return compared, left_out


def make_pseudo(
    cvae: ConditionalVAE, features: Callable[[Tensor], Tensor], config: FineTuneConfig, device: torch.device
) -> PseudoOOD:
    """The source of pseudo-OOD images that the configuration asks for."""
    return PseudoOOD(
        for_inference(cvae), features, config.num_ind, config.sigma, config.precision, device, config.mixing
    )


def fine_tune_and_score(
    features: Callable[[Tensor], Tensor],
    head: nn.Module,
    cvae: ConditionalVAE,
    data: Stage2Data,
    config: FineTuneConfig,
    modes: Sequence[str],
    seeds: Sequence[int],
) -> dict:
    """Fine-tune `head` on `features` for every mode and seed and score every OOD set: `tune_and_score`.

    Args:
        features: images [B, C, S, S] in [0, 1] -> [B, F]; the frozen part of the network.
        head: [B, F] -> logits.
    """
    bank, pseudo = (
        data.encode(features, config.precision),
        make_pseudo(cvae, features, config, data.train.images.device),
    )
    return tune_and_score(head, bank, pseudo, config, modes, seeds)


def tune_and_score(
    head: nn.Module,
    bank: FeatureBank,
    pseudo: PseudoOOD,
    config: FineTuneConfig,
    modes: Sequence[str],
    seeds: Sequence[int],
    score_pseudo: bool = False,
    compared: Sequence[Scored] = (),
) -> dict:
    """Fine-tune `head` for every mode and seed, in copies, and score every OOD set.

    Args:
        score_pseudo: score as many new pseudo-OOD images as there are IND test images, too.
        compared: other detectors to report.

    Returns:
        "detection": rows of detection figures; "ind": rows of figures on IND test images; "runs": curves and
        margins; "scores": the `Scored` images behind all of them; "tuned": for each run its `Run`, whose heads can
        be saved.
    """
    runs = fine_tune(head, bank, pseudo, config, modes, seeds)
    scored = [*untouched_scores(head, bank), *compared]
    for run in runs:
        scored += run_scores(head, bank, run, config, pseudo if score_pseudo else None)
    return summarise(scored, runs, bank, config.num_ind)
