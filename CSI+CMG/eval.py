"""Accuracy and OOD detection of a CSI checkpoint, single view or rotation ensemble. Run in this folder.

    python -m eval --mode test_acc test_marginalized_acc --load_path ../ckpt/csi_cifar10.pkl
    python -m eval --mode ood ood_marginalized --ood-dataset all
    python -m eval --task custom --ind-dir ../birds --ood-dir ../insects

prints a table and writes it to a JSON file.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from csi.options import add_csi_arguments, data_from_arguments, default_checkpoint, root
from utils import changed_options, check_outputs, pick_all, run_command, short_name

# mode -> (which rows, which view)
MODES = {
    "test_acc": ("ind", "single view"),
    "test_marginalized_acc": ("ind", "rotation ensemble"),
    "ood": ("detection", "single view"),
    "ood_marginalized": ("detection", "rotation ensemble"),
}
RESULT = ("mode", "ood_dataset", "precision", "ood_dir", "load_path")  # options that make another result


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mode", nargs="+", choices=[*MODES, "all"], default=["all"], help="one or several (default: all)"
    )
    add_csi_arguments(parser)
    parser.add_argument(
        "--load_path", "--load-path", type=Path, help="checkpoint, ours or the authors' (default: where train writes)"
    )
    parser.add_argument("--ood-dataset", nargs="+", default=["all"], help="OOD sets (default: all of --dataset)")
    parser.add_argument("--output", type=Path, help="JSON file (default: ../results/csi_DATASET_eval.json)")
    return parser


def main(args: argparse.Namespace) -> None:
    from csi.network import load_finished
    from csi.report import csi_rows
    from datasets.datasetsHelper import load_ind, load_ood
    from evaluation.report import format_ind_table, format_table
    from utils import environment, pick_device, pick_precision, write_json

    data = data_from_arguments(args)
    chosen = [MODES[mode] for mode in pick_all("--mode", args.mode, list(MODES), data.name)]
    names = []
    if any(rows == "detection" for rows, _ in chosen):
        names = pick_all("--ood-dataset", args.ood_dataset, data.task.ood_datasets, data.name)
    path = args.load_path or default_checkpoint(data, "sup_CSI_linear")
    changed = changed_options(args, get_parser(), RESULT)
    output = args.output or root() / "results" / f"{short_name(f'csi_{data.name}_eval{changed}')}.json"
    check_outputs(output, inputs=[path])
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    model, origin = load_finished(path, data, device)
    _, test = load_ind(data.task, data.partition, args.data_dir)
    test = test.to(device)
    ood = {name: load_ood(data.task, data.partition, name, args.data_dir).to(device) for name in names}

    results = {"ind": [], "detection": []}
    for view in dict.fromkeys(view for _, view in chosen):
        found = csi_rows(view, model, test, ood, data.classes, precision)
        for rows in results:
            results[rows] += found[rows] if (rows, view) in chosen else []
    write_json(
        output,
        {
            "command": shlex.join(["python", "-m", "eval", *args.argv]),
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


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
