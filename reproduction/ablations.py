"""Ablations of stage 2: the method and changes of it, on the same checkpoints, as one Markdown table.

    python -m reproduction.ablations --task same_dataset_mnist --partition partition1 --seeds 1 2 3
    python -m reproduction.ablations --pseudo-pool 12000 --variant='--sigma 1' --variant='--margins 0.95 0.05'

takes the options of eval, except --recipe, --baselines, --save-scores and --save-detector; each variant adds options of
the method to them. AUROC in per cent on the task's first OOD set, mean ± standard deviation over the seeds of stage 2:
before the first step, the best evaluation and its step, at the step chosen on IND images where some were kept from
training, after the last step. The table goes to the terminal, everything behind it to a JSON file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import eval
from cli.errors import UserError, run_command
from cli.files import short_name
from cli.options import (
    flag,
    needs_of,
    option_fields,
    options_given,
    parse_options,
    refuse_idle_options,
    split_options,
)
from cmg.config import FineTuneConfig, Request, with_recipe

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
    "--mixing mixup",
    "--mixing none",
    "--mixing-probability 0.75",
    "--mixing-probability 0.9",
    "--pseudo-batch-size 32",
    "--pseudo-batch-size 512",
    "--loss-energy ind",
    "--score energy-all",
)
OF_ONE_RUN = ("recipe", "baselines", "save_scores", "save_detector")


def get_parser() -> argparse.ArgumentParser:
    parser = eval.get_parser()
    parser.prog, parser.description = "reproduction.ablations", __doc__
    parser.add_argument(
        "--variant",
        action="append",
        help="Options of the method, in quotes: --variant='--sigma 1'; '' is the method itself; may be repeated "
        "(default: a list of variants)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    from reproduction.ablate import ablate, table

    request, variants = read_arguments(args)
    name = short_name(f"ablations_{request.experiment.name}_{request.experiment.partition}")
    output = args.output or Path("results") / f"{name}.json"
    results = ablate(request, variants, output)
    print(f"\n{table(results)}\n\nwrote {output}")


def read_arguments(args: argparse.Namespace) -> tuple[Request, dict[str, dict[str, object]]]:
    """Check the arguments before anything is loaded.

    Returns:
        what all variants share; for each variant its options of stage 2.

    Raises:
        UserError: an option or a variant is not valid.
    """
    for name in OF_ONE_RUN:
        if getattr(args, name) is not None:
            raise UserError(f"{flag(name)} is for a single run; leave it out here and give it to eval")
    request = eval.read_arguments(args)
    jointly = request.experiment.task.space == "images" and request.ood_names
    default = [variant for variant in VARIANTS if jointly or variant != "--tune joint"]
    variants = dict.fromkeys(default if args.variant is None else args.variant)
    return request, {variant: variant_options(args, variant, request) for variant in variants}


def variant_options(args: argparse.Namespace, variant: str, request: Request) -> dict[str, object]:
    """The options of stage 2 of a variant. Raises `UserError`."""
    words = split_options("--variant", variant)
    where = f"--variant={variant!r}"
    options, own = (parse_options(where, get_parser(), given) for given in ([*args.argv, *words], words))
    fields = option_fields(FineTuneConfig)
    for name, value in vars(options).items():
        if name not in fields and value != getattr(args, name):
            changeable = ", ".join(flag(field, fields) for field in fields)
            raise UserError(f"{where}: {flag(name)} is the same for all; a variant changes {changeable}")
    tune = options.tune or FineTuneConfig.tune
    for name, needs in needs_of(FineTuneConfig).items():
        if tune not in needs.get("tune", (tune,)):  # there is nothing then that this option of all variants is about
            setattr(options, name, getattr(own, name))
    eval.check_fine_tuning(options, request.experiment, request.ood_names)
    own = with_recipe(own)
    own.tune = options.tune  # beside which the variant's own options must count
    try:
        refuse_idle_options(own, FineTuneConfig)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return options_given(options, FineTuneConfig)


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
