"""Stage 1 from a task to the checkpoint of one network."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from datasets.datasetsHelper import load_ind, split_validation
from datasets.tasks import Experiment
from training.config import LoopConfig, RunOptions, TrainingOptions
from training.loop import fingerprint, warmup_schedule
from training.processes import Processes, joined_processes
from training.runs import format_metrics, is_done, train_to_checkpoint
from training.stages import STAGES
from utils import derive_seed, pick_precision


def train_network(
    experiment: Experiment,
    command: str,
    path: Path,
    loop: dict[str, object],
    training: TrainingOptions,
    options: RunOptions,
    device: str | None,
    precision: str,
    data_dir: Path,
) -> None:
    """Train one network of stage 1, or go on with its training, in this process or as one of torchrun's.

    Args:
        command: a key of `STAGES`.
        path: of the checkpoint.
        loop: what differs from the task's and the method's in `LoopConfig`.
        device, precision: as given, perhaps None and "auto".

    Raises:
        UserError: as `train_to_checkpoint`, or the images cannot be read.
    """
    with joined_processes(device) as processes:
        own = {"epochs": experiment.task.epochs[command], "batch_size": experiment.task.batch_size}
        config = LoopConfig(
            precision=pick_precision(precision, processes.device, experiment.task.precision), **own | loop
        )
        _train(experiment, command, path, config, training, options, precision == "auto", processes, data_dir)


def _train(
    experiment: Experiment,
    command: str,
    path: Path,
    config: LoopConfig,
    training: TrainingOptions,
    options: RunOptions,
    any_precision: bool,
    processes: Processes,
    data_dir: Path,
) -> None:
    task, stage = experiment.task, STAGES[command]
    if training.kl_weight is not None:
        task = replace(task, kl_weight=training.kl_weight)
    training_images, test_images = load_ind(experiment, data_dir)
    training_images, _ = split_validation(training_images, training.val_fraction)
    what = {"command": command, "task": experiment.name, "partition": experiment.partition}
    what |= {"val_fraction": training.val_fraction}
    what |= {"kl_weight": task.kl_weight} if command == "train_cvae" else {}
    what |= {"data": fingerprint(training_images)}
    if is_done(path, what | asdict(config), options, any_precision, show=processes.is_main):
        return

    torch.manual_seed(derive_seed(config.seed, "initialisation", command))
    model = stage.build(task).to(processes.device, memory_format=torch.channels_last)
    stage.compact(model)
    reports = train_to_checkpoint(
        path,
        model,
        torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True),
        training_images,
        stage.objective(task),
        config=config,
        what=what,
        about=f"{command}: {experiment}",
        moments=2,
        processes=processes,
        options=options,
        schedule=warmup_schedule(config, len(training_images)) if config.warmup_steps else None,
        finish=stage.expand,
    )
    if not reports:
        return
    metrics = stage.evaluate(model.eval(), test_images.to(processes.device), experiment.num_ind, config.precision)
    print(f"IND test images: {format_metrics(metrics)}{stage.remark(metrics)}")
    print(f"wrote {path}")
