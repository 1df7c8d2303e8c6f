"""CMG-energy on the `linear` head of a CSI network: before and after, on every OOD set at once. Run in this folder.

    python -m main --params-dict-name ../ckpt/csi_cifar10.pkl --params-dict-name2 ../ckpt/different_dataset_all_cvae.pkl
    python -m main --dataset digits --seeds 1 2 3
    python -m main --task custom --ind-dir ../birds --ood-dir ../insects

prints a table and writes everything behind it to a JSON file. The CVAE is the root's:
python -m train --task different_dataset --command train_cvae
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from csi.options import add_csi_arguments, default_checkpoint, experiment_from_csi_arguments, root

from cli.errors import run_command
from cli.files import short_name
from cli.options import Machine, add_options, add_seeds_argument, changed_options, options_given, pick_all
from cmg.config import FineTuneConfig
from datasets.experiments import add_networks_argument

METHOD = ("epochs", "batch_size", "learning_rate", "eval_every")  # options of stage 2 that CSI+CMG has
NAMED = (
    "ood_dataset",
    *METHOD,
    *("train_bn1", "networks", "precision", "ood_dir", "params_dict_name", "params_dict_name2"),
)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("main", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_csi_arguments(parser)
    parser.add_argument(
        "--params-dict-name", type=Path, help="CSI checkpoint, ours or the authors' (default: where train writes it)"
    )
    parser.add_argument(
        "--params-dict-name2", type=Path, help="The CVAE's checkpoint (default: where the root's train writes it)"
    )
    add_networks_argument(parser, " of the CVAE")
    parser.add_argument("--ood-dataset", nargs="+", default=["all"], help="OOD sets (default: all of --dataset)")
    add_seeds_argument(parser, " of stage 2")
    parser.add_argument("--output", type=Path, help="JSON file (default: ../results/csi_cmg_DATASET_seedSEEDS.json)")
    method = parser.add_argument_group(
        "the method", "The defaults are the paper's, or the task's own; anything else is another experiment"
    )
    add_options(method, FineTuneConfig, only=METHOD)
    method.add_argument(
        "--train-bn1",
        action="store_true",
        help="Also tune bn1's weight and bias, as the first public code did; slow, since no feature is constant then",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    from csi.before_and_after import report_before_and_after

    data = experiment_from_csi_arguments(args)
    data = replace(data, experiment=data.experiment.with_networks(args.networks))
    names = pick_all("--ood-dataset", args.ood_dataset, data.experiment.task.ood_datasets, data.name)
    seeds = list(dict.fromkeys(args.seeds))
    csi_path = args.params_dict_name or default_checkpoint(data, "sup_CSI_linear")
    cvae_path = args.params_dict_name2 or root() / data.experiment.checkpoint("train_cvae")
    changed = changed_options(args, get_parser(), NAMED, FineTuneConfig)
    name = short_name(f"csi_cmg_{data.name}_seed{'-'.join(map(str, seeds))}{changed}")
    output = args.output or root() / "results" / f"{name}.json"
    report_before_and_after(
        data,
        names,
        seeds,
        csi_path,
        cvae_path,
        options_given(args, FineTuneConfig),
        args.train_bn1,
        Machine.of(args),
        output,
        args.argv,
    )


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
