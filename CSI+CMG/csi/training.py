"""CSI's training from the images to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from csi.network import CSINet, load_csi
from csi.options import TRAINING_MODES, CSIData, CSIOptions, default_checkpoint, remedy
from csi.scores import VIEWS
from csi.stages import TRAININGS

from cli.files import check_outputs
from cli.options import Machine
from datasets.datasetsHelper import Images
from evaluation.report import ind_metrics
from training.checkpoints import weights_checksum
from training.config import RunOptions
from training.runs import Training, format_metrics, train


def train_csi(
    data: CSIData,
    mode: str,
    path: Path,
    loop: dict[str, object],
    csi: CSIOptions,
    options: RunOptions,
    machine: Machine,
) -> None:
    """Train what `mode` names, or go on with it.

    Args:
        path: of the checkpoint.
        loop: fields of `LoopConfig`, all but the precision.

    Raises:
        UserError: as `training.runs.train`, or the representation cannot be read.
    """
    method, classes = TRAININGS[mode], data.experiment.num_ind
    build, what = start_of(data, mode, path, csi, options)

    def report(model: nn.Module, test_images: Images, precision: str) -> str:
        logits = {name: VIEWS[name](model, test_images.images, precision) for name in TRAINING_MODES[mode].views}
        metrics = {name: ind_metrics(one, test_images.labels, classes) for name, one in logits.items()}
        return "\n".join(f"IND test images, {name}: {format_metrics(one)}" for name, one in metrics.items())

    training = Training(
        command=mode,
        about=f"{mode}: {data.name}",
        # The schedule depends on the number of epochs: unlike a constant rate it cannot be continued beyond them.
        what=what | {"dataset": data.name, "total_epochs": loop["epochs"]},
        build=build,
        optimizer=method.prepare,
        moments=1,
        objective=method.objective(classes),
        report=report,
        schedule=lambda config, count: (
            lambda progress: method.schedule(progress, config.learning_rate, csi.warmup, config.epochs)
        ),
        whole_batches=True,
    )
    train(training, data.experiment, path, loop, options, machine)


def start_of(
    data: CSIData, mode: str, path: Path, csi: CSIOptions, options: RunOptions
) -> tuple[Callable[[], CSINet], dict]:
    """What makes the network as the mode starts from it, and what that depends on."""
    if mode == "sup_simclr_CSI":
        what = {"width": csi.width, "warmup": csi.warmup, "val_fraction": csi.val_fraction}
        return partial(CSINet, data.experiment.num_ind, csi.width), what
    source = csi.load_path or default_checkpoint(data, "sup_simclr_CSI")
    check_outputs(path, options.log, inputs=[source])
    model, origin = load_csi(source, data.experiment.num_ind, {"dataset": data.name}, remedy(data, "sup_simclr_CSI"))
    kept = origin.get("val_fraction", 0.0)
    what = {"width": len(model.bn1.weight), "val_fraction": kept, "representation": weights_checksum(model)}
    return (lambda: model), what
