"""Draw what a CVAE does: IND test images, their reconstructions under them and pseudo-OOD images, in one PNG file.

python -m figure.samples --task same_dataset_mnist --partition partition1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from datasets.tasks import add_data_arguments, all_partitions, default_checkpoint, task_from_arguments, task_names
from utils import UserError, add_common_arguments, check_outputs, positive_float, run_command, seed_number, short_name

COUNT = 24  # images of each kind: two lines


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "figure.samples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, task_names(), all_partitions())
    parser.add_argument("--params-dict-name2", type=Path, help="the CVAE's checkpoint (default: where train writes it)")
    parser.add_argument("--sigma", type=positive_float, help="of the latents (default: the task's)")
    parser.add_argument("--seed", type=seed_number, default=123, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="PNG file (default: results/TASK_PARTITION_samples.png)")
    add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    from datasets.datasetsHelper import load_ind
    from evaluation.plots import sample_grid, save_figure
    from training.stage2 import load_stage1
    from utils import pick_device

    task_name, task, partition = task_from_arguments(args)
    if args.precision != "auto":  # no refusal: reproduce gives every command the same
        print("--precision changes nothing here: the images are made in fp32", flush=True)
    output = args.output or Path("results") / f"{short_name(f'{task_name}_{partition}_samples')}.png"
    path = args.params_dict_name2 or default_checkpoint(task_name, partition, "train_cvae")
    check_outputs(output, inputs=[path])
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: is written as PNG; give it a name that ends in .png")
    device = pick_device(args.device)
    cvae, _ = load_stage1("train_cvae", task, task_name, partition, path, device)
    _, test = load_ind(task, partition, args.data_dir)
    num_ind = len(task.partitions[partition])
    save_figure(sample_grid(make_samples(cvae, test, num_ind, args.sigma or task.sigma, args.seed, device)), output)
    print(f"wrote {output}")


def make_samples(cvae, test, num_ind: int, sigma: float, seed: int, device, count: int = COUNT) -> dict:
    """What the picture shows, by kind: `count` of the `test` images, their reconstructions and as many pseudo-OOD
    images, each [N, C, S, S] in [0, 1] on the CPU. Fewer where there are fewer test images."""
    import torch

    from datasets.datasetsHelper import to_float
    from models.vae import decode_pseudo_ood, draw_codes
    from utils import generator

    rows = torch.randperm(len(test), generator=generator(seed, "samples"))[:count]
    chosen = test.at(rows).to(device)
    codes = draw_codes(len(rows), num_ind, cvae.z_dim, generator(seed, "pseudo")).to(device)
    with torch.no_grad():
        images = to_float(chosen.images)
        pictures = {
            "IND test images": images,
            "reconstructions": cvae.decode(cvae.encode(images)[0], cvae.embed(chosen.labels)),
            "pseudo-OOD images": decode_pseudo_ood(cvae, codes, sigma),
        }
    return {kind: batch.cpu() for kind, batch in pictures.items()}


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
