"""Accuracy and OOD detection of a CSI checkpoint, single view or rotation ensemble. Run in this folder.

    python -m eval --mode test_acc test_marginalized_acc --load_path ../ckpt/csi_cifar10.pkl
    python -m eval --mode ood ood_marginalized --ood-dataset all
    python -m eval --task custom --ind-dir ../birds --ood-dir ../insects

prints a table and writes it to a JSON file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from csi.options import add_csi_arguments, default_checkpoint, experiment_from_csi_arguments, root

from cli.errors import run_command
from cli.files import short_name
from cli.options import Machine, changed_options, pick_all

# mode -> (which rows, which view)
ROWS_AND_VIEW = {
    "test_acc": ("ind", "single view"),
    "test_marginalized_acc": ("ind", "rotation ensemble"),
    "ood": ("detection", "single view"),
    "ood_marginalized": ("detection", "rotation ensemble"),
}
NAMED = ("mode", "ood_dataset", "precision", "ood_dir", "load_path")  # options that make another result


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mode", nargs="+", choices=[*ROWS_AND_VIEW, "all"], default=["all"], help="What to evaluate (default: all)"
    )
    add_csi_arguments(parser)
    parser.add_argument(
        "--load_path", "--load-path", type=Path, help="Checkpoint, ours or the authors' (default: where train writes)"
    )
    parser.add_argument("--ood-dataset", nargs="+", default=["all"], help="OOD sets (default: all of --dataset)")
    parser.add_argument("--output", type=Path, help="JSON file (default: ../results/csi_DATASET_eval.json)")
    return parser


def main(args: argparse.Namespace) -> None:
    from csi.report import report

    data = experiment_from_csi_arguments(args)
    chosen = [ROWS_AND_VIEW[mode] for mode in pick_all("--mode", args.mode, list(ROWS_AND_VIEW), data.name)]
    names = []
    if any(rows == "detection" for rows, _ in chosen):
        names = pick_all("--ood-dataset", args.ood_dataset, data.experiment.task.ood_datasets, data.name)
    path = args.load_path or default_checkpoint(data, "sup_CSI_linear")
    changed = changed_options(args, get_parser(), NAMED)
    output = args.output or root() / "results" / f"{short_name(f'csi_{data.name}_eval{changed}')}.json"
    report(data, chosen, names, path, Machine.of(args), output, args.argv)


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
