"""What `python -m main` does once its arguments are read: CSI's own metrics, then those of CMG-energy on `linear`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from csi.network import Bn1AndLinear, CSINet, load_finished
from csi.options import CSIData
from csi.report import csi_rows
from csi.scores import VIEWS

from cli.errors import UserError
from cli.files import check_outputs, write_json
from cli.options import Machine
from cmg.config import FineTuneConfig, config_for
from cmg.data import Stage2Data, load_data
from cmg.stage2 import Split, Stage2
from datasets.obtain import files_read
from evaluation.report import PRETRAINED, format_ind_table, format_table
from models.vae import ConditionalVAE
from training.networks import load_stage1, train_command
from utils import environment, pick_precision, start_computing


def report_before_and_after(
    data: CSIData,
    ood_names: Sequence[str],
    seeds: list[int],
    csi_path: Path,
    cvae_path: Path,
    options: dict[str, object],
    train_bn1: bool,
    machine: Machine,
    output: Path,
    argv: Sequence[str],
) -> None:
    """Load both networks, run, print the tables and write everything to `output`.

    Raises:
        UserError: a checkpoint or the images are not what they should be.
    """
    images = partial(files_read, data.experiment, machine.data_dir, ood_names)
    check_outputs(output, inputs=[csi_path, cvae_path], images=images)
    device = start_computing(machine.device)
    precision = pick_precision(machine.precision, device, data.experiment.task.precision)
    config = config_for(data.experiment, precision, **options)
    network, csi_origin = load_finished(csi_path, data, device)
    if not cvae_path.is_file():
        command = train_command(data.experiment, "train_cvae", cvae_path.resolve())
        raise UserError(
            f"{cvae_path}: no such file; it should hold the CVAE. Make it, in the repository's root, with: {command}"
        )
    cvae, cvae_origin = load_stage1(data.experiment, "train_cvae", cvae_path, device)
    origins = {"CSI": csi_origin, "the CVAE": cvae_origin}
    images = load_data(data.experiment, ood_names, machine.data_dir, origins, device)
    print(f"{data.name} on {device} in {config.precision}: {images.summary}", flush=True)
    tables = before_and_after(network, cvae, images, config, seeds, train_bn1)
    about = {
        "command": shlex.join(["python", "-m", "main", *argv]),
        "dataset": data.name,
        "positive_class": "OOD",
        "config": asdict(config) | {"train_bn1": train_bn1},
        "seeds": seeds,
        "images": images.counts(),
        "checkpoints": {
            "csi": {"file": str(csi_path), "origin": csi_origin},
            "cvae": {"file": str(cvae_path), "origin": cvae_origin},
        },
        "environment": environment(device),
    }
    write_json(output, about | tables)
    print(f"\n{format_table(tables['detection'])}\n\n{format_ind_table(tables['ind'])}\n\nwrote {output}")


def before_and_after(
    network: CSINet, cvae: ConditionalVAE, data: Stage2Data, config: FineTuneConfig, seeds: list[int], train_bn1: bool
) -> dict[str, list[dict]]:
    """CSI's own metrics, single view and rotation ensemble, then those of CMG-energy on `linear`.

    The rotation ensemble reads `joint_distribution_layer`, which CMG does not touch: it has no "after".

    Returns:
        what `cmg.results.Results.tables` returns, the detection rows grouped by OOD set, CSI's first.
    """
    before = [csi_rows(view, network, data.test, data.ood, config.num_ind, config.precision) for view in VIEWS]
    if train_bn1:
        features, head = flat_pixels, Bn1AndLinear(network)
    else:
        features, head = network.features, network.linear
    stage2 = Stage2.of(Split(features, head), cvae, config)
    tables = stage2.results(stage2.encode(data), ["CMG-energy"], seeds).tables()
    # CSI's own rows hold the softmax score and the accuracy of the pretrained head already.
    after = {
        "ind": [row for row in tables["ind"] if row["at"] != PRETRAINED],
        "detection": [row for row in tables["detection"] if row["method"] != "MSP"],
    }
    merged = {rows: [*before[0][rows], *before[1][rows], *after[rows]] for rows in after}
    merged["detection"].sort(key=lambda row: list(data.ood).index(row["ood_dataset"]))
    return tables | merged


def flat_pixels(images: torch.Tensor) -> torch.Tensor:
    """[B, C, S, S] -> [B, C * S * S]: what `Bn1AndLinear` reads in the place of features."""
    return images.flatten(1)
