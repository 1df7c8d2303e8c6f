"""What decides how stage 2 ends: the method and variants of it, on the same checkpoints, as one Markdown table.

    python -m benchmarks.findings --task same_dataset_mnist --partition partition1 --seeds 1 2 3

Every variant changes one thing; with --pseudo-pool all of them, the method too, draw from a pool, which is quicker.
AUROC in per cent, mean ± standard deviation over the seeds of stage 2: before the first step, the best of the checks
and the step it was seen at, at the step chosen on IND images where some were kept from training, after the last step.
The table goes to the terminal, everything behind it to a JSON file.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from datasets.tasks import (
    COMMANDS,
    add_data_arguments,
    all_partitions,
    default_checkpoint,
    task_from_arguments,
    task_names,
)
from utils import add_common_arguments, check_writable, number, positive_int, run_command, seed_number


@dataclass(frozen=True)
class Variant:
    """A change to the method: of its configuration, of the part that is tuned, of the task's sigma."""

    config: dict = field(default_factory=dict)
    tune: str = "head"
    sigma_factor: float = 1.0


VARIANTS = {
    "the method": Variant(),
    "last layer only": Variant(tune="last-layer"),
    "anchor 0.1": Variant({"anchor": 0.1}),
    "learning rate 1e-5": Variant({"learning_rate": 1e-5}),
    "margins 0.95, 0.05": Variant({"ind_quantile": 0.95, "pseudo_quantile": 0.05}),
    "sigma / 3": Variant(sigma_factor=1 / 3),
    "sigma * 5/3": Variant(sigma_factor=5 / 3),
    "pool of 12,000": Variant({"pseudo_pool": 12_000}),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.findings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, task_names(), all_partitions())
    parser.add_argument("--params-dict-name", type=Path, help="the classifier's checkpoint")
    parser.add_argument("--params-dict-name2", type=Path, help="the CVAE's checkpoint")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="(default: all)")
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--epochs", type=positive_int, help="of fine-tuning (default: the task's)")
    parser.add_argument("--check-every", type=positive_int, default=100, help="steps (default: %(default)s)")
    parser.add_argument("--pseudo-pool", type=number(int, least=0), default=0, help="as in eval (default: 0, fresh)")
    parser.add_argument("--output", type=Path, help="JSON file (default: results/findings_TASK_PARTITION.json)")
    add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    from training.fine_tune import MODES, FineTuneConfig
    from training.stage2 import load_data, load_networks, run_stage2
    from utils import environment, pick_device, pick_precision, write_json

    task_name, task, partition = task_from_arguments(args)
    output = args.output or Path("results") / f"findings_{task_name}_{partition}.json"
    check_writable(output)
    device = pick_device(args.device)
    given = {"train_classifier": args.params_dict_name, "train_cvae": args.params_dict_name2}
    paths = {command: given[command] or default_checkpoint(task_name, partition, command) for command in COMMANDS}
    classifier, cvae, origins = load_networks(task, task_name, partition, paths, device)
    made = {"the classifier": origins["train_classifier"], "the CVAE": origins["train_cvae"]}
    data = load_data(task, partition, task.ood_datasets, args.data_dir, made, device)
    method = FineTuneConfig(
        num_ind=len(task.partitions[partition]),
        epochs=args.epochs or task.fine_tune_epochs,
        batch_size=128,
        learning_rate=1e-4,
        check_every=args.check_every,
        sigma=task.sigma,
        pseudo_pool=args.pseudo_pool,
        precision=pick_precision(args.precision, device),
    )
    results = {}
    for name in args.variants:
        variant = VARIANTS[name]
        config = replace(method, sigma=method.sigma * variant.sigma_factor, **variant.config)
        start = time.monotonic()
        result = run_stage2(classifier, cvae, data, config, list(MODES), args.seeds, variant.tune)
        taken = time.monotonic() - start
        results[name] = {"config": asdict(config), "seconds": round(taken, 1), "runs": result["runs"]}
        results["untouched"] = [row for row in result["detection"] if row["at"] == "untouched"]
        print(f"{name}: {taken:.0f} s", flush=True)
    about = {"task": task_name, "partition": partition, "seeds": args.seeds, "environment": environment(device)}
    about |= {"checkpoints": origins, "command": " ".join(["python -m benchmarks.findings", *args.argv])}
    write_json(output, about | {"results": results})
    made = f"a pool of {method.pseudo_pool:,}" if method.pseudo_pool else "fresh in every step"
    print(f"\n{task_name} {partition}, {method.epochs} epochs, seeds {args.seeds}, pseudo-OOD images {made}\n")
    print(f"{markdown(results)}\n\nwrote {output}")


def markdown(results: dict) -> str:
    """The table: a row for each variant and mode, the first OOD set."""
    lines = ["| fine-tuning | mode | start | best (step) | validated (step) | last | seconds |", "| --- " * 7 + "|"]
    for name, result in results.items():
        if name == "untouched":
            continue
        for mode in sorted({run["mode"] for run in result["runs"]}):
            runs = [run for run in result["runs"] if run["mode"] == mode]
            cells = [name, mode, *map(per_cent, columns(runs)), f"{result['seconds']:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    for row in results.get("untouched", []):
        lines.append(f"| untouched classifier | {row['method']} | {100 * row['auroc']:.2f} | | | | |")
    return "\n".join(lines)


def columns(runs: list[dict]) -> list[list[tuple[float, int | None]]]:
    """For each column one (AUROC, step to be shown) of every run."""
    ood = next(iter(runs[0]["curve"][0]["auroc"]))
    found = [[], [], [], []]
    for run in runs:
        curve = [(check["auroc"][ood], check["step"]) for check in run["curve"]]
        found[0].append((curve[0][0], None))
        found[1].append(max(curve, key=lambda point: (point[0], -point[1])))
        found[2] += [point for point in curve if point[1] == run["validated_step"]]
        found[3].append((curve[-1][0], None))
    return found


def per_cent(points: list[tuple[float, int | None]]) -> str:
    """Mean and deviation of AUROCs in per cent, with the mean step where there is one."""
    from statistics import mean

    from evaluation.report import mean_and_sd

    steps = [step for _, step in points if step is not None]
    return mean_and_sd([auroc for auroc, _ in points]) + (f" ({mean(steps):.0f})" if steps else "")


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
