"""CSI's training from the images to a checkpoint."""

from __future__ import annotations

import zlib
from dataclasses import asdict
from pathlib import Path

import torch

from csi.network import CSINet, load_csi
from csi.options import TRAINING_MODES, CSIData, CSIOptions, default_checkpoint, remedy
from csi.scores import VIEWS
from csi.stages import TRAININGS

from cli.errors import UserError
from cli.files import check_outputs
from datasets.datasetsHelper import load_ind, split_validation
from evaluation.report import ind_metrics
from training.config import LoopConfig, RunOptions
from training.loop import fingerprint
from training.processes import Processes, joined_processes
from training.runs import format_metrics, is_done, train_to_checkpoint
from utils import derive_seed, pick_precision


def train_csi(
    data: CSIData,
    mode: str,
    path: Path,
    loop: dict[str, object],
    csi: CSIOptions,
    options: RunOptions,
    device: str | None,
    precision: str,
    data_dir: Path,
) -> None:
    """Train what `mode` names, or go on with it, in this process or as one of torchrun's.

    Args:
        path: of the checkpoint.
        loop: fields of `LoopConfig`.
        device, precision: as given, perhaps None and "auto".

    Raises:
        UserError: as `train_to_checkpoint`, or the images or the representation cannot be read.
    """
    with joined_processes(device) as processes:
        config = LoopConfig(
            precision=pick_precision(precision, processes.device, data.experiment.task.precision), **loop
        )
        _train(data, mode, path, config, csi, options, precision == "auto", processes, data_dir)


def _train(
    data: CSIData,
    mode: str,
    path: Path,
    config: LoopConfig,
    csi: CSIOptions,
    options: RunOptions,
    any_precision: bool,
    processes: Processes,
    data_dir: Path,
) -> None:
    training, classes, device = TRAININGS[mode], data.experiment.num_ind, processes.device
    torch.manual_seed(derive_seed(config.seed, "initialisation", mode))
    model, what = build(data, mode, path, csi, options)
    # The schedule depends on the number of epochs: unlike a constant rate it cannot be continued beyond them.
    what |= {"command": mode, "dataset": data.name, "total_epochs": config.epochs}
    training_images, test_images = load_ind(data.experiment, data_dir)
    training_images, _ = split_validation(training_images, what["val_fraction"])
    what |= {"data": fingerprint(training_images)}
    if is_done(path, what | asdict(config), options, any_precision, show=processes.is_main):
        return
    if 0 < len(training_images) % config.batch_size < processes.world:
        raise UserError(
            f"--batch_size {config.batch_size}: the last batch of an epoch has fewer images than there are processes "
            f"({processes.world}); choose another size"
        )
    model.to(device, memory_format=torch.channels_last)
    reports = train_to_checkpoint(
        path,
        model,
        training.prepare(model, config.learning_rate),
        training_images,
        training.objective(classes),
        config=config,
        what=what,
        about=f"{mode}: {data.name}",
        moments=1,
        processes=processes,
        options=options,
        schedule=lambda progress: training.schedule(progress, config.learning_rate, csi.warmup, config.epochs),
    )
    if not reports:
        return
    model.eval()
    test_images = test_images.to(device)
    for name in TRAINING_MODES[mode].views:
        logits = VIEWS[name](model, test_images.images, config.precision)
        print(f"IND test images, {name}: {format_metrics(ind_metrics(logits, test_images.labels, classes))}")
    print(f"wrote {path}")


def build(data: CSIData, mode: str, path: Path, csi: CSIOptions, options: RunOptions) -> tuple[CSINet, dict]:
    """The network as the mode starts from it, and what its making depends on."""
    if mode == "sup_simclr_CSI":
        return CSINet(data.experiment.num_ind, csi.width), {
            "width": csi.width,
            "warmup": csi.warmup,
            "val_fraction": csi.val_fraction,
        }
    source = csi.load_path or default_checkpoint(data, "sup_simclr_CSI")
    check_outputs(path, options.log, inputs=[source])
    model, origin = load_csi(source, data.experiment.num_ind, {"dataset": data.name}, remedy(data, "sup_simclr_CSI"))
    return model, {
        "width": len(model.bn1.weight),
        "val_fraction": origin.get("val_fraction", 0.0),
        "representation": weights_checksum(model),
    }


def weights_checksum(model: CSINet) -> int:
    """By which a resumed run knows the representation it started from."""
    checksum = 0
    for tensor in model.state_dict().values():
        checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
    return checksum
