"""Stage 1, the conditional VAE: network, loss and report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets.datasetsHelper import Images, to_float
from datasets.tasks import Task
from models.inference import in_chunks
from models.vae import ClassConditionalVAE, ConditionalVAE

Z_DIM = 32


def build_cvae(task: Task) -> ConditionalVAE:
    """The task's untrained CVAE."""
    return ConditionalVAE(Z_DIM, task.image_channels, task.image_size, task.embedded_classes, task.networks)


@dataclass(frozen=True)
class CVAEObjective:
    """Mean squared error per pixel + kl_weight * KL / (C * H * W), both averaged over the batch; of features, per
    standardised feature, and their number."""

    kl_weight: float

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(count, Z_DIM, generator=generator),)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *draws: Tensor) -> dict[str, Tensor]:
        pixels = to_float(images)
        reconstruction, mean, logvar = model(pixels, labels, *draws)
        measured = getattr(model, "module", model).measured  # of one of several processes the network is within
        mse = F.mse_loss(measured(reconstruction.float()), measured(pixels))
        kl = kl_divergence(mean, logvar).mean()
        return {"loss": mse + self.kl_weight * kl / pixels[0].numel(), "mse": mse, "kl_nats": kl}


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over the last dimension: [B, D] -> [B]."""
    return -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(-1)


@torch.no_grad()
def reconstruct(model: ClassConditionalVAE, data: Images, precision: str) -> tuple[Tensor, float]:
    """What decoding the posterior's mean gives, [N, …], and KL in nats per image."""
    statistics = in_chunks(lambda images: torch.cat(model.encode(to_float(images)), 1), data.images, precision)
    mean, logvar = statistics.chunk(2, dim=1)
    latents = torch.cat([mean, model.embed(data.labels)], 1)
    made = in_chunks(lambda part: model.decode(*part.chunk(2, 1)), latents, precision)
    return made, kl_divergence(mean, logvar).mean().item()


def evaluate_cvae(model: ConditionalVAE, data: Images, num_ind: int, precision: str) -> dict[str, float]:
    """Reconstruction error per pixel, decoding the posterior's mean, and KL per image."""
    made, kl = reconstruct(model, data, precision)
    return {"mse": ((made - to_float(data.images)) ** 2).mean().item(), "kl_nats": kl}


COLLAPSED = 0.1  # nats: below, the latents carry no information about the image


def collapse_remark(metrics: dict[str, float]) -> str:
    """What to do about a posterior that carries no information, or nothing."""
    if metrics["kl_nats"] >= COLLAPSED:
        return ""
    return "The posterior has collapsed: the decoder ignores its latents. Try --warmup 200 or another --seed"
