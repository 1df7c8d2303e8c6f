"""Draw what a CVAE does: IND test images, their reconstructions under them and pseudo-OOD images, in one PNG file.

python -m figure.samples --task same_dataset_mnist --partition partition1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cli.errors import UserError, run_command
from cli.files import short_name
from cli.options import (
    Machine,
    add_machine_arguments,
    add_options,
    add_seed_argument,
    options_given,
    refuse_idle_options,
)
from cmg.config import FineTuneConfig
from datasets.experiments import add_data_arguments, add_experiment_arguments, experiment_from_arguments

MAKING = (
    "sigma",
    "mixing",
    "mixing_probability",
    "pairs",
)  # options of stage 2 that decide what pseudo-OOD images look like


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "figure.samples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_experiment_arguments(parser)
    add_machine_arguments(parser)
    parser.add_argument("--params-dict-name2", type=Path, help="The CVAE's checkpoint (default: where train writes it)")
    add_options(parser, FineTuneConfig, only=MAKING)
    add_seed_argument(parser)
    parser.add_argument("--output", type=Path, help="PNG file (default: results/TASK_PARTITION_samples.png)")
    add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    from figure.draw_samples import draw_samples

    experiment = experiment_from_arguments(args)
    if experiment.task.space == "features":
        raise UserError("the CVAE makes features: there are no images to draw; leave out --space and --backbone")
    if args.precision != "auto":  # no refusal: reproduce gives every command the same
        print("--precision changes nothing here: the images are made in fp32", flush=True)
    name = short_name(f"{experiment.name}_{experiment.partition}_samples")
    output = args.output or Path("results") / f"{name}.png"
    path = args.params_dict_name2 or experiment.checkpoint("train_cvae")
    refuse_idle_options(args, FineTuneConfig)
    draw_samples(experiment, path, output, options_given(args, FineTuneConfig), args.seed, Machine.of(args))


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
