"""Stage 2 and evaluation: fine-tune the classifier's head against class-mixed pseudo-OOD images, report OOD detection.

    python -m eval --mode CMG-energy
    python -m eval --task different_dataset --ood-dataset all --mode all --seeds 1 2 3 4 5
    python -m eval --task custom --ind-dir birds --ood-dir insects --ood-dir planes

reads the two checkpoints that `train` wrote, prints a table and writes everything behind it to a JSON file.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from datasets.tasks import add_data_arguments, all_partitions, default_checkpoint, task_from_arguments, task_names
from utils import (
    UserError,
    add_common_arguments,
    changed_options,
    check_writable,
    number,
    pick_all,
    positive_float,
    positive_int,
    run_command,
    seed_number,
)

MODE_NAMES = ("CMG-energy", "CMG-softmax")
TUNED = ("head", "last-layer")
METHOD = (
    "ood_dataset",
    "epochs",
    "batch_size",
    "lr",
    "sigma",
    "check_every",
    "margins",
    "tune",
    "anchor",
    "pseudo_pool",
)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, task_names(), all_partitions())
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=[*MODE_NAMES, "all"],
        default=["all"],
        help="loss and score, one or several (default: all)",
    )
    parser.add_argument(
        "--ood-dataset",
        nargs="+",
        default=["all"],
        help="OOD sets of the task, or names of folders given by --ood-dir (default: all)",
    )
    parser.add_argument(
        "--params-dict-name", type=Path, help="the classifier's checkpoint (default: where train writes it)"
    )
    parser.add_argument("--params-dict-name2", type=Path, help="the CVAE's checkpoint (default: where train writes it)")
    parser.add_argument(
        "--seeds", "--seed", nargs="+", type=seed_number, default=[123], help="of stage 2 (default: 123)"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file of the results (default: results/TASK_PARTITION_MODES_SEEDS.json)"
    )
    parser.add_argument(
        "--save-detector", type=Path, help="write the fine-tuned detector of one mode and seed, for scoring new images"
    )
    method = parser.add_argument_group(
        "the method", "the defaults are the paper's; anything else is another experiment"
    )
    method.add_argument("--epochs", type=positive_int, help="passes over the IND training images (default: the task's)")
    method.add_argument("--batch-size", type=positive_int, default=128, help="(default: %(default)s)")
    method.add_argument("--lr", type=positive_float, default=1e-4, help="learning rate of Adam (default: %(default)s)")
    method.add_argument(
        "--sigma",
        type=positive_float,
        help="standard deviation of the latent of pseudo-OOD images (default: the task's)",
    )
    method.add_argument("--check-every", type=positive_int, help="steps between evaluations (default: the task's)")
    quantile = number(float, least=0, below=1)
    method.add_argument(
        "--margins",
        nargs=2,
        type=quantile,
        default=[0.2, 0.8],
        metavar=("IN", "OUT"),
        help="quantiles of IND and pseudo-OOD energies (default: 0.2 0.8)",
    )
    method.add_argument("--tune", choices=TUNED, default="head", help="which part is fine-tuned (default: %(default)s)")
    method.add_argument(
        "--anchor",
        type=number(float, least=0),
        default=0.0,
        help="weight of the head's squared distance from its start (default: %(default)s)",
    )
    method.add_argument(
        "--pseudo-pool",
        type=number(int, least=0),
        default=0,
        help="draw from so many pseudo-OOD images made once (default: 0, always fresh)",
    )
    add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from evaluation.report import format_ind_table, format_table
    from training.fine_tune import FineTuneConfig
    from training.stage2 import load_data, load_networks, make_detector, run_stage2
    from utils import environment, pick_device, pick_precision, write_json

    task_name, task, partition = task_from_arguments(args)
    modes = pick_all("--mode", args.mode, MODE_NAMES, task_name)
    ood_names = pick_all("--ood-dataset", args.ood_dataset, task.ood_datasets, task_name)
    seeds = list(dict.fromkeys(args.seeds))
    paths = {
        "train_classifier": args.params_dict_name or default_checkpoint(task_name, partition, "train_classifier"),
        "train_cvae": args.params_dict_name2 or default_checkpoint(task_name, partition, "train_cvae"),
    }
    output = args.output or default_output(
        task_name, partition, modes, seeds, changed_options(args, get_parser(), METHOD)
    )
    check_writable(output)
    if args.save_detector:
        if len(modes) * len(seeds) > 1:
            raise UserError(
                f"--save-detector holds one detector: name one of --mode {' '.join(modes)} and one of --seeds"
            )
        check_writable(args.save_detector)
    device = pick_device(args.device)
    config = FineTuneConfig(
        num_ind=len(task.partitions[partition]),
        epochs=args.epochs or task.fine_tune_epochs,
        batch_size=args.batch_size,
        learning_rate=args.lr,
        check_every=args.check_every or task.check_every,
        sigma=args.sigma or task.sigma,
        ind_quantile=args.margins[0],
        pseudo_quantile=args.margins[1],
        anchor=args.anchor,
        pseudo_pool=args.pseudo_pool,
        precision=pick_precision(args.precision, device),
    )
    classifier, cvae, origins = load_networks(task, task_name, partition, paths, device)
    made = {"the classifier": origins["train_classifier"], "the CVAE": origins["train_cvae"]}
    data = load_data(task, partition, ood_names, args.data_dir, made, device)
    counts = data.counts()
    print(
        f"{task_name} {partition} on {device} in {config.precision}: "
        + ", ".join(f"{n:,} {name}" for name, n in counts.items()),
        flush=True,
    )

    results = run_stage2(classifier, cvae, data, config, modes, seeds, args.tune)
    print(f"\n{format_table(results['detection'])}\n\n{format_ind_table(results['ind'])}\n")
    about = {
        "command": shlex.join(["python", "-m", "eval", *args.argv]),
        "task": task_name,
        "partition": partition,
        "positive_class": "OOD",
        "config": asdict(config) | {"tune": args.tune},
        "seeds": seeds,
        "images": counts,
        "checkpoints": {command: {"file": str(path), "origin": origins[command]} for command, path in paths.items()},
        "environment": environment(device),
    }
    write_json(output, about | {key: results[key] for key in ("detection", "ind", "runs")})
    print(f"wrote {output}")
    if args.save_detector:
        detector = make_detector(classifier, results["tuned"][0], data, args.tune, task, task_name, partition)
        detector.save(args.save_detector, about)
        print(f"wrote {args.save_detector}: {detector.config.rule()}")


def default_output(task_name: str, partition: str, modes: list[str], seeds: list[int], changed: str) -> Path:
    """results/TASK_PARTITION_MODES_seedSEEDS.json, with what was changed of the method before the dot."""
    return Path("results") / f"{task_name}_{partition}_{'+'.join(modes)}_seed{'-'.join(map(str, seeds))}{changed}.json"


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
