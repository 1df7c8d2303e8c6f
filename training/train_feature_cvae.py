"""Stage 1 in feature space: the conditional VAE of a frozen classifier's features, its loss and report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets.datasetsHelper import Images, to_float
from datasets.tasks import Task
from models.feature_vae import FeatureCVAE
from models.inference import for_inference, in_chunks
from models.main_model import MainModel
from training.train_classifier import build_classifier
from training.train_cvae import Z_DIM, kl_divergence

LEAST_EXPLAINED = 0.75  # share of the variance of IND features below which what is made teaches little


def build_feature_cvae(task: Task) -> FeatureCVAE:
    """The task's untrained CVAE of features."""
    with torch.random.fork_rng(devices=[]):  # the classifier only tells how many features there are
        features = build_classifier(task).classifier.fc1.in_features
    return FeatureCVAE(features, Z_DIM, task.embedded_classes)


def encoder_of(classifier: MainModel) -> Callable[[Images, str, torch.device], Images]:
    """What turns images into features [N, F], on a device, which the CVAE then sees in their place."""
    network = for_inference(classifier)

    def encode(data: Images, precision: str, device: torch.device) -> Images:
        data = data.to(device)
        network.to(device)
        return Images(in_chunks(lambda part: network.features(to_float(part)), data.images, precision), data.labels)

    return encode


@dataclass(frozen=True)
class FeatureCVAEObjective:
    """Mean squared error per standardised feature + kl_weight * KL / F, both averaged over the batch."""

    kl_weight: float

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(count, Z_DIM, generator=generator),)

    def __call__(self, model: nn.Module, features: Tensor, labels: Tensor, *draws: Tensor) -> dict[str, Tensor]:
        reconstruction, mean, logvar = model(features, labels, *draws)
        standardise = getattr(model, "module", model).standardise  # of a group of processes each has it within
        mse = F.mse_loss(standardise(reconstruction.float()), standardise(features))
        kl = kl_divergence(mean, logvar).mean()
        return {"loss": mse + self.kl_weight * kl / features.shape[1], "mse": mse, "kl_nats": kl}


def evaluate_feature_cvae(model: FeatureCVAE, data: Images, num_ind: int, precision: str) -> dict[str, float]:
    """Share of the variance of features [N, F] that decoding the posterior's mean explains, and KL per feature vector.

    The variance is about the mean of the IND training features, each feature divided by its standard deviation there.
    """
    with torch.no_grad():
        statistics = in_chunks(lambda part: torch.cat(model.encode(part), 1), data.images, precision)
        mean, logvar = statistics.chunk(2, dim=1)
        latents = torch.cat([mean, model.embed(data.labels)], 1)
        made = in_chunks(lambda part: model.decode(*part.chunk(2, 1)), latents, precision)
        target = model.standardise(data.images)
        left, variance = (part.square().sum().item() for part in (model.standardise(made) - target, target))
    explained = 1 - left / variance if variance else 0.0  # all alike: there is nothing to explain
    return {"explained": explained, "kl_nats": kl_divergence(mean, logvar).mean().item()}


def little_explained(metrics: dict[str, float]) -> str:
    """What to think of a generator that has not learned the features, or nothing."""
    if metrics["explained"] >= LEAST_EXPLAINED:
        return ""
    return (
        f"The generator explains {100 * metrics['explained']:.0f} % of the variance of the IND features, less than "
        f"{100 * LEAST_EXPLAINED:.0f} %: its pseudo-OOD features teach little, and fine-tuning may do harm"
    )
