"""Train CSI with labels: first the representation, then the linear layers on it. Run in this folder.

    python -m train --mode sup_simclr_CSI --dataset cifar10
    python -m train --mode sup_CSI_linear --dataset cifar10
    python -m train --task custom --ind-dir ../birds

writes a state dict to --params-dict-name. An interrupted run goes on when the same command is given again; several
GPUs: torchrun --nproc_per_node=N -m -- train …
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from csi.options import (
    BATCH_SIZE,
    TRAINING_MODES,
    CSIOptions,
    add_csi_arguments,
    default_checkpoint,
    experiment_from_csi_arguments,
)

from cli.errors import UserError, run_command
from cli.options import Machine, add_options, options_given, refuse_idle_options
from training.config import LoopConfig, RunOptions

LOOP = ("epochs", "batch_size", "learning_rate", "seed")  # options of the loop that CSI has


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mode", choices=list(TRAINING_MODES), default="sup_simclr_CSI", help="What to train (default: %(default)s)"
    )
    add_csi_arguments(parser)
    parser.add_argument("--params-dict-name", type=Path, help="Checkpoint to write (default: ../ckpt/csi_DATASET….pkl)")
    add_options(
        parser,
        LoopConfig,
        only=LOOP,
        epochs="700 for the representation, 100 for the layers",
        batch_size=str(BATCH_SIZE),
        learning_rate="1.0, the peak of LARS, and 0.1, the start of SGD",
    )
    add_options(parser, CSIOptions)
    add_options(parser, RunOptions)
    return parser


def main(args: argparse.Namespace) -> None:
    from csi.training import train_csi

    refuse_idle_options(args, CSIOptions)
    data, mode = experiment_from_csi_arguments(args), TRAINING_MODES[args.mode]
    loop = {"epochs": mode.epochs, "batch_size": BATCH_SIZE, "learning_rate": mode.learning_rate}
    loop |= options_given(args, LoopConfig)
    csi = CSIOptions(**options_given(args, CSIOptions))
    if args.mode == "sup_simclr_CSI" and csi.warmup >= loop["epochs"]:
        raise UserError(f"--warmup {csi.warmup}: must be less than --epochs {loop['epochs']}; give a smaller one")
    train_csi(
        data,
        args.mode,
        args.params_dict_name or default_checkpoint(data, args.mode),
        loop,
        csi,
        RunOptions(**options_given(args, RunOptions)),
        Machine.of(args),
    )


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
