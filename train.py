"""Stage 1: train the IND classifier or the conditional VAE.

    python -m train --command train_classifier
    python -m train --task same_dataset_mnist --partition partition1 --command train_cvae
    python -m train --task custom --ind-dir birds      (birds/train/CLASS/IMAGE, birds/test/CLASS/IMAGE)

writes a state dict to --params-dict-name and prints the network's metrics on the IND test images. An interrupted
run goes on when the same command is given again; several GPUs: torchrun --nproc_per_node=N -m -- train …
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from cli.errors import run_command
from cli.options import Machine, add_machine_arguments, add_options, idle_options, options_given
from datasets.experiments import add_data_arguments, add_experiment_arguments, experiment_from_arguments
from datasets.tasks import COMMANDS
from training.config import LoopConfig, RunOptions, TrainingOptions


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_experiment_arguments(parser)
    add_machine_arguments(parser)
    parser.add_argument(
        "--command", choices=list(COMMANDS), default="train_classifier", help="Network to train (default: %(default)s)"
    )
    parser.add_argument(
        "--params-dict-name", type=Path, help="Checkpoint to write (default: ckpt/TASK_PARTITION_NETWORK.pkl)"
    )
    for config in (LoopConfig, TrainingOptions, RunOptions):
        add_options(parser, config)
    add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    from training.stage1 import train_network

    experiment = experiment_from_arguments(args)
    # No refusal: scripts give both commands the same options. Under torchrun one process says so.
    for remark in idle_options(args, TrainingOptions) if os.environ.get("RANK", "0") == "0" else ():
        print(f"{remark}: it changes nothing here", flush=True)
    train_network(
        experiment,
        args.command,
        args.params_dict_name or experiment.checkpoint(args.command),
        options_given(args, LoopConfig),
        TrainingOptions(**options_given(args, TrainingOptions)),
        RunOptions(**options_given(args, RunOptions)),
        Machine.of(args),
    )


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
