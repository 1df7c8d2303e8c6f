"""The networks of stage 1 as they come back from their checkpoints: frozen and in eval mode."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from cli.errors import UserError
from datasets.tasks import COMMANDS, Experiment
from models.main_model import MainModel
from models.vae import ClassConditionalVAE
from training.checkpoints import load_network, weights_checksum
from training.config import resume_path
from training.stages import stage_of


def train_command(experiment: Experiment, command: str, path: Path, classifier: Path | None = None) -> str:
    """What to type to make a checkpoint: in `path`, or where `train` puts it if `path` is another file; a CVAE of
    features on those of `classifier`."""
    where = ("--params-dict-name", str(path))
    if path.is_file():
        where = ("--restart",) if path == experiment.checkpoint(command) else ()
    if command == "train_cvae" and experiment.task.space == "features":
        if classifier not in (None, experiment.checkpoint("train_classifier")):
            where += ("--classifier", str(classifier))
    return shlex.join(["python", "-m", "train", *experiment.options, "--command", command, *where])


def load_stage1(experiment: Experiment, command: str, path: Path, device: torch.device) -> tuple[nn.Module, dict]:
    """A network that `train --command COMMAND` made, frozen and in eval mode, and how it was made.

    Raises:
        UserError: the file is missing or is not what it should be.
    """
    network = stage_of(experiment.task, command).build(experiment.task)
    remedy = f"Make it with: {train_command(experiment, command, path)}"
    expected = {"command": command, "task": experiment.name, "partition": experiment.partition}
    origin = load_network(path, network, f"the {COMMANDS[command]} of {experiment.name}", expected, remedy)
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), origin


def load_networks(
    experiment: Experiment, paths: Mapping[str, Path], device: torch.device
) -> tuple[MainModel, ClassConditionalVAE, dict[str, dict]]:
    """Classifier and CVAE, and how each was made; `paths` and origins are by training command.

    Raises:
        UserError: a file is missing or is not what it should be.
    """
    missing = {command: path for command, path in paths.items() if not path.is_file()}
    if missing:
        unfinished = [str(path) for path in missing.values() if resume_path(path).is_file()]
        if unfinished:
            raise UserError(
                f"{' and '.join(unfinished)}: the training was interrupted; run its command again to finish it"
            )
        files = " and ".join(f"{path}: no such file" for path in missing.values())
        classifier = paths.get("train_classifier")
        remedy = " && ".join(train_command(experiment, command, path, classifier) for command, path in missing.items())
        raise UserError(f"{files}. Make what is missing with: {remedy}")
    loaded = {command: load_stage1(experiment, command, paths[command], device) for command in COMMANDS}
    origins = {command: origin for command, (_, origin) in loaded.items()}
    classifier, cvae = (loaded[command][0] for command in COMMANDS)
    trained_on = origins["train_cvae"].get("classifier")
    if trained_on is not None and trained_on != weights_checksum(classifier):
        raise UserError(
            f"{paths['train_cvae']}: was trained on the features of another classifier than "
            f"{paths['train_classifier']}. Make it anew with: "
            f"{train_command(experiment, 'train_cvae', paths['train_cvae'], paths['train_classifier'])}"
        )
    return classifier, cvae, origins
