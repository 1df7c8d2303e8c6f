"""Does bf16 change what is learned? The same seeds in fp32 and in bf16, from training to AUROC.

    python -m benchmarks.precision --seeds 1 2 3
    python -m benchmarks.precision --task same_dataset_mnist --classifier-args='--epochs 1' --cvae-args='--epochs 2'

Trains classifier and CVAE with `train` and fine-tunes with `eval`'s engine, in either precision throughout, and
prints for each figure the mean ± standard deviation over the seeds and the difference of the means. The last line is a
JSON object.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import eval
import train
from datasets.tasks import COMMANDS, add_data_arguments, all_partitions, task_from_arguments, task_names
from training.options import check_options, option
from utils import Stopped, UserError, add_common_arguments, run_command, seed_number

PRECISIONS = ("fp32", "bf16")
SHARED = ("task", "partition", "ind_dir", "ood_dir", "image_size", "grey", "device", "data_dir")
COMPARED = ("output", "save_scores", "save_detector", "baselines", "params_dict_name", "params_dict_name2")
REFUSED = {  # options of train and eval -> what to do instead
    **{name: f"give {option(name)} to benchmarks.precision itself" for name in SHARED},
    **dict.fromkeys(("seed", "seeds"), "give --seeds to benchmarks.precision itself"),
    **dict.fromkeys(COMPARED, "nothing but the comparison is kept; use train and eval"),
    "precision": "both are compared",
    "command": "--classifier-args and --cvae-args are for one network each",
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.precision", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, task_names(), all_partitions())
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--quick", action="store_true", help="one epoch of everything, two seeds: rough figures")
    for command in ("classifier", "cvae", "eval"):
        parser.add_argument(f"--{command}-args", default="", help="further options, quoted")
    add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    from benchmarks.measure import print_json
    from evaluation.report import markdown, spread
    from utils import environment, pick_device

    seeds = args.seeds[:2] if args.quick else args.seeds
    task_name, task, partition = task_from_arguments(args)
    which = [*(task.options or ("--task", task_name)), "--partition", partition, "--data-dir", str(args.data_dir)]
    which += ["--device", args.device] if args.device else []
    which += [word for folder in args.ood_dir for word in ("--ood-dir", str(folder))]
    more = {
        name: check_options(f"--{name}-args", getattr(args, f"{name}_args"), module.get_parser(), REFUSED)
        for name, module in {"classifier": train, "cvae": train, "eval": eval}.items()
    }
    eval.read_run(eval.get_parser().parse_args([*which, *more["eval"]]))
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for precision in PRECISIONS:
                place = Path(folder) / f"{seed}_{precision}"
                for name, value in learn(which, more, args.quick, seed, precision, place).items():
                    found.setdefault(name, {}).setdefault(precision, []).append(value)
    rows, figures = [], {}
    for name, values in found.items():
        spreads = {precision: spread(values[precision]) for precision in PRECISIONS}
        difference = spreads["bf16"]["mean"] - spreads["fp32"]["mean"]
        texts = [f"{one['mean']:.4f} ± {one['sd']:.4f}" for one in spreads.values()]
        rows.append([name, *texts, f"{difference:+.4f}"])
        figures[name] = spreads | {"difference": difference}
    print(f"\n{task_name} {partition}, seeds {' '.join(map(str, seeds))}\n")
    print(markdown(["figure", *PRECISIONS, "bf16 - fp32"], rows))
    print_json({"figures": figures, "seeds": seeds} | environment(pick_device(args.device)))


def learn(
    which: list[str], more: dict[str, list[str]], quick: bool, seed: int, precision: str, folder: Path
) -> dict[str, float]:
    """Train both networks and fine-tune in one precision, with `more` options; figures by name. Raises `UserError`."""
    from training.stage2 import run_stage2
    from training.stages import STAGES

    which = [*which, "--precision", precision]
    paths = {command: folder / f"{network}.pkl" for command, network in COMMANDS.items()}
    short = ["--epochs", "1"] if quick else []
    for command, network in COMMANDS.items():
        argv = [*which, "--command", command, "--seed", str(seed), "--params-dict-name", str(paths[command]), *short]
        status = run_command(train.main, train.get_parser(), [*argv, *more[network]])
        if status > 128:
            raise Stopped("stopped; nothing is kept", status - 128)
        if status:
            raise UserError(f"{command} in {precision} with seed {seed} failed, see above")
    argv = [*which, "--seeds", str(seed), *short, *more["eval"]]
    argv += ["--params-dict-name", str(paths["train_classifier"]), "--params-dict-name2", str(paths["train_cvae"])]
    options = eval.get_parser().parse_args(argv)
    setup = eval.read_arguments(options)
    inputs = eval.load(options, setup)
    figures = {}
    for command, model in (("train_classifier", inputs.classifier), ("train_cvae", inputs.cvae)):
        num_ind = len(setup.task.partitions[setup.partition])
        figures |= STAGES[command].evaluate(model, inputs.data.test, num_ind, precision)
    results = run_stage2(inputs, eval.make_config(options, setup), setup.modes, setup.seeds, options.tune)
    for row in results["detection"]:
        if row["at"] in ("untouched", "last"):
            figures[f"AUROC {row['method']} {row['at']}, {row['ood_dataset']}"] = row["auroc"]
    return figures


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
