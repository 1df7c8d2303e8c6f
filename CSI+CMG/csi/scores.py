"""CSI's two ways of looking at an image, single view and rotation ensemble, and its OOD score."""

from __future__ import annotations

import torch
from torch import Tensor

from csi.augmentation import ROTATIONS
from csi.network import CSINet

from datasets.datasetsHelper import to_float
from models.inference import in_chunks


def marginalise(joint: Tensor) -> Tensor:
    """Mean over rotations r of the joint logits C*r ... C*r + C-1 of the image rotated by r (Tack et al., section 2.4).

    Args:
        joint: [4, N, 4 * C], row r from the images rotated by r.

    Returns:
        [N, C].
    """
    by_rotation = joint.unflatten(2, (ROTATIONS, -1))  # image's rotation, N, output's rotation, C
    return by_rotation.diagonal(dim1=0, dim2=2).mean(-1)


def single_view(model: CSINet, images: Tensor, precision: str) -> Tensor:
    """`linear` logits [N, C] of uint8 images [N, 3, 32, 32]."""
    return in_chunks(lambda part: model(to_float(part)), images, precision)


def rotation_ensemble(model: CSINet, images: Tensor, precision: str) -> Tensor:
    """Marginalised joint logits [N, C] of uint8 images [N, 3, 32, 32]."""

    def joint(part: Tensor) -> Tensor:
        return model(to_float(part), "joint_distribution_layer")["joint_distribution_layer"]

    rotated = (in_chunks(joint, images.rot90(r, (2, 3)), precision) for r in range(ROTATIONS))
    return marginalise(torch.stack(list(rotated)))


VIEWS = {"single view": single_view, "rotation ensemble": rotation_ensemble}
