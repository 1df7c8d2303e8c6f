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

from csi.options import TRAINING_MODES, CSIData, add_csi_arguments, data_from_arguments, default_checkpoint, remedy
from training.runs import add_run_arguments, format_figures, is_done, refuse_idle_options, train_to_checkpoint
from utils import UserError, check_outputs, number, positive_float, positive_int, run_command, seed_number

# The linear layers take over what the representation was made with.
NEEDS = dict.fromkeys(("width", "warmup", "val_fraction"), ("mode", ("sup_simclr_CSI",))) | {
    "load_path": ("mode", ("sup_CSI_linear",))
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mode", choices=list(TRAINING_MODES), default="sup_simclr_CSI", help="what is trained (default: %(default)s)"
    )
    add_csi_arguments(parser)
    parser.add_argument(
        "--load_path",
        "--load-path",
        type=Path,
        help="sup_CSI_linear: checkpoint of the representation (default: where sup_simclr_CSI writes it)",
    )
    parser.add_argument("--params-dict-name", type=Path, help="checkpoint to write (default: ../ckpt/csi_DATASET….pkl)")
    parser.add_argument("--seed", type=seed_number, default=123, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=positive_int, help="(default: 700 for the representation, 100 for the layers)")
    parser.add_argument(
        "--batch_size",
        "--batch-size",
        type=positive_int,
        default=128,
        help="images per step over all processes (default: %(default)s)",
    )
    parser.add_argument("--lr", type=positive_float, help="peak of LARS, start of SGD (default: 1.0 and 0.1)")
    parser.add_argument(
        "--warmup", type=number(int, least=0), default=10, help="epochs up to the peak (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=positive_int, default=64, help="channels of the first stage, less for trials (default: 64)"
    )
    parser.add_argument(
        "--val-fraction",
        type=number(float, least=0, below=1),
        default=0.0,
        help="share of the IND training images kept out, as in the root's train; the layers follow the representation",
    )
    add_run_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    from training.processes import joined_processes

    with joined_processes(args.device) as processes:
        train(args, processes)


def train(args: argparse.Namespace, processes) -> None:
    """Everything between the parsed arguments and the checkpoint, in this process of `processes`."""
    from dataclasses import asdict

    import torch

    from csi.scores import VIEWS
    from csi.stages import STAGES
    from datasets.datasetsHelper import load_ind, split_validation
    from evaluation.report import ind_figures
    from training.loop import LoopConfig, fingerprint
    from utils import derive_seed, pick_precision

    refuse_idle_options(args, get_parser(), NEEDS)
    data, mode, stage = data_from_arguments(args), TRAINING_MODES[args.mode], STAGES[args.mode]
    path = args.params_dict_name or default_checkpoint(data, args.mode)
    device = processes.device
    config = LoopConfig(
        epochs=args.epochs or mode.epochs,
        batch_size=args.batch_size,
        learning_rate=args.lr or mode.learning_rate,
        seed=args.seed,
        precision=pick_precision(args.precision, device),
    )
    if args.mode == "sup_simclr_CSI" and args.warmup >= config.epochs:
        raise UserError(f"--warmup {args.warmup}: must be less than --epochs {config.epochs}; give a smaller one")
    torch.manual_seed(derive_seed(args.seed, "initialisation", args.mode))
    model, what = build(args, data)
    # The schedule depends on the number of epochs: unlike a constant rate it cannot be continued beyond them.
    what |= {"command": args.mode, "dataset": data.name, "total_epochs": config.epochs}
    training_images, test_images = load_ind(data.task, data.partition, args.data_dir)
    training_images, _ = split_validation(training_images, what["val_fraction"])
    what |= {"data": fingerprint(training_images)}
    if is_done(path, what | asdict(config), args, show=processes.is_main):
        return

    if 0 < len(training_images) % config.batch_size < processes.world:
        raise UserError(
            f"--batch_size {config.batch_size}: the last batch of an epoch has fewer images than there are processes "
            f"({processes.world}); choose another"
        )
    model.to(device, memory_format=torch.channels_last)
    reports = train_to_checkpoint(
        path,
        model,
        stage.prepare(model, config.learning_rate),
        training_images,
        stage.objective(data.classes),
        config=config,
        what=what,
        about=f"{args.mode}: {data.name}",
        moments=1,
        processes=processes,
        args=args,
        schedule=lambda progress: stage.schedule(progress, config.learning_rate, args.warmup, config.epochs),
    )
    if not reports:
        return
    model.eval()
    test_images = test_images.to(device)
    for name in mode.views:
        logits = VIEWS[name](model, test_images.images, config.precision)
        print(f"IND test images, {name}: {format_figures(ind_figures(logits, test_images.labels, data.classes))}")
    print(f"wrote {path}")


def build(args: argparse.Namespace, data: CSIData) -> tuple:
    """The network as the mode starts from it, and what its making depends on."""
    from csi.network import CSINet, load_csi

    if args.mode == "sup_simclr_CSI":
        return CSINet(data.classes, args.width), {
            "width": args.width,
            "warmup": args.warmup,
            "val_fraction": args.val_fraction,
        }
    source = args.load_path or default_checkpoint(data, "sup_simclr_CSI")
    check_outputs(args.params_dict_name, args.log, inputs=[source])
    model, origin = load_csi(source, data.classes, {"dataset": data.name}, remedy(data, "sup_simclr_CSI"))
    return model, {
        "width": len(model.bn1.weight),
        "val_fraction": origin.get("val_fraction", 0.0),
        "representation": weights_checksum(model),
    }


def weights_checksum(model) -> int:
    """By which a resumed run knows the representation it started from."""
    import zlib

    checksum = 0
    for tensor in model.state_dict().values():
        checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
    return checksum


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
