"""Post-hoc detectors of pytorch-ood on the pretrained classifier: the methods of others, to compare with.

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

No torch is imported, so that `eval --help`, which lists the names, answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pytorch_ood.api import Detector
    from torch import Tensor, nn


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
