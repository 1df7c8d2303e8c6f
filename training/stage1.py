"""Stage 1: from a task to the checkpoint of one network."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from cli.options import Machine
from datasets.datasetsHelper import Images
from datasets.tasks import Experiment
from training.backbone import encoded, identity, prepare
from training.checkpoints import weights_checksum
from training.config import RunOptions, TrainingOptions
from training.loop import warmup_schedule
from training.networks import load_stage1
from training.runs import Training, format_metrics, train
from training.stages import STAGES, stage_of
from training.train_feature_cvae import encoder_of


def train_network(
    experiment: Experiment,
    command: str,
    path: Path,
    loop: dict[str, object],
    chosen: TrainingOptions,
    options: RunOptions,
    machine: Machine,
) -> None:
    """Train one network of stage 1, or go on with its training. Raises `UserError` as `training.runs.train`.

    Args:
        command: "train_classifier" or "train_cvae".
        path: of the checkpoint.
        loop: what differs from the task's and the method's in `LoopConfig`.
    """
    experiment, encode, backbone = prepare(experiment, machine.data_dir)
    task, stage = experiment.task, stage_of(experiment.task, command)
    if chosen.kl_weight is not None:
        task = replace(task, kl_weight=chosen.kl_weight)
    what = {"task": experiment.name, "partition": experiment.partition, "val_fraction": chosen.val_fraction}
    what |= {"kl_weight": task.kl_weight} if command == "train_cvae" else {}

    def report(model: nn.Module, test_images: Images, precision: str) -> str:
        metrics = stage.evaluate(model, test_images, experiment.num_ind, precision)
        return "\n".join([f"IND test images: {format_metrics(metrics)}", *filter(None, [stage.remark(metrics)])])

    see, more = partial(encoded, encode), {}
    if backbone:
        what |= identity(backbone)
        more = {"encode": see, "start": lambda model, features: model.convE.fit(features.images)}
    if stage is STAGES["train_feature_cvae"]:
        path_of_classifier = chosen.classifier or experiment.checkpoint("train_classifier")
        classifier, _ = load_stage1(experiment, "train_classifier", path_of_classifier, torch.device("cpu"))
        what |= {"space": task.space, "classifier": weights_checksum(classifier)}
        extract = encoder_of(classifier)
        more = {
            "encode": lambda images, precision, device: extract(see(images, precision, device), precision, device),
            "start": lambda model, features: model.standardise.fit(features.images),
            "reads": (path_of_classifier,),
        }

    training = Training(
        command=command,
        about=f"{command}: {experiment}",
        what=what,
        build=partial(stage.build, task),
        optimizer=lambda model, learning_rate: torch.optim.Adam(model.parameters(), learning_rate, fused=True),
        moments=2,
        objective=stage.objective(task),
        report=report,
        schedule=warmup_schedule,
        compact=stage.compact,
        expand=stage.expand,
        **more,
    )
    own = {"epochs": task.epochs[command], "batch_size": task.batch_size}
    train(training, experiment, path, own | loop, options, machine)
