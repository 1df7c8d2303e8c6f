"""Stage 1: train the IND classifier or the conditional VAE.

    python -m train --command train_classifier
    python -m train --task same_dataset_mnist --partition partition1 --command train_cvae
    python -m train --task custom --ind-dir birds      (birds/train/CLASS/IMAGE, birds/test/CLASS/IMAGE)

writes a state dict to --params-dict-name and prints the network's figures on the IND test images. An interrupted
run goes on when the same command is given again; several GPUs: torchrun --nproc_per_node=N -m -- train …
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

from datasets.tasks import (
    COMMANDS,
    add_data_arguments,
    all_partitions,
    default_checkpoint,
    task_from_arguments,
    task_names,
)
from training.options import LEARNING_RATE
from training.runs import add_run_arguments, format_figures, idle_options, is_done, train_to_checkpoint
from utils import (
    add_common_arguments,
    number,
    positive_float,
    positive_int,
    run_command,
    seed_number,
)

NEEDS = {"kl_weight": ("command", ("train_cvae",))}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, task_names(), all_partitions())
    parser.add_argument(
        "--command", choices=list(COMMANDS), default="train_classifier", help="which network (default: %(default)s)"
    )
    parser.add_argument(
        "--params-dict-name", type=Path, help="checkpoint to write (default: ckpt/TASK_PARTITION_NETWORK.pkl)"
    )
    parser.add_argument("--seed", type=seed_number, default=123, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=positive_int, help="(default: the task's)")
    parser.add_argument(
        "--batch-size", type=positive_int, help="images per step over all processes (default: the task's)"
    )
    parser.add_argument(
        "--lr", type=positive_float, default=LEARNING_RATE, help="learning rate of Adam (default: %(default)s)"
    )
    parser.add_argument(
        "--kl-weight", type=number(float, least=0), help="of the KL term of the CVAE's loss (default: the task's)"
    )
    parser.add_argument(
        "--warmup", type=number(int, least=0), default=0, help="steps over which the learning rate rises (default: 0)"
    )
    parser.add_argument(
        "--val-fraction",
        type=number(float, least=0, below=1),
        default=0.0,
        help="share of the IND training images kept out, on which eval can choose its step (default: %(default)s)",
    )
    add_run_arguments(parser)
    add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    from training.processes import joined_processes

    with joined_processes(args.device) as processes:
        train(args, processes)


def train(args: argparse.Namespace, processes) -> None:
    """Everything between the parsed arguments and the checkpoint, in this process of `processes`."""
    import torch

    from datasets.datasetsHelper import load_ind, split_validation
    from training.loop import LoopConfig, fingerprint, warmup_schedule
    from training.stages import STAGES
    from utils import derive_seed, pick_precision

    task_name, task, partition = task_from_arguments(args)
    # No refusal: scripts give both commands the same options.
    for remark in idle_options(args, get_parser(), NEEDS) if processes.is_main else ():
        print(f"{remark}: it changes nothing here", flush=True)
    path = args.params_dict_name or default_checkpoint(task_name, partition, args.command)
    if args.kl_weight is not None:
        task = replace(task, kl_weight=args.kl_weight)
    device, stage = processes.device, STAGES[args.command]
    config = LoopConfig(
        epochs=args.epochs or task.epochs[args.command],
        batch_size=args.batch_size or task.batch_size,
        learning_rate=args.lr,
        warmup_steps=args.warmup,
        seed=args.seed,
        precision=pick_precision(args.precision, device),
    )
    training_images, test_images = load_ind(task, partition, args.data_dir)
    training_images, _ = split_validation(training_images, args.val_fraction)
    what = {"command": args.command, "task": task_name, "partition": partition, "val_fraction": args.val_fraction}
    what |= {"kl_weight": task.kl_weight} if args.command == "train_cvae" else {}
    what |= {"data": fingerprint(training_images)}
    if is_done(path, what | asdict(config), args, show=processes.is_main):
        return

    torch.manual_seed(derive_seed(args.seed, "initialisation", args.command))
    model = stage.build(task).to(device, memory_format=torch.channels_last)
    stage.compact(model)
    reports = train_to_checkpoint(
        path,
        model,
        torch.optim.Adam(model.parameters(), lr=args.lr, fused=True),
        training_images,
        stage.objective(task),
        config=config,
        what=what,
        about=f"{args.command}: {task_name} {partition}",
        moments=2,
        processes=processes,
        args=args,
        schedule=warmup_schedule(config, len(training_images)) if args.warmup else None,
        finish=stage.expand,
    )
    if not reports:
        return
    figures = stage.evaluate(model.eval(), test_images.to(device), len(task.partitions[partition]), config.precision)
    print(f"IND test images: {format_figures(figures)}{stage.remark(figures)}")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
