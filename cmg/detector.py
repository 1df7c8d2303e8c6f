"""CMG as a detector: it is fitted, judges images, and is saved and loaded.

    detector = CMGDetector(classifier, cvae, FineTuneConfig(num_ind=10, sigma=5.0)).fit(loader)
    scores = detector.predict(images)            # larger means more likely OOD
    detector.save(Path("detector.pt"))
    detector = CMGDetector.load(Path("detector.pt"), torch.device("cpu"))

It is one of pytorch-ood's detectors (`fit`, `predict`, `fit_features`, `predict_features`) and runs in that library's
benchmarks. `eval --save-detector` writes the same files, and `predict` reads them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pytorch_ood.api import FeaturesDetector, RequiresFittingException
from pytorch_ood.utils import extract_features
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cli.errors import UserError
from cli.files import fits
from cli.options import DEFAULT_SEED
from cmg.config import FineTuneConfig
from cmg.data import FeatureBank
from cmg.scores import SCORES
from cmg.stage2 import TUNABLE, Stage2, split_model
from datasets.tasks import BackboneChoice
from evaluation.baselines import PostHoc
from evaluation.metrics import ACCEPTED, acceptance_threshold
from evaluation.post_hoc import POST_HOC
from models.backbone import Backbone
from models.inference import CHUNK, for_inference, in_chunks
from models.main_model import MainModel
from models.vae import ClassConditionalVAE
from training.backbone import answers, load_backbone
from training.checkpoints import fill_network
from utils import autocast, check_values, load_checkpoint, pick_precision, save_checkpoint

FORMER_SCORES = {
    "CMG-energy": "energy-ind",
    "CMG-energy over all logits": "energy-all",
    "CMG-softmax": "ood-slot",
}  # what files written before call them


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """What a detector is made of, as plain values.

    Attributes:
        task: its name; empty for a detector made in Python.
        classes: the IND classes, in the order of the logits: their numbers or names in the data set.
        image_size, image_channels, logits, networks: of the classifier, as in `datasets.tasks.Task`.
        score: a key of `SCORES`, or of `POST_HOC`: a post-hoc detector of the pretrained classifier.
        threshold: images that score above it are OOD.
        precision: what the extractor ran in when the threshold was set; "auto" in files that do not tell.
        backbone, backbone_size: name and image size of the pre-trained network before the classifier, if there is one.
        threshold_from: the IND images of which 95 % score at or below it, such as "IND test".
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
    precision: str = "auto"
    backbone: str = ""
    backbone_size: int = 0

    def rule(self) -> str:
        """How an image is judged, in words."""
        accepted = f"{100 * ACCEPTED:.0f} % of the {self.threshold_from} images"
        return f"OOD above {self.threshold:.6g}, which {accepted} do not exceed"


# What the fields of a file must be, beside the classes and the score.
CONFIG = {"image_size": int, "image_channels": int, "logits": int, "backbone_size": int, "backbone": str}
CONFIG |= {"threshold": lambda value: isinstance(value, float)}
CONFIG |= {"threshold_from": lambda value: isinstance(value, str) and value.isprintable()}
CONFIG |= {"precision": lambda value: value in ("auto", "fp32", "bf16")}


class Encoder(nn.Module):
    """The frozen part of a classifier, behind its backbone: images [B, C, S, S] in [0, 1] -> features [B, F], fp32."""

    def __init__(self, model: MainModel, tune: str, precision: str, backbone: Backbone | None):
        super().__init__()
        self.network, self.tune, self.precision, self.backbone = for_inference(model), tune, precision, backbone

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with autocast(images.device, self.precision):
            if self.backbone is not None:
                images = self.backbone(images).float()
            return split_model(self.network, self.tune).features(images).float()


