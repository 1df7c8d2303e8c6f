"""Draw what a CVAE does: IND test images, their reconstructions and pseudo-OOD images, 64 of each, as PNG files.

python -m figure.samples --task same_dataset_mnist --partition partition1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from datasets.tasks import add_data_arguments, all_partitions, default_checkpoint, task_from_arguments, task_names
from utils import add_common_arguments, check_writable, positive_float, replacing, run_command, seed_number

COUNT, SIDE = 64, 8
ENLARGED = 448  # pixels: the least side of a picture


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "figure.samples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, task_names(), all_partitions())
    parser.add_argument("--params-dict-name2", type=Path, help="the CVAE's checkpoint (default: where train writes it)")
    parser.add_argument("--sigma", type=positive_float, help="of the latents (default: the task's)")
    parser.add_argument("--seed", type=seed_number, default=123, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of the pictures (default: results/TASK_PARTITION_samples)")
    add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    import torch

    from datasets.datasetsHelper import load_ind, to_float
    from models.vae import decode_pseudo_ood, draw_codes
    from training.stage2 import load_stage1
    from utils import generator, pick_device

    task_name, task, partition = task_from_arguments(args)
    device = pick_device(args.device)
    path = args.params_dict_name2 or default_checkpoint(task_name, partition, "train_cvae")
    cvae, _ = load_stage1("train_cvae", task, task_name, partition, path, device)
    _, test = load_ind(task, partition, args.data_dir)
    rows = torch.randperm(len(test), generator=generator(args.seed, "samples"))[:COUNT]
    chosen = test.at(rows).to(device)
    codes = draw_codes(COUNT, len(task.partitions[partition]), cvae.z_dim, generator(args.seed, "pseudo")).to(device)
    with torch.no_grad():
        images = to_float(chosen.images)
        pictures = {
            "ind": images,
            "reconstructions": cvae.decode(cvae.encode(images)[0], cvae.embed(chosen.labels)),
            "pseudo_ood": decode_pseudo_ood(cvae, codes, args.sigma or task.sigma),
        }
    for name, batch in pictures.items():
        file = (args.output or Path("results") / f"{task_name}_{partition}_samples") / f"{name}.png"
        save_grid(batch.cpu(), file)
        print(f"wrote {file}")


def save_grid(images, path: Path) -> None:
    """Write images [N, C, S, S] in [0, 1] as one picture of `SIDE` columns, enlarged without smoothing."""
    from torchvision.utils import make_grid, save_image

    check_writable(path)
    scale = -(-ENLARGED // (images.shape[-1] * SIDE))
    enlarged = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    with replacing(path) as temporary:
        save_image(make_grid(enlarged, SIDE, padding=2, pad_value=1.0), temporary, format="png")


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
