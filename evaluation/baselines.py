"""Post-hoc detectors of pytorch-ood on the untouched classifier: the methods of others, to compare with.

No network is trained: a detector is fitted on the classifier's features of all IND training images, with the
hyper-parameters that the library has by default, or where it has none its authors' (ViM, DICE). Nothing is tuned on OOD
images.

* Features are the 512 that the last layer sees, relu(fc1(extractor(x))).
* Outputs are those of the IND classes: what each of the papers supposes. The OOD slot and the spare outputs stand for
  no class, and would count as classes wherever a method averages over them (ODIN at its temperature, GEN, GradNorm,
  fDBD). MSP and energy alone see all outputs, as the rows of them that are always shown.
* Logits are scored in fp64, in which confident images keep their order. Mahalanobis and RMD invert the covariance of
  features of which some are never active: in fp32 the rounding errors outgrow RMD's difference of two distances.

TemperatureScaling and KLMatching were meant to be fitted on IND validation images; here they see the training images
like all others, on which a classifier is surer of itself.

Left out of what the library has: Mahalanobis with input gradients (its step is tuned on OOD images); MultiMahalanobis,
Gram and NAC-UE (several layers) and RankFeat (maps with a spatial extent), which want more than the last features; MCD
(repeated passes with dropout, which one of the extractors lacks); MCM and WeightedEBO (need text or weights learned for
them); GradUncertainty (there without the classifier on OOD images that its paper trains); OpenMax (there an image's
score depends on which classes are predicted for the others of its batch).

Torch is imported inside the functions, so that `eval --help`, which lists the names, answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from utils import Progress, memory_shortage

if TYPE_CHECKING:
    import torch
    from pytorch_ood.api import Detector
    from torch import Tensor, nn

    from datasets.datasetsHelper import Images
    from models.main_model import MainModel


class Parts(NamedTuple):
    """What a detector may need of the classifier, with the outputs that it is to see.

    Attributes:
        last: the last layer, features [B, 512] -> [B, outputs], on the CPU.
        logits: the whole, images [B, C, S, S] in [0, 1] -> [B, outputs], on the images' device.
    """

    last: nn.Linear
    logits: Callable[[Tensor], Tensor]

    def of_maps(self, maps: Tensor) -> Tensor:
        """The last layer of features as maps, [B, 512, 1, 1] -> [B, outputs]."""
        return self.last(maps.flatten(1))


@dataclass(frozen=True)
class Baseline:
    """A detector of pytorch-ood and how to use it.

    Attributes:
        reads: what it is fitted on and scores: "logits", "features", "feature_maps" or "images".
        make: (pytorch_ood.detector, parts of the classifier) -> detector.
        all_outputs: it sees the OOD slot and the spare outputs too.
        double: it needs fp64.
    """

    reads: str
    make: Callable[[ModuleType, Parts], Detector]
    all_outputs: bool = False
    double: bool = False


POST_HOC: dict[str, Baseline] = {
    # of the logits
    "MSP": Baseline("logits", lambda ood, net: ood.MaxSoftmax(None), all_outputs=True),
    "MaxLogit": Baseline("logits", lambda ood, net: ood.MaxLogit(None)),
    "energy": Baseline("logits", lambda ood, net: ood.EnergyBased(None), all_outputs=True),
    "entropy": Baseline("logits", lambda ood, net: ood.Entropy(None)),
    "GEN": Baseline("logits", lambda ood, net: ood.GEN(None, gamma=0.1)),
    "TemperatureScaling": Baseline("logits", lambda ood, net: ood.TemperatureScaling(None)),
    "KLMatching": Baseline("logits", lambda ood, net: ood.KLMatching(None)),
    # distances between features
    "Mahalanobis": Baseline("features", lambda ood, net: ood.Mahalanobis(None), double=True),
    "RMD": Baseline("features", lambda ood, net: ood.RMD(None), double=True),
    "GMM": Baseline("features", lambda ood, net: ood.GMM(None, reg=1e-6)),
    "KNN": Baseline("features", lambda ood, net: ood.KNN(None, k=50)),
    # features and the last layer
    "NNGuide": Baseline("features", lambda ood, net: ood.NNGuide(None, net.last, k=10)),
    "ViM": Baseline(
        "features", lambda ood, net: ood.ViM(None, net.last.in_features // 2, net.last.weight, net.last.bias)
    ),
    "NCI": Baseline("features", lambda ood, net: ood.NCI(None, net.last, alpha=0.0)),
    "fDBD": Baseline("features", lambda ood, net: ood.fDBD(None, net.last)),
    "SHE": Baseline("features", lambda ood, net: ood.SHE(None, net.last)),
    "pNML": Baseline("features", lambda ood, net: ood.PNML(None, net.last)),
    "GradNorm": Baseline("features", lambda ood, net: ood.GradNorm(net.last, lambda name: name == "weight")),
    # the energy of the logits, once features or weights are shaped
    "ReAct": Baseline("feature_maps", lambda ood, net: ood.ReAct(None, net.of_maps, percentile=0.9)),
    "VRA": Baseline("feature_maps", lambda ood, net: ood.VRA(None, net.of_maps, 0.01, 0.99)),
    "ASH": Baseline("feature_maps", lambda ood, net: ood.ASH(None, net.of_maps, "ash-s", percentile=0.65)),
    "SCALE": Baseline("feature_maps", lambda ood, net: ood.SCALE(None, net.of_maps, percentile=0.65)),
    "LTS": Baseline("features", lambda ood, net: ood.LTS(None, net.last, p=0.05)),
    "DICE": Baseline("features", lambda ood, net: ood.DICE(None, net.last.weight, net.last.bias, p=0.9)),
    # through the whole network, forth, back and forth again; in fp32, since bf16 would round its small step away
    "ODIN": Baseline("images", lambda ood, net: ood.ODIN(net.logits, eps=0.0014, temperature=1000.0)),
}


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
    import torch

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
    from datasets.datasetsHelper import to_float
    from models.inference import in_chunks

    extracted = in_chunks(lambda part: model.features(to_float(part)), images, precision)
    return in_chunks(model.classifier.hidden, extracted, "fp32").cpu()


def parts_of(model: MainModel, outputs: int | None) -> Parts:
    """The parts of the classifier with its first `outputs` outputs, or with all (None)."""
    from torch import nn

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
    import pytorch_ood.detector
    import torch

    from datasets.datasetsHelper import to_float
    from models.inference import CHUNK

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
            raise ValueError(f"no number as the score of {unscored} of the {len(of_set)} images of {name}")
    return scores


@contextmanager
def default_dtype(dtype: torch.dtype):
    """Make tensors of `dtype` within the block where none is named."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
