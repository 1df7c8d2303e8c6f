"""The CSI network: a CIFAR ResNet-18 with four heads, under the state-dict names of the authors' checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from csi.augmentation import ROTATIONS
from csi.options import CSIData, remedy

from models.layers import ResNet18
from training.checkpoints import fill_network, read_state

EMBEDDING = 128


class CSINet(ResNet18):
    """ResNet-18 features of images mapped to [-1, 1], read by four heads.

    `simclr_layer` alone trains the extractor: `linear` (class), `shift_cls_layer` (rotation) and
    `joint_distribution_layer` (outputs classes * r ... of rotation r) read detached features.

    Args:
        classes: IND classes.
        width: channels of the first stage: 64 in the method, less only for quick trials; features are 8 * width.
    """

    def __init__(self, classes: int = 10, width: int = 64):
        super().__init__(3, width)
        features = 8 * width
        self.linear = nn.Linear(features, classes)
        self.simclr_layer = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, EMBEDDING))
        self.shift_cls_layer = nn.Linear(features, ROTATIONS)
        self.joint_distribution_layer = nn.Linear(features, ROTATIONS * classes)
        self.frozen = False

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, 32, 32] in [0, 1] -> [B, 8 * width]."""
        return super().forward((images - 0.5) / 0.5).flatten(1)

    def forward(self, images: Tensor, *heads: str) -> Tensor | dict[str, Tensor]:
        """[B, 3, 32, 32] in [0, 1] -> the `linear` logits [B, classes], or the outputs of the heads named."""
        features = self.features(images)
        outputs = {
            head: getattr(self, head)(features if head == "simclr_layer" else features.detach())
            for head in heads or ("linear",)
        }
        return outputs if heads else outputs["linear"]

    def freeze_all_but(self, *trained: nn.Module) -> CSINet:
        """Leave only the parameters of `trained` trainable, and the whole network in eval mode for good."""
        self.requires_grad_(False)
        for module in trained:
            module.requires_grad_(True)
        self.frozen = True
        return self.train()

    def train(self, mode: bool = True) -> CSINet:
        return super().train(mode and not self.frozen)


class Bn1AndLinear(nn.Module):
    """The first public code's stage 2: `bn1`'s weight and bias are tuned along with `linear`.

    A head on pixels [B, 3 * 32 * 32]: its parameters are those two layers', the rest of the network is frozen
    inside. While `bn1` changes, no feature is constant, so every step passes through the whole network.
    """

    def __init__(self, network: CSINet):
        super().__init__()
        self.bn1, self.linear = network.bn1, network.linear
        self.inside = [network]  # in a list: not a submodule, so none of its other parameters is one of ours

    def forward(self, pixels: Tensor) -> Tensor:
        network = self.inside[0]
        return network.linear(network.features(pixels.unflatten(-1, (3, 32, 32))))


def load_csi(path: Path, classes: int, expected: dict, remedy: str) -> tuple[CSINet, dict]:
    """The network in a checkpoint, ours or the authors', whatever its width, and how it was made ({}: not ours).

    Raises:
        UserError: the file is missing or damaged, or is not such a network: every name that does not fit is named.
    """
    state = read_state(path, "a CSI network", remedy)
    conv1 = state.get("conv1.weight")
    model = CSINet(classes, len(conv1) if isinstance(conv1, torch.Tensor) and conv1.dim() else 64)
    return model, fill_network(path, state, model, "a CSI network", expected, remedy)


def load_finished(path: Path, data: CSIData, device: torch.device) -> tuple[CSINet, dict]:
    """A network whose linear layers are trained, frozen and in eval mode on `device`, and how it was made.

    Raises:
        UserError: as `load_csi`; or it was made by the first training mode only, or for another data set.
    """
    mode = "sup_CSI_linear"
    expected = {"dataset": data.name, "command": mode}
    model, origin = load_csi(path, data.experiment.num_ind, expected, remedy(data, mode))
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), origin
