"""Stage 1 in feature space: the conditional VAE of a frozen classifier's features. Its loss is that of images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from datasets.datasetsHelper import Images, to_float
from datasets.tasks import Task
from models.feature_vae import FeatureCVAE
from models.inference import for_inference, in_chunks
from models.layers import EXTRACTORS, count_features
from models.main_model import MainModel
from training.train_cvae import Z_DIM, reconstruct

LEAST_EXPLAINED = 0.75  # share of the variance of IND features below which what is made teaches little


def build_feature_cvae(task: Task) -> FeatureCVAE:
    """The task's untrained CVAE of features."""
    with torch.random.fork_rng(devices=[]):  # the extractor only tells how many features there are
        extractor = EXTRACTORS[task.networks](task.image_channels)
    features = count_features(extractor, task.image_channels, task.image_size)
    return FeatureCVAE(features, Z_DIM, task.embedded_classes)


def encoder_of(classifier: MainModel) -> Callable[[Images, str, torch.device], Images]:
    """What turns images into features [N, F], on a device, which the CVAE then sees in their place."""
    network = for_inference(classifier)

    def encode(data: Images, precision: str, device: torch.device) -> Images:
        data = data.to(device)
        network.to(device)
        return Images(in_chunks(lambda part: network.features(to_float(part)), data.images, precision), data.labels)

    return encode


def evaluate_feature_cvae(model: FeatureCVAE, data: Images, num_ind: int, precision: str) -> dict[str, float]:
    """Share of the variance of features [N, F] that decoding the posterior's mean explains; KL per feature vector."""
    made, kl = reconstruct(model, data, precision)
    return {"explained": share_explained(model, data.images, made), "kl_nats": kl}


def share_explained(model: FeatureCVAE, features: Tensor, made: Tensor) -> float:
    """Share of the variance of features [N, F] that `made` explains.

    The variance is about the mean of the IND training features, each feature divided by its standard deviation there.
    """
    target = model.measured(features)
    left, variance = (part.square().sum().item() for part in (model.measured(made) - target, target))
    return 1 - left / variance if variance else 0.0  # 0: all alike, nothing to explain


def little_explained(metrics: dict[str, float]) -> str:
    """What to think of a generator that has not learned the features, or nothing."""
    if metrics["explained"] >= LEAST_EXPLAINED:
        return ""
    return (
        f"The generator explains {100 * metrics['explained']:.0f} % of the variance of the IND features, less than "
        f"{100 * LEAST_EXPLAINED:.0f} %: its pseudo-OOD features teach little, and fine-tuning may do harm"
    )
