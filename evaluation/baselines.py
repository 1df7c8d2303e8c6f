"""The detectors of `evaluation.post_hoc`, fitted and scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytorch_ood.detector
import torch
from torch import Tensor, nn

from cli.errors import memory_shortage
from cli.progress import Progress
from datasets.datasetsHelper import Images, to_float
from evaluation.post_hoc import POST_HOC, Baseline, Parts
from models.inference import CHUNK, in_chunks
from models.main_model import MainModel


def baseline_scores(
    model: MainModel,
    train: Images,
    images: dict[str, Tensor],
    num_ind: int,
    precision: str,
    names: Sequence[str] = tuple(POST_HOC),
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """OOD scores of the detectors called `names`, a larger score meaning more likely OOD.

    Args:
        model: the classifier, in eval mode; it stays as it is.
        train: the IND training images, uint8 [N, C, S, S], and labels 0 … num_ind - 1, of each at least one.
        images: sets of images to score by name, uint8 [M, C, S, S], on the device of the model.
        precision: "fp32" or "bf16", of the extractor.

    Returns:
        detector -> set -> scores [M] on the CPU; and each detector that is left out, since it fails on this classifier
        and these images or gives scores that are no numbers -> the reason.
    """
    with torch.no_grad():
        fitted_on = penultimate(model, train.images, precision)
        features = {name: penultimate(model, part, precision) for name, part in images.items()}
        progress = Progress(len(names) * sum(map(len, images.values())), "baselines")
        scores, left_out = {}, {}
        for name in names:
            baseline = POST_HOC[name]
            parts = parts_of(model, None if baseline.all_outputs else num_ind)
            inputs = images if baseline.reads == "images" else features
            try:
                scores[name] = fit_and_score(baseline, parts, fitted_on, train.labels.cpu(), inputs, progress)
            except (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, ValueError) as error:
                reason = memory_shortage(error) or (str(error).splitlines() or [type(error).__name__])[0]
                left_out[name] = reason.rstrip(". ")
        progress.close()
    return scores, left_out


def penultimate(model: MainModel, images: Tensor, precision: str) -> Tensor:
    """What the last layer sees of uint8 images [N, C, S, S]: [N, 512], on the CPU; the head runs in fp32."""
    extracted = in_chunks(lambda part: model.features(to_float(part)), images, precision)
    return in_chunks(model.classifier.hidden, extracted, "fp32").cpu()


def parts_of(model: MainModel, outputs: int | None) -> Parts:
    """The parts of the classifier with its first `outputs` outputs, or with all (None)."""
    last = model.classifier.fc2
    copy = nn.Linear(last.in_features, len(last.bias[:outputs])).requires_grad_(False)
    copy.weight.copy_(last.weight[:outputs])
    copy.bias.copy_(last.bias[:outputs])
    return Parts(copy, lambda images: model(images)[:, :outputs])


def fit_and_score(
    baseline: Baseline,
    parts: Parts,
    fitted_on: Tensor,
    labels: Tensor,
    inputs: dict[str, Tensor],
    progress: Progress,
) -> dict[str, Tensor]:
    """Fit one detector on features [N, 512] and labels [N] and score sets of features, or of uint8 images.

    Raises:
        ValueError: scores that are no numbers; and whatever the detector raises.
    """
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

    def score(part: Tensor) -> Tensor:
        progress.advance(len(part), lambda: type(detector).__name__)
        return predict(view(part)).cpu()

    scores = {name: torch.cat([score(part) for part in batch.split(CHUNK["cpu"])]) for name, batch in inputs.items()}
    for name, of_set in scores.items():
        unscored = int((~of_set.isfinite()).sum())
        if unscored:
            raise ValueError(f"{unscored} of the {len(of_set)} images of {name} have a score that is not finite")
    return scores


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors of `dtype` within the block where none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
