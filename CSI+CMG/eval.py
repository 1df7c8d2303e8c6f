"""Accuracy and OOD detection of a CSI checkpoint, single view or rotation ensemble. Run in this folder.

    python -m eval --mode test_acc test_marginalized_acc --load_path ../ckpt/csi_cifar10.pkl
    python -m eval --mode ood ood_marginalized --ood-dataset all

prints a table and writes it to a JSON file.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from csi.options import DATASETS, ROOT, add_csi_arguments, default_checkpoint, remedy
from datasets.tasks import all_ood_datasets
from utils import check_writable, pick_all, run_command

# mode -> (is it about OOD sets, which view)
MODES = {
    "test_acc": (False, "single view"),
    "test_marginalized_acc": (False, "rotation ensemble"),
    "ood": (True, "single view"),
    "ood_marginalized": (True, "rotation ensemble"),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mode", nargs="+", choices=[*MODES, "all"], default=["all"], help="one or several (default: all)"
    )
    add_csi_arguments(parser)
    parser.add_argument(
        "--load_path", "--load-path", type=Path, help="checkpoint, ours or the authors' (default: where train writes)"
    )
    parser.add_argument(
        "--ood-dataset",
        nargs="+",
        choices=[*all_ood_datasets(), "all"],
        default=["all"],
        help="OOD sets (default: all of --dataset)",
    )
    parser.add_argument("--output", type=Path, help="JSON file (default: ../results/csi_DATASET_eval.json)")
    return parser


def main(args: argparse.Namespace) -> None:
    import torch

    from csi.network import load_csi
    from csi.scores import VIEWS, baseline_score
    from datasets.datasetsHelper import load_ind, load_ood
    from evaluation.report import detection_row, format_ind_table, format_table, ind_figures
    from utils import environment, pick_device, pick_precision, write_json

    data = DATASETS[args.dataset]
    modes = pick_all("--mode", args.mode, list(MODES), args.dataset)
    names = pick_all("--ood-dataset", args.ood_dataset, data.task.ood_datasets, args.dataset)
    path = args.load_path or default_checkpoint(args.dataset, "sup_CSI_linear")
    output = args.output or ROOT / "results" / f"csi_{args.dataset}_eval.json"
    check_writable(output)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    expected = {"dataset": args.dataset, "command": "sup_CSI_linear"}
    model, origin = load_csi(path, data.classes, expected, remedy(args.dataset, "sup_CSI_linear"))
    model.to(device, memory_format=torch.channels_last).eval()
    _, test = load_ind(data.task, data.partition, args.data_dir)
    test = test.to(device)
    wants_ood = any(MODES[mode][0] for mode in modes)
    ood = {name: load_ood(data.task, data.partition, name, args.data_dir).to(device) for name in names * wants_ood}

    detection, ind = [], []
    for view in dict.fromkeys(MODES[mode][1] for mode in modes):
        logits = VIEWS[view](model, test.images, precision)
        if (False, view) in map(MODES.get, modes):
            ind.append({"method": view, "at": "untouched"} | ind_figures(logits, test.labels, data.classes))
        if (True, view) in map(MODES.get, modes):
            for name, images in ood.items():
                scores = baseline_score(logits), baseline_score(VIEWS[view](model, images, precision))
                detection.append(detection_row(f"CSI, {view}", name, None, "untouched", *scores))
    tables = [table(rows) for table, rows in ((format_ind_table, ind), (format_table, detection)) if rows]
    print("\n\n".join(tables))
    write_json(
        output,
        {
            "command": shlex.join(["python", "-m", "eval", *args.argv]),
            "dataset": args.dataset,
            "positive_class": "OOD",
            "checkpoint": {"file": str(path), "origin": origin},
            "images": {"IND test": len(test)} | {name: len(images) for name, images in ood.items()},
            "environment": environment(device) | {"precision": precision},
            "detection": detection,
            "ind": ind,
        },
    )
    print(f"\nwrote {output}")


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
