"""What decides how stage 2 ends: the method and changes of it, on the same checkpoints, as one Markdown table.

    python -m benchmarks.ablations --task same_dataset_mnist --partition partition1 --seeds 1 2 3
    python -m benchmarks.ablations --pseudo-pool 12000 --variant='--sigma 1' --variant='--margins 0.95 0.05'

takes the options of eval, but not those of one run (--baselines, --save-scores, --save-detector), and each variant is
options of the method on top of them. AUROC in per cent on the task's first OOD set, mean ± standard deviation over the
seeds of stage 2: before the first step, the best of the checks and the step it was seen at, at the step chosen on IND
images where some were kept from training, after the last step. The table goes to the terminal, everything behind it to
a JSON file.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import eval
from training.options import option, parse_options, split_options
from utils import UserError, check_outputs, run_command, short_name

VARIANTS = (
    "",
    "--tune last-layer",
    "--tune joint",
    "--anchor 0.1",
    "--lr 1e-5",
    "--margins 0.95 0.05",
    "--sigma 1",
    "--sigma 2",
    "--sigma 5",
    "--mixing weight",
    "--mixing none",
    "--mixing-probability 0.75",
    "--mixing-probability 0.9",
    "--pseudo-batch-size 32",
    "--pseudo-batch-size 512",
    "--loss-energy ind",
    "--score-energy all",
)
CHANGEABLE = [name for name in eval.METHOD if name != "ood_dataset"]  # what decides a configuration
OF_ONE_RUN = ("baselines", "save_scores", "save_detector")
HEADER = ("options of eval", "mode", "start", "best (step)", "validated (step)", "last", "IND accuracy", "seconds")


def get_parser() -> argparse.ArgumentParser:
    parser = eval.get_parser()
    parser.prog, parser.description = "benchmarks.ablations", __doc__
    parser.add_argument(
        "--variant",
        action="append",
        help="options of the method, quoted, as in --variant='--sigma 1'; '' is the method itself; may be repeated "
        "(default: a list of them)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    from utils import write_json

    setup, configs = read_arguments(args)
    output = args.output or Path("results") / f"{short_name(f'ablations_{setup.task_name}_{setup.partition}')}.json"
    check_outputs(output, inputs=setup.paths.values())
    inputs = eval.load(args, setup)
    results = ablate(setup, inputs, configs)
    method = {"config": asdict(eval.make_config(args, setup)) | {"tune": args.tune}}
    write_json(output, eval.describe("benchmarks.ablations", args, setup, inputs) | method | results)
    print(f"\n{table(results)}\n\nwrote {output}")


def read_arguments(args: argparse.Namespace) -> tuple[eval.Setup, dict[str, tuple[object, str]]]:
    """Check the arguments before anything is loaded.

    Returns:
        what all variants share; for each variant its configuration and what it tunes.

    Raises:
        UserError: an option or a variant cannot be.
    """
    for name in OF_ONE_RUN:
        if getattr(args, name) is not None:
            raise UserError(f"{option(name)} is of one run, not of a table of many; give it to eval")
    setup = eval.read_arguments(args)
    variants = dict.fromkeys(VARIANTS if args.variant is None else args.variant)
    return setup, {variant: variant_config(args, setup, variant) for variant in variants}


def variant_config(args: argparse.Namespace, setup: eval.Setup, variant: str) -> tuple[object, str]:
    """The configuration of a variant, and what it tunes. Raises `UserError`."""
    flag = f"--variant={variant!r}"
    words = split_options("--variant", variant)
    options, own = (parse_options(flag, get_parser(), given) for given in ([*args.argv, *words], words))
    if options.tune == "joint":  # there is nothing then that these options of all variants are about
        for name in eval.NOT_JOINT:
            setattr(options, name, getattr(own, name))
    for name, value in vars(options).items():
        if name not in CHANGEABLE and value != getattr(args, name):
            raise UserError(
                f"{flag}: {option(name)} is the same for all; a variant changes {', '.join(map(option, CHANGEABLE))}"
            )
    try:
        eval.read_arguments(options)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    return eval.make_config(options, setup), options.tune


def ablate(setup: eval.Setup, inputs, configs: dict) -> dict:
    """Run every variant.

    Returns:
        "untouched": detection rows of the classifier before fine-tuning; "variants": for each variant its
        "config", "detection" and "ind" rows, "runs" and "seconds".
    """
    from evaluation.report import THE_METHOD
    from training.stage2 import run_stage2

    untouched, variants, banks = [], {}, {}
    for variant, (config, tune) in configs.items():
        start = time.monotonic()
        result = run_stage2(inputs, config, setup.modes, setup.seeds, tune, banks=banks)
        taken = round(time.monotonic() - start, 1)
        untouched = [row for row in result["detection"] if row["at"] == "untouched"]
        kept = {key: [row for row in result[key] if row["at"] != "untouched"] for key in ("detection", "ind")}
        variants[variant] = {"config": asdict(config) | {"tune": tune}, "seconds": taken, "runs": result["runs"]} | kept
        print(f"{variant or THE_METHOD}: {taken:.0f} s", flush=True)
    return {"untouched": untouched, "variants": variants}


def table(results: dict) -> str:
    """In Markdown: a row for each variant and mode, then for each score of the untouched classifier; first OOD set."""
    from evaluation.report import THE_METHOD, markdown

    rows = [
        [f"`{variant}`" if variant else THE_METHOD, mode, *cells(result, mode), format(result["seconds"], ".0f")]
        for variant, result in results["variants"].items()
        for mode in dict.fromkeys(run["mode"] for run in result["runs"])
    ]
    rows += [
        ["untouched classifier", row["method"], f"{100 * row['auroc']:.2f}", *["-"] * (len(HEADER) - 3)]
        for row in results["untouched"]
        if row["ood_dataset"] == results["untouched"][0]["ood_dataset"]
    ]
    return markdown(HEADER, rows)


def cells(result: dict, mode: str) -> list[str]:
    """A mode's figures in the table: AUROC at four places, IND accuracy after the last step."""
    from statistics import mean

    from evaluation.report import mean_and_sd

    ood = result["detection"][0]["ood_dataset"]
    last = [
        row["auroc"]
        for row in result["detection"]
        if (row["method"], row["at"], row["ood_dataset"]) == (mode, "last", ood)
    ]
    accuracy = [row["accuracy"] for row in result["ind"] if (row["method"], row["at"]) == (mode, "last")]
    start, best, validated = [], [], []
    for run in result["runs"]:
        if run["mode"] == mode and run["curve"]:
            curve = [(check["auroc"][ood], check["step"]) for check in run["curve"]]
            start.append(curve[0][0])
            best.append(max(curve, key=lambda point: (point[0], -point[1])))
            validated += [point for point in curve if point[1] == run["validated_step"]]

    def at_steps(points: list[tuple[float, int]]) -> str:
        step = f" ({mean(step for _, step in points):.0f})" if points else ""
        return mean_and_sd([auroc for auroc, _ in points]) + step

    return [mean_and_sd(start), at_steps(best), at_steps(validated), mean_and_sd(last), mean_and_sd(accuracy)]


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
