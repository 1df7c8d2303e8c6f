"""CSI's own rows of the tables, and what `python -m eval` makes of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from csi.network import CSINet, load_finished
from csi.options import CSIData
from csi.scores import VIEWS

from cli.files import check_outputs, write_json
from cli.options import Machine
from cmg.scores import msp
from datasets.datasetsHelper import Images, load_ind, load_ood
from datasets.obtain import files_read
from evaluation.report import PRETRAINED, detection_row, format_ind_table, format_table, ind_metrics
from utils import environment, pick_precision, start_computing


def report(
    data: CSIData,
    chosen: Sequence[tuple[str, str]],
    ood_names: Sequence[str],
    path: Path,
    machine: Machine,
    output: Path,
    argv: Sequence[str],
) -> None:
    """Evaluate the checkpoint in `path`, print the tables and write them to `output`.

    Args:
        chosen: pairs of rows, "ind" or "detection", and a view.

    Raises:
        UserError: the checkpoint or the images are not what they should be.
    """
    check_outputs(output, inputs=[path], images=partial(files_read, data.experiment, machine.data_dir, ood_names))
    device = start_computing(machine.device)
    precision = pick_precision(machine.precision, device, data.experiment.task.precision)
    model, origin = load_finished(path, data, device)
    _, test = load_ind(data.experiment, machine.data_dir)
    test = test.to(device)
    ood = {name: load_ood(data.experiment, name, machine.data_dir).to(device) for name in ood_names}
    results = {"ind": [], "detection": []}
    for view in dict.fromkeys(view for _, view in chosen):
        found = csi_rows(view, model, test, ood, data.experiment.num_ind, precision)
        for rows in results:
            results[rows] += found[rows] if (rows, view) in chosen else []
    write_json(
        output,
        {
            "command": shlex.join(["python", "-m", "eval", *argv]),
            "dataset": data.name,
            "positive_class": "OOD",
            "checkpoint": {"file": str(path), "origin": origin},
            "images": {"IND test": len(test)} | {name: len(images) for name, images in ood.items()},
            "environment": environment(device) | {"precision": precision},
        }
        | results,
    )
    tables = {"ind": format_ind_table, "detection": format_table}
    print("\n\n".join(table(results[rows]) for rows, table in tables.items() if results[rows]))
    print(f"\nwrote {output}")


def csi_rows(view: str, model: CSINet, test: Images, ood: dict[str, Tensor], classes: int, precision: str) -> dict:
    """What the network reaches with a view, a key of `VIEWS`: "ind" and "detection" rows, one of those per OOD set."""
    method = f"CSI, {view}"
    logits = VIEWS[view](model, test.images, precision)
    ind_scores = msp(logits)
    detection = [
        detection_row(method, name, None, PRETRAINED, ind_scores, msp(VIEWS[view](model, images, precision)))
        for name, images in ood.items()
    ]
    ind = {"method": method, "at": PRETRAINED} | ind_metrics(logits, test.labels, classes)
    return {"ind": [ind], "detection": detection}
