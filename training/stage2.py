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
from datasets.tasks import COMMANDS, Task
from evaluation.detector import Detector, DetectorConfig, acceptance_threshold
from evaluation.report import BASELINES, detection_row, ind_figures
from models.inference import in_chunks
from models.main_model import MainModel
from models.vae import ConditionalVAE
from training.checkpoints import load_network
from training.fine_tune import MODES, FeatureBank, FineTuneConfig, PseudoOOD, Run, fine_tune, head_logits
from training.loop import fingerprint
from training.stages import STAGES
from utils import Progress, UserError


def train_command(command: str, task: Task, task_name: str, partition: str, path: Path) -> str:
    """What to type to make a checkpoint."""
    options = task.options or ("--task", task_name, "--partition", partition)
    return shlex.join(["python", "-m", "train", *options, "--command", command, "--params-dict-name", str(path)])


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
        raise UserError(f"{files}. Make what is missing with: {remedy}")
    loaded = {command: load_stage1(command, task, task_name, partition, paths[command], device) for command in COMMANDS}
    origins = {command: origin for command, (_, origin) in loaded.items()}
    return loaded["train_classifier"][0], loaded["train_cvae"][0], origins


TUNABLE = {"head": "classifier", "last-layer": "classifier.fc2"}  # what --tune names -> submodule of MainModel


def split_model(model: MainModel, tune: str) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    """The frozen part, images [B, C, S, S] -> [B, F], and the part that is fine-tuned, [B, F] -> [B, classes].

    `tune` is "head", as in the method, or "last-layer", which freezes the head's first layer too.
    """
    tuned = model.get_submodule(TUNABLE[tune])
    if tune == "head":
        return model.features, tuned
    return lambda images: model.classifier.hidden(model.features(images)), tuned


def make_detector(
    classifier: MainModel, run: Run, data: Stage2Data, tune: str, task: Task, task_name: str, partition: str
) -> Detector:
    """The classifier with the head that `run` ended with, and the threshold that 95 % of the IND images kept from
    training, or where there are none of the IND test images, do not exceed."""
    model = copy.deepcopy(classifier)
    model.get_submodule(TUNABLE[tune]).load_state_dict(run.last)
    threshold_from, images = (
        ("IND validation", data.validation.images) if len(data.validation) else ("IND test", data.test.images)
    )
    config = DetectorConfig(
        task=task_name,
        classes=task.class_names(partition),
        image_size=task.image_size,
        image_channels=task.image_channels,
        logits=task.logits,
        networks=task.networks,
        mode=run.mode,
        threshold=math.inf,
        threshold_from=threshold_from,
    )
    scores = in_chunks(lambda part: Detector(model, config)(to_float(part))[0], images, "fp32")
    return Detector(model, replace(config, threshold=acceptance_threshold(scores)))


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
    for name, origin in origins.items():
        if origin.get("data", trained_on) != trained_on:
            raise UserError(f"{name} was trained on other images than those now in place: put them back, or train anew")
    ood = {name: load_ood(task, partition, name, data_dir).to(device) for name in ood_names}
    return Stage2Data(train.to(device), validation.to(device), test.to(device), ood)


def run_stage2(
    classifier: MainModel,
    cvae: ConditionalVAE,
    data: Stage2Data,
    config: FineTuneConfig,
    modes: Sequence[str],
    seeds: Sequence[int],
    tune: str,
) -> dict:
    """Fine-tune what `tune` names of the classifier; see `fine_tune_and_score`."""
    return fine_tune_and_score(*split_model(classifier, tune), cvae, data, config, modes, seeds)


def fine_tune_and_score(
    features: Callable[[Tensor], Tensor],
    head: nn.Module,
    cvae: ConditionalVAE,
    data: Stage2Data,
    config: FineTuneConfig,
    modes: Sequence[str],
    seeds: Sequence[int],
) -> dict:
    """Fine-tune `head` on `features` for every mode and seed and score every OOD set.

    Args:
        features: images [B, C, S, S] in [0, 1] -> [B, F]; the frozen part of the network.
        head: [B, F] -> logits; its parameters are tuned in copies, it stays as it is itself.

    Returns:
        "detection": rows of detection figures; "ind": rows of figures on IND test images; "runs": curves and
        margins; "tuned": for each run its `Run`, whose heads can be saved.
    """
    device = data.train.images.device
    bank = data.encode(features, config.precision)
    pseudo = PseudoOOD(cvae, features, config.num_ind, config.sigma, config.precision, device)
    runs = fine_tune(head, bank, pseudo, config, modes, seeds)
    detection, ind = untouched_rows(head, bank, config.num_ind)
    for run in runs:
        run_detection, run_ind = run_rows(head, bank, run, config.num_ind)
        detection += run_detection
        ind += run_ind
    return {"detection": detection, "ind": ind, "runs": [run_summary(run) for run in runs], "tuned": runs}


def untouched_rows(head: nn.Module, bank: FeatureBank, num_ind: int) -> tuple[list[dict], list[dict]]:
    """Baselines and IND figures of the classifier before fine-tuning."""
    start = dict(head.named_parameters())
    test_logits = head_logits(head, start, bank.test)
    detection = []
    for name, ood_features in bank.ood.items():
        ood_logits = head_logits(head, start, ood_features)
        for method, score in BASELINES.items():
            detection.append(detection_row(method, name, None, "untouched", score(test_logits), score(ood_logits)))
    return detection, [
        {"method": "classifier", "seed": None, "at": "untouched"} | ind_figures(test_logits, bank.test_labels, num_ind)
    ]


def run_rows(head: nn.Module, bank: FeatureBank, run: Run, num_ind: int) -> tuple[list[dict], list[dict]]:
    """Figures of one run: after the last step, at the validated one, and the best AUROC over its checks."""
    detection, ind = [], []
    score = MODES[run.mode].score
    for at, parameters in (("last", run.last), ("validated", run.validated)):
        if parameters is None:
            continue
        test_logits = head_logits(head, parameters, bank.test)
        ind.append(
            {"method": run.mode, "seed": run.seed, "at": at} | ind_figures(test_logits, bank.test_labels, num_ind)
        )
        for name, ood_features in bank.ood.items():
            ood_scores = score(head_logits(head, parameters, ood_features), num_ind)
            detection.append(detection_row(run.mode, name, run.seed, at, score(test_logits, num_ind), ood_scores))
    for name in bank.ood:
        best = max(check.auroc[name] for check in run.curve)
        detection.append({"method": run.mode, "ood_dataset": name, "seed": run.seed, "at": "max", "auroc": best})
    return detection, ind


def run_summary(run: Run) -> dict:
    """A run as plain values, without its parameters."""
    return {
        "mode": run.mode,
        "seed": run.seed,
        "margins": run.margins and {"m_in": run.margins[0], "m_out": run.margins[1]},
        "validated_step": run.validated_step,
        "curve": [check._asdict() for check in run.curve],
    }
