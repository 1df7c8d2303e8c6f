"""The detectors of `evaluation.post_hoc`, fitted and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytorch_ood.detector
import torch
from torch import Tensor, nn

from cli.errors import memory_shortage
from cli.progress import Progress
from datasets.datasetsHelper import to_float
from evaluation.post_hoc import POST_HOC, Baseline, Parts
from models.inference import CHUNK
from models.main_model import MainModel


def baseline_scores(
    model: MainModel,
    train: Tensor,
    labels: Tensor,
    features: Mapping[str, Tensor],
    images: Mapping[str, Tensor],
    num_ind: int,
    names: Sequence[str] = tuple(POST_HOC),
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """OOD scores of the detectors called `names`, a larger score meaning more likely OOD.

    Args:
        model: the classifier, in eval mode; it stays as it is.
        train: what the last layer sees of the IND training images, [N, 512], on the CPU.
        labels: theirs, 0 … num_ind - 1, of each at least one, [N].
        features: the same of sets of images to score by name, [M, 512].
        images: those images for the detectors that read them, uint8 [M, C, S, S], on the device of the model; without
            one of the sets these are left out.

    Returns:
        detector -> set -> scores [M] on the CPU; and each detector that is left out, since it fails on this classifier
        and these images or gives scores that are no numbers -> the reason.
    """
    with torch.no_grad():
        progress = Progress(len(names) * sum(map(len, features.values())), "baselines")
        scores, left_out = {}, {}
        for name in names:
            baseline = POST_HOC[name]
            of_images = baseline.reads == "images"
            if of_images and (lacking := features.keys() - images.keys()):
                left_out[name] = f"since it reads images, and of {', '.join(lacking)} there are features only"
                continue
            parts, inputs = parts_of(model, baseline, num_ind), images if of_images else features
            try:
                scores[name] = fit_and_score(name, parts, train, labels.cpu(), inputs, progress)
            except FAILURES as error:
                left_out[name] = reason_of(error)
        progress.close()
    return scores, left_out


# A detector may fail on a classifier and its images in any of these ways.
FAILURES = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, ValueError)


def reason_of(error: Exception) -> str:
    """Why a detector cannot be used, on one line."""
    reason = memory_shortage(error) or (str(error).splitlines() or [type(error).__name__])[0]
    return reason.rstrip(". ")


def parts_of(model: MainModel, baseline: Baseline, num_ind: int) -> Parts:
    """The parts of the classifier with the outputs that a detector is to see."""
    last, outputs = model.classifier.fc2, None if baseline.all_outputs else num_ind
    copy = nn.Linear(last.in_features, len(last.bias[:outputs])).requires_grad_(False)
    copy.weight.copy_(last.weight[:outputs])
    copy.bias.copy_(last.bias[:outputs])
    return Parts(copy, lambda images: model(images)[:, :outputs])


def fit_and_score(
    name: str,
    parts: Parts,
    fitted_on: Tensor,
    labels: Tensor,
    inputs: dict[str, Tensor],
    progress: Progress,
) -> dict[str, Tensor]:
    """Fit the detector called `name` on features [N, 512] and labels [N] and score sets of features or uint8 images.

    Raises:
        ValueError: scores that are no numbers; and whatever the detector raises.
    """
    of_batch = fit(POST_HOC[name], parts, fitted_on, labels)

    def score(part: Tensor) -> Tensor:
        progress.advance(len(part), lambda: name)
        return of_batch(part)

    scores = {
        images: torch.cat([score(part) for part in batch.split(CHUNK["cpu"])]) for images, batch in inputs.items()
    }
    for images, of_set in scores.items():
        unscored = int((~of_set.isfinite()).sum())
        if unscored:
            raise ValueError(f"{unscored} of the {len(of_set)} images of {images} have a score that is not finite")
    return scores


def fit(baseline: Baseline, parts: Parts, fitted_on: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """One detector, fitted on features [N, 512] and labels [N]: a function from features [B, 512], or uint8 images, to
    scores [B] on the CPU. Raises whatever the detector raises, of `FAILURES`."""
    dtype = torch.float64 if baseline.double else torch.float32
    views = {
        "logits": lambda features: parts.last(features).double(),
        "features": lambda features: features.to(dtype),
        "feature_maps": lambda features: features[:, :, None, None],
        "images": to_float,
    }
    view = views[baseline.reads]
    detector = baseline.make(pytorch_ood.detector, parts)
    if detector.requires_fit:
        with default_dtype(dtype):  # of the tensors that the library makes itself
            getattr(detector, f"fit_{baseline.reads}")(view(fitted_on), labels)
    # Detectors by gradients have no more than `predict`.
    predict = getattr(detector, f"predict_{baseline.reads}", detector.predict)
    return lambda part: predict(view(part)).cpu()


class PostHoc(NamedTuple):
    """A detector of `POST_HOC` that has been fitted, with what it was fitted on, so that it can be fitted again.

    Attributes:
        features, labels: of the IND training images, [N, 512] and [N], on the CPU.
        score: features [B, 512] -> scores [B] on the CPU.
    """

    name: str
    features: Tensor
    labels: Tensor
    score: Callable[[Tensor], Tensor]

    @classmethod
    @torch.no_grad()
    def fit(cls, name: str, model: MainModel, features: Tensor, labels: Tensor, num_ind: int) -> PostHoc:
        """Raises `ValueError`: it reads images, or it cannot be fitted on these features."""
        baseline = POST_HOC[name]
        if baseline.reads == "images":
            raise ValueError(f"{name} reads images, not features")
        if not (isinstance(features, Tensor) and isinstance(labels, Tensor)):
            raise ValueError("its features and labels are no tensors")
        features, labels = features.cpu(), labels.cpu()
        width = model.classifier.fc2.in_features
        if features.shape != (len(labels), width) or not features.is_floating_point():
            raise ValueError(f"its features are {features.dtype} {list(features.shape)}, expected {width} an image")
        if labels.dtype != torch.int64 or not len(labels) or not 0 <= labels.min() <= labels.max() < num_ind:
            raise ValueError(f"its labels are not the numbers of {num_ind} classes")
        try:
            score = fit(baseline, parts_of(model, baseline, num_ind), features, labels)
        except FAILURES as error:
            raise ValueError(f"{name} cannot be fitted: {reason_of(error)}") from None
        return cls(name, features, labels, score)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors of `dtype` within the block where none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
