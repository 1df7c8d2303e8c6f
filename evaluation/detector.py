"""A fine-tuned classifier with its score and threshold: everything it takes to judge a new image."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from evaluation.scores import SCORES
from models.inference import for_inference
from models.main_model import MainModel
from utils import UserError, check_finite, load_checkpoint, save_checkpoint

ACCEPTED = 0.95  # share of IND images below the threshold: 95 % TPR with IND as the positive class


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """What a detector is made of, as plain values.

    Attributes:
        task: its name.
        classes: the IND classes, in the order of the logits: their numbers or names in the data set.
        image_size, image_channels, logits, networks: of the classifier, as in `datasets.tasks.Task`.
        score: a key of `SCORES`.
        threshold: images that score above it are OOD.
        threshold_from: the IND images of which 95 % score at or below it: "IND validation" or "IND test".
    """

    task: str
    classes: tuple[int | str, ...]
    image_size: int
    image_channels: int
    logits: int
    networks: str
    score: str
    threshold: float
    threshold_from: str

    def rule(self) -> str:
        """How an image is judged, in words."""
        accepted = f"{100 * ACCEPTED:.0f} % of the {self.threshold_from} images"
        return f"OOD above {self.threshold:.6g}, which {accepted} do not exceed"


class Detector:
    """Scores images [B, C, S, S] in [0, 1] with a fine-tuned classifier, which is set to eval mode and not changed."""

    def __init__(self, model: MainModel, config: DetectorConfig):
        self.model, self.config = model.eval(), config
        self.network = for_inference(model)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, S, S] in [0, 1] -> OOD scores [B], larger meaning more likely OOD, and the numbers [B] of the
        IND classes they look like, which count `config.classes`. Raises `ValueError` as `features` does."""
        return self.judge(self.features(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, F], in fp32.

        Raises:
            ValueError: the images are not what the classifier takes.
        """
        size, channels = self.config.image_size, self.config.image_channels
        if images.shape[1:] != (channels, size, size) or images.dtype != torch.float32:
            expected = f"torch.float32 [B, {channels}, {size}, {size}]"
            raise ValueError(f"images are {images.dtype} {list(images.shape)}, expected {expected}")
        return self.network.features(images).float()

    @torch.no_grad()
    def judge(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F] -> scores [B] and classes [B]. As in fine-tuning's checks the head is in fp32, also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            logits = self.network.classifier(features)
        num_ind = len(self.config.classes)
        return SCORES[self.config.score](logits, num_ind), logits[:, :num_ind].argmax(1)

    def save(self, path: Path, origin: dict) -> None:
        """Write the detector, with how it was made."""
        state = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        save_checkpoint(path, {"detector": asdict(self.config), "model": state, "origin": origin})


def acceptance_threshold(ind_scores: Tensor) -> float:
    """The smallest score that at least 95 % of the [N] IND scores do not exceed."""
    return ind_scores.kthvalue(max(1, -int(-ACCEPTED * len(ind_scores) // 1))).values.item()


def load_detector(path: Path, device: torch.device) -> Detector:
    """Read what `Detector.save` wrote.

    Raises:
        UserError: the file is missing, damaged or something else.
    """
    content, remedy = load_checkpoint(path), "Make one with: python -m eval --mode MODE --save-detector FILE"
    try:
        config = DetectorConfig(**content["detector"])
        model = MainModel(config.image_size, config.image_channels, config.logits, config.networks)
        model.load_state_dict(content["model"])
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError):
        raise UserError(f"{path}: is no detector. {remedy}") from None
    known = isinstance(config.classes, tuple | list) and config.score in SCORES and isinstance(config.threshold, float)
    if not known or not 0 < len(config.classes) <= config.logits:
        raise UserError(f"{path}: its classes, score and threshold do not go with its network. {remedy}")
    check_finite(path, content["model"] | {"the threshold": config.threshold}, remedy)
    return Detector(model.to(device, memory_format=torch.channels_last), config)