class CMGDetector(FeaturesDetector):
    """Fine-tunes the head of a copy of the classifier against class-mixed pseudo-OOD images and scores with it.

    Class-Mixed Generation (Wang et al., ECML PKDD 2022). Fitting is stage 2 of the method as `eval` runs it; which of
    two equal runs it is follows from the seed and the order of the loader's images, so let the loader not shuffle.

    Args:
        model: the trained classifier of stage 1; it stays as it is.
        cvae: the trained CVAE; not needed where the detector is fitted already.
        config: of the fine-tuning; its `eval_every` plays no part.
        mode: a key of `cmg.losses.MODES`.
        seed: of the order of images and of the pseudo-OOD images.
        classes: names of the IND classes in the order of the logits (default: 0, 1, …).
        backbone: what images go through before they come to the classifier, if anything.

    Attributes:
        threshold, threshold_from: images that score above it are OOD; see `calibrate`.
    """

    requires_fit = True

    def __init__(
        self,
        model: MainModel,
        cvae: ClassConditionalVAE | None,
        config: FineTuneConfig,
        mode: str = "CMG-energy",
        seed: int = DEFAULT_SEED,
        classes: Sequence[int | str] | None = None,
        backbone: Backbone | None = None,
    ):
        self.model, self.cvae = copy.deepcopy(model).eval(), cvae
        self.finetuning, self.mode, self.seed = config, mode, seed
        self.classes = tuple(range(config.num_ind)) if classes is None else tuple(classes)
        self.backbone = backbone
        self.encoder = Encoder(self.model, config.tune, config.precision, backbone)
        self.head: nn.Module | None = None
        self.post_hoc: PostHoc | None = None
        self.threshold, self.threshold_from = math.inf, ""

    # --- fitting ----------------------------------------------------------------------------------

    def fit(self, data_loader: DataLoader) -> CMGDetector:
        """Encode the images of a loader, which yields (images [B, C, S, S], labels [B]), once, and fine-tune the head.

        Images with negative labels are ignored. Raises `ValueError` as `fit_features` does.
        """
        return self.fit_features(*extract_features(data_loader, self.encoder, self.device))

    def fit_features(self, z: Tensor, labels: Tensor) -> CMGDetector:
        """Fine-tune the head on features [N, F] of IND training images, as `encoder` gives them, and labels [N].

        The threshold is that of the training images until `calibrate` sets another.

        Raises:
            ValueError: no label, one that is no IND class, or there is no CVAE.
        """
        known = labels >= 0
        if not known.any():
            raise ValueError("no IND samples: every label is negative")
        if labels.max() >= self.finetuning.num_ind:
            raise ValueError(f"a label is {labels.max()}, expected less than config.num_ind, {self.finetuning.num_ind}")
        if self.cvae is None:
            raise ValueError(
                "this detector has no CVAE to make pseudo-OOD images with: construct it with one to fit it"
            )
        z, labels = z[known].to(self.device), labels[known].to(self.device)
        tune = self.finetuning.tune
        split = split_model(self.encoder.network, tune)._replace(head=split_model(self.model, tune).head)
        stage2 = Stage2.of(split, self.cvae, self.finetuning)
        # Evaluations choose nothing here; on a few training images they still find out whether the head diverges.
        few = slice(self.finetuning.batch_size)
        bank = FeatureBank(z, labels, torch.empty(0), z[few], labels[few], {})
        (run,) = stage2.fine_tune(bank, [self.mode], [self.seed])
        return self.adopt(run.last).calibrate(z, "IND training")

    def adopt(self, parameters: dict[str, Tensor]) -> CMGDetector:
        """Take over the parameters of a fine-tuned head."""
        tuned = self.model.get_submodule(TUNABLE[self.finetuning.tune])
        tuned.load_state_dict(parameters)
        self.head = copy.deepcopy(tuned).requires_grad_(False)
        return self

    def adopt_post_hoc(self, name: str, features: Tensor, labels: Tensor) -> CMGDetector:
        """Become the post-hoc detector `name` of `POST_HOC` on the pretrained classifier, without CMG, fitted on
        features [N, F] of IND training images, as `encoder` gives them, and their labels [N]. The head must be tuned as
        a whole, as in the method. Raises `ValueError` as `PostHoc.fit` does."""
        self.adopt(self.model.classifier.state_dict())
        hidden = in_chunks(self.model.classifier.hidden, features, "fp32")
        self.post_hoc = PostHoc.fit(name, self.model, hidden, labels, self.finetuning.num_ind)
        return self

    def calibrate(self, features: Tensor, name: str) -> CMGDetector:
        """Set the threshold to the least score that 95 % of some IND images do not exceed.

        Args:
            features: [N, F] of the images, as `encoder` gives them.
            name: what the images are called.
        """
        self.threshold, self.threshold_from = acceptance_threshold(self.judge(features)[0]), name
        return self

    # --- judging ----------------------------------------------------------------------------------

    def predict(self, x: Tensor) -> Tensor:
        """OOD scores [B] of images [B, C, S, S] in [0, 1].

        Raises:
            RequiresFittingException: before `fit`.
            ValueError: the images are not what the classifier takes.
        """
        return self.judge(self.features(x.to(self.device)))[0]

    def predict_features(self, z: Tensor) -> Tensor:
        """OOD scores [B] of features [B, F]. Raises `RequiresFittingException` before `fit`."""
        return self.judge(z)[0]

    def features(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, F], in fp32. Raises as `predict` does."""
        if self.head is None:
            raise RequiresFittingException()
        channels, size = self.read_shape
        if images.shape[1:] != (channels, size, size) or images.dtype != torch.float32:
            expected = f"torch.float32 [B, {channels}, {size}, {size}]"
            raise ValueError(f"images are {images.dtype} {list(images.shape)}, expected {expected}")
        return self.encoder(images)

    @property
    def read_shape(self) -> tuple[int, int]:
        """Channels and side of the images that it takes."""
        return (3, self.backbone.size) if self.backbone else (self.model.image_channels, self.model.image_size)

    @torch.no_grad()
    def judge(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F] -> scores [B] and the numbers [B] of the IND classes the images look like, which count `classes`.

        As in fine-tuning's evaluations the head is in fp32, also under autocast: bf16 logits would have many images
        share a score. Raises `RequiresFittingException` before `fit`.
        """
        if self.head is None:
            raise RequiresFittingException()
        with autocast(features.device, "fp32"):
            logits = self.head(features)
            hidden = self.model.classifier.hidden(features) if self.post_hoc else None
        num_ind = self.finetuning.num_ind
        if self.post_hoc:
            scores = torch.cat([self.post_hoc.score(part) for part in hidden.cpu().split(CHUNK["cpu"])])
            scores = scores.to(features.device)
        else:
            scores = SCORES[self.finetuning.score_of(self.mode)](logits, num_ind)
        return scores, logits[:, :num_ind].argmax(1)

    # --- files ------------------------------------------------------------------------------------

    def config(self, task: str = "") -> DetectorConfig:
        """What a file says of this detector."""
        return DetectorConfig(
            task=task,
            classes=self.classes,
            image_size=self.model.image_size,
            image_channels=self.model.image_channels,
            logits=self.model.classes,
            networks=self.model.dataset,
            score=self.post_hoc.name if self.post_hoc else self.finetuning.score_of(self.mode),
            threshold=self.threshold,
            threshold_from=self.threshold_from,
            precision=self.finetuning.precision,
            backbone=self.backbone.name if self.backbone else "",
            backbone_size=self.backbone.size if self.backbone else 0,
        )

    def rule(self) -> str:
        """How an image is judged, in words."""
        return self.config().rule()

    def save(self, path: Path, origin: dict | None = None, task: str = "") -> None:
        """Write the fitted detector, with how it was made. Raises `RequiresFittingException` before `fit`."""
        if self.head is None:
            raise RequiresFittingException()
        state = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        content = {"detector": asdict(self.config(task)), "model": state, "origin": origin or {}}
        if self.backbone is not None:
            content["backbone"] = {name: t.cpu().contiguous() for name, t in self.backbone.state_dict().items()}
            content["backbone_answers"] = answers(self.backbone)
        if self.post_hoc:
            content["fitted_on"] = {"features": self.post_hoc.features, "labels": self.post_hoc.labels}
        save_checkpoint(path, content)

    @classmethod
    def load(cls, path: Path, device: torch.device, precision: str = "auto") -> CMGDetector:
        """Read what `save` wrote; the extractor runs in `precision`, where it is "auto" as it did when saved.

        Raises:
            UserError: the file is missing, damaged or something else.
        """
        content, remedy = load_checkpoint(path), "Make one with: python -m eval --mode MODE --save-detector FILE"
        try:
            config = DetectorConfig(**content["detector"])
            score = FORMER_SCORES.get(config.score, config.score)
            model = MainModel(config.image_size, config.image_channels, config.logits, config.networks)
            state, of_backbone = dict(content["model"]), dict(content.get("backbone", {}))
            fitted_on = dict(content.get("fitted_on", {}))
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError):
            raise UserError(f"{path}: is not a detector. {remedy}") from None
        known = fits(asdict(config), CONFIG) and score in (*SCORES, *POST_HOC) and are_classes(config.classes)
        if not known or len(config.classes) + (score == "ood-slot") > config.logits:
            raise UserError(f"{path}: its classes, score and threshold do not go with its network. {remedy}")
        check_values(path, state | {"the threshold": config.threshold}, remedy)
        check_values(path, of_backbone, remedy)
        check_values(path, fitted_on, remedy)
        fill_network(path, state, model, "the network that this detector names", {}, remedy)
        precision = pick_precision(precision, device, config.precision)
        # No part of fine-tuning but the score is of any use to a detector that has been fitted.
        finetuning = FineTuneConfig(
            num_ind=len(config.classes), sigma=1.0, score=score if score in SCORES else None, precision=precision
        )
        backbone = None
        if config.backbone:
            backbone = load_backbone(BackboneChoice(config.backbone, size=config.backbone_size), pretrained=False)
            fill_network(path, of_backbone, backbone, f"the backbone {config.backbone}", {}, remedy)
            if content.get("backbone_answers", ours := answers(backbone)) != ours:
                raise UserError(f"{path}: {config.backbone} gives other features than when it was saved. {remedy}")
            backbone.to(device, memory_format=torch.channels_last)
        model.to(device, memory_format=torch.channels_last)
        detector = cls(model, None, finetuning, classes=config.classes, backbone=backbone)
        detector.threshold, detector.threshold_from = config.threshold, config.threshold_from
        detector.adopt(model.classifier.state_dict())
        if score in POST_HOC:
            try:
                detector.post_hoc = PostHoc.fit(score, detector.model, **fitted_on, num_ind=len(config.classes))
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}: does not hold what {score} is fitted on ({error}). {remedy}") from None
        return detector


def are_classes(names: object) -> bool:
    """Whether these are numbers or names of classes, at least one and each once."""
    return (
        isinstance(names, tuple | list)
        and all(fits(name, int) or isinstance(name, str) for name in names)
        and 0 < len(names) == len(set(names))
    )
