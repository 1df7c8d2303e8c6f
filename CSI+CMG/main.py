"""CMG-energy on the `linear` head of a CSI network: before and after, on every OOD set at once. Run in this folder.

    python -m main --params-dict-name ../ckpt/csi_cifar10.pkl --params-dict-name2 ../ckpt/different_dataset_all_cvae.pkl
    python -m main --dataset digits --seeds 1 2 3
    python -m main --task custom --ind-dir ../birds --ood-dir ../insects

prints a table and writes everything behind it to a JSON file. The CVAE is the root's:
python -m train --task different_dataset --command train_cvae
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from csi.options import add_csi_arguments, data_from_arguments, default_checkpoint, root
from datasets import tasks
from utils import (
    UserError,
    changed_options,
    check_outputs,
    pick_all,
    positive_float,
    positive_int,
    run_command,
    seed_number,
    short_name,
)

METHOD = (
    "ood_dataset",
    "epochs",
    "batch_size",
    "lr",
    "check_every",
    "train_bn1",
    "precision",
    "ood_dir",
    "params_dict_name",
    "params_dict_name2",
)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("main", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_csi_arguments(parser)
    parser.add_argument(
        "--params-dict-name", type=Path, help="CSI checkpoint, ours or the authors' (default: where train writes it)"
    )
    parser.add_argument(
        "--params-dict-name2", type=Path, help="the CVAE's checkpoint (default: where the root's train writes it)"
    )
    parser.add_argument("--ood-dataset", nargs="+", default=["all"], help="OOD sets (default: all of --dataset)")
    parser.add_argument("--seeds", "--seed", nargs="+", type=seed_number, default=[123], help="(default: 123)")
    parser.add_argument("--output", type=Path, help="JSON file (default: ../results/csi_cmg_DATASET_seedSEEDS.json)")
    method = parser.add_argument_group(
        "the method", "the defaults are the paper's; anything else is another experiment"
    )
    method.add_argument("--epochs", type=positive_int, help="passes over the IND training images (default: the task's)")
    method.add_argument("--batch-size", type=positive_int, help="(default: 128)")
    method.add_argument("--lr", type=positive_float, help="learning rate of Adam (default: 1e-4)")
    method.add_argument("--check-every", type=positive_int, help="steps between evaluations (default: the task's)")
    method.add_argument(
        "--train-bn1",
        action="store_true",
        help="tune bn1's weight and bias too, as the first public code did: slow, no feature is constant then",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from csi.network import load_finished
    from evaluation.report import format_ind_table, format_table
    from training.fine_tune import FineTuneConfig
    from training.stage2 import load_data, load_stage1, train_command
    from utils import environment, pick_device, pick_precision, write_json

    data = data_from_arguments(args)
    task, partition = data.task, data.partition
    names = pick_all("--ood-dataset", args.ood_dataset, task.ood_datasets, data.name)
    seeds = list(dict.fromkeys(args.seeds))
    csi_path = args.params_dict_name or default_checkpoint(data, "sup_CSI_linear")
    cvae_path = args.params_dict_name2 or root() / tasks.default_checkpoint(data.task_name, partition, "train_cvae")
    changed = changed_options(args, get_parser(), METHOD)
    name = short_name(f"csi_cmg_{data.name}_seed{'-'.join(map(str, seeds))}{changed}")
    output = args.output or root() / "results" / f"{name}.json"
    check_outputs(output, inputs=[csi_path, cvae_path])
    device = pick_device(args.device)
    given = {"batch_size": args.batch_size, "learning_rate": args.lr}
    config = FineTuneConfig(
        num_ind=data.classes,
        epochs=args.epochs or task.fine_tune_epochs,
        check_every=args.check_every or task.check_every,
        sigma=task.sigma,
        precision=pick_precision(args.precision, device),
        **{name: value for name, value in given.items() if value is not None},
    )
    network, csi_origin = load_finished(csi_path, data, device)
    if not cvae_path.is_file():
        command = train_command("train_cvae", task, data.task_name, partition, cvae_path.resolve())
        raise UserError(f"{cvae_path}: no such file; it should hold the CVAE. Make it with, in the root: {command}")
    cvae, cvae_origin = load_stage1("train_cvae", task, data.task_name, partition, cvae_path, device)
    origins = {"CSI": csi_origin, "the CVAE": cvae_origin}
    images = load_data(task, partition, names, args.data_dir, origins, device)
    counts = images.counts()
    print(
        f"{data.name} on {device} in {config.precision}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()),
        flush=True,
    )
    results = before_and_after(network, cvae, images, config, seeds, args.train_bn1)
    about = {
        "command": shlex.join(["python", "-m", "main", *args.argv]),
        "dataset": data.name,
        "positive_class": "OOD",
        "config": asdict(config) | {"train_bn1": args.train_bn1},
        "seeds": seeds,
        "images": counts,
        "checkpoints": {
            "csi": {"file": str(csi_path), "origin": csi_origin},
            "cvae": {"file": str(cvae_path), "origin": cvae_origin},
        },
        "environment": environment(device),
    }
    write_json(output, about | {key: results[key] for key in ("detection", "ind", "runs")})
    print(f"\n{format_table(results['detection'])}\n\n{format_ind_table(results['ind'])}\n")
    print(f"wrote {output}")


def before_and_after(network, cvae, data, config, seeds: list[int], train_bn1: bool) -> dict:
    """CSI's own figures, single view and rotation ensemble, then those of CMG-energy on `linear`.

    The rotation ensemble reads `joint_distribution_layer`, which CMG does not touch: it has no "after".

    Returns:
        what `training.stage2.fine_tune_and_score` returns, the detection rows grouped by OOD set, CSI's first.
    """
    from csi.network import Bn1AndLinear
    from csi.report import csi_rows
    from csi.scores import VIEWS
    from training.stage2 import fine_tune_and_score

    before = [csi_rows(view, network, data.test, data.ood, config.num_ind, config.precision) for view in VIEWS]
    if train_bn1:
        features, head = (lambda images: images.flatten(1)), Bn1AndLinear(network)
    else:
        features, head = network.features, network.linear
    results = fine_tune_and_score(features, head, cvae, data, config, ["CMG-energy"], seeds)
    # CSI's own rows hold the softmax score and the accuracy of the untouched head already.
    after = {
        "ind": [row for row in results["ind"] if row["at"] != "untouched"],
        "detection": [row for row in results["detection"] if row["method"] != "MSP"],
    }
    merged = {rows: [*before[0][rows], *before[1][rows], *after[rows]] for rows in after}
    merged["detection"].sort(key=lambda row: list(data.ood).index(row["ood_dataset"]))
    return results | merged


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
