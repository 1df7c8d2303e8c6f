"""Running a network in eval mode over many images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from cli.progress import Progress
from utils import autocast

# Images at once: what keeps a GPU busy; what a processor holds in its caches (2,048 are 1.6 times slower there). Of
# large images so many pixels, for which the memory is there.
CHUNK = {"cuda": 2048, "cpu": 128}
CHUNK_PIXELS = {"cuda": 2**23, "cpu": 2**18}


def chunk_size(device: torch.device, pixels: int = 1) -> int:
    """How many images of so many pixels each go through a network at once."""
    return max(1, min(CHUNK[device.type], CHUNK_PIXELS[device.type] // pixels))


def for_inference(network: nn.Module) -> nn.Module:
    """A copy of a network, in eval mode, that computes the same in less time, up to rounding.

    Batch normalisation becomes part of the convolution before it, if that is no transposed one. And the weights ask for
    gradients, though none are computed: only then does autocast keep its bf16 copies of them, instead of making new
    ones for every chunk.
    """
    network = copy.deepcopy(network).eval()
    for name, part in network.named_children():
        if any(isinstance(layer, nn.BatchNorm2d) for layer in part.modules()):
            setattr(network, name, fuse(part))
    return network.requires_grad_(True)


@torch.no_grad()
def in_chunks(
    function: Callable[..., Tensor],
    inputs: Tensor,
    precision: str,
    progress: Progress | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """`function` of consecutive chunks of `inputs` under autocast, as one fp32 tensor; on `device`, to which the chunks
    are brought, or where `inputs` is."""
    outputs, device = [], device or inputs.device
    with autocast(device, precision):
        for part in inputs.split(chunk_size(device, math.prod(inputs.shape[2:]))):
            outputs.append(function(part.to(device)).float())
            if progress:
                progress.advance(len(part))
    return torch.cat(outputs)
