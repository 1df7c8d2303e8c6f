"""CMG as a detector of pytorch-ood, beside that library's own: `fit(loader)`, `predict(x)`, its benchmarks.

detector = CMGDetector(classifier, cvae, FineTuneConfig(num_ind=10, sigma=5.0))
detector.fit(loader)         # batches (images in [0, 1], labels)
scores = detector(images)    # larger means more likely OOD
"""

from __future__ import annotations

from copy import deepcopy

import torch
from pytorch_ood.api import FeaturesDetector, RequiresFittingException
from pytorch_ood.utils import extract_features
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models.main_model import MainModel
from models.vae import ConditionalVAE
from training.fine_tune import FeatureBank, FineTuneConfig, fine_tune, head_logits, score_logits
from training.stage2 import make_pseudo, split_model
from utils import autocast


class Encoder(nn.Module):
    """The frozen part of a classifier: images [B, C, S, S] in [0, 1] -> features [B, F] in fp32.

    Args:
        tune: what is not frozen, as in `split_model`.
        precision: "fp32" or "bf16".
    """

    def __init__(self, model: MainModel, tune: str, precision: str):
        super().__init__()
        self.model, self.tune, self.precision = model, tune, precision

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features, _ = split_model(self.model, self.tune)
        with autocast(images.device, self.precision):
            return features(images).float()


class CMGDetector(FeaturesDetector):
    """Fine-tunes a copy of the classifier's head against class-mixed pseudo-OOD images and scores with it.

    Class-Mixed Generation (Wang et al., ECML PKDD 2022). Fitting is stage 2 of the method as `eval` runs it; which of
    two equal runs it is follows from the seed and the order of the loader's images, so let the loader not shuffle.

    Args:
        model, cvae: the trained networks of stage 1; both are set to eval mode and otherwise left as they are.
        config: of the fine-tuning; its `check_every` plays no part.
        mode: "CMG-energy" or "CMG-softmax".
        tune: which part of the classifier is fine-tuned, "head" or "last-layer".
        seed: of the order of images and of the pseudo-OOD images.
    """

    requires_fit = True

    def __init__(
        self,
        model: MainModel,
        cvae: ConditionalVAE,
        config: FineTuneConfig,
        mode: str = "CMG-energy",
        tune: str = "head",
        seed: int = 123,
    ):
        self.model, self.cvae = model.eval(), cvae.eval()
        self.config, self.mode, self.tune, self.seed = config, mode, tune, seed
        self.encoder = Encoder(model, tune, config.precision)
        self.head: nn.Module | None = None

    def fit(self, data_loader: DataLoader) -> CMGDetector:
        """Encode the images of a loader, which yields (images [B, C, S, S], labels [B]), once, and fine-tune the head.

        Images with negative labels are ignored. Raises `ValueError` as `fit_features` does.
        """
        return self.fit_features(*extract_features(data_loader, self.encoder, self.device))

    def fit_features(self, z: Tensor, labels: Tensor) -> CMGDetector:
        """Fine-tune the head on features [N, F] of IND training images, as `encoder` gives them, and labels [N].

        Raises:
            ValueError: no label, or one that is no IND class.
        """
        known = labels >= 0
        if not known.any():
            raise ValueError("no IND samples: every label is negative")
        if labels.max() >= self.config.num_ind:
            raise ValueError(f"a label is {labels.max()}; config.num_ind is {self.config.num_ind}")
        z, labels = z[known].to(self.device), labels[known].to(self.device)
        features, head = split_model(self.model, self.tune)
        pseudo = make_pseudo(self.cvae, features, self.config, self.device)
        # Checks choose nothing here; on a few training images they still find out whether the head diverges.
        few = slice(self.config.batch_size)
        bank = FeatureBank(z, labels, torch.empty(0), z[few], labels[few], {})
        (run,) = fine_tune(head, bank, pseudo, self.config, [self.mode], [self.seed])
        self.head = deepcopy(head).requires_grad_(False)
        self.head.load_state_dict(run.last)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """OOD scores [B] of images [B, C, S, S] in [0, 1]. Raises `RequiresFittingException` before `fit`."""
        if self.head is None:
            raise RequiresFittingException()
        return self.predict_features(self.encoder(x.to(self.device)))

    def predict_features(self, z: Tensor) -> Tensor:
        """OOD scores [B] of features [B, F]. Raises `RequiresFittingException` before `fit`."""
        if self.head is None:
            raise RequiresFittingException()
        logits = head_logits(self.head, dict(self.head.named_parameters()), z)
        return score_logits(logits, self.mode, self.config)
