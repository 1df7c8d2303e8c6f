"""The picture that `python -m figure.samples` writes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cli.errors import UserError
from cli.files import check_outputs
from cli.options import Machine
from cmg.config import FineTuneConfig, config_for
from cmg.pseudo_ood import decode, draw_codes
from datasets.datasetsHelper import Images, load_ind, to_float
from datasets.obtain import files_read
from datasets.tasks import Experiment
from evaluation.figure_style import save_figure
from evaluation.plots import sample_grid
from models.vae import ConditionalVAE
from training.networks import load_stage1
from utils import generator, start_computing

COUNT = 24  # images of each kind: two lines


def draw_samples(
    experiment: Experiment,
    path: Path,
    output: Path,
    options: dict[str, object],
    seed: int,
    machine: Machine,
) -> None:
    """Draw what the CVAE in `path` makes, with `options` of stage 2. Raises `UserError` when the checkpoint or the
    images cannot be read, or the picture cannot be written."""
    check_outputs(output, inputs=[path], images=partial(files_read, experiment, machine.data_dir))
    if output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: is written as PNG; give it a name that ends in .png")
    device = start_computing(machine.device)
    cvae, _ = load_stage1(experiment, "train_cvae", path, device)
    _, test = load_ind(experiment, machine.data_dir)
    config = config_for(experiment, "fp32", **options)
    save_figure(sample_grid(make_samples(cvae, test, config, seed, device)), output)
    print(f"wrote {output}")


def make_samples(
    cvae: ConditionalVAE, test: Images, config: FineTuneConfig, seed: int, device: torch.device, count: int = COUNT
) -> dict[str, Tensor]:
    """What the picture shows, by kind: `count` of the `test` images, their reconstructions and as many pseudo-OOD
    images, each [N, C, S, S] in [0, 1] on the CPU. Fewer where there are fewer test images."""
    rows = torch.randperm(len(test), generator=generator(seed, "samples"))[:count]
    chosen = test.at(rows).to(device)
    codes = draw_codes(len(rows), cvae.z_dim, config, generator(seed, "pseudo")).to(device)
    with torch.no_grad():
        images = to_float(chosen.images)
        pictures = {
            "IND test images": images,
            "reconstructions": cvae.decode(cvae.encode(images)[0], cvae.embed(chosen.labels)),
            "pseudo-OOD images": decode(cvae, codes, config.sigma),
        }
    return {kind: batch.cpu() for kind, batch in pictures.items()}
