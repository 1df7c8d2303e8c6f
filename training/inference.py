"""Running a network in eval mode over many images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from utils import autocast

CHUNK = 2048  # images: enough to keep any device busy, little enough for its memory


@torch.no_grad()
def in_chunks(function: Callable[..., Tensor], inputs: Tensor, precision: str, chunk: int = CHUNK) -> Tensor:
    """`function` of consecutive chunks of `inputs` under autocast, as one fp32 tensor."""
    with autocast(inputs.device, precision):
        return torch.cat([function(part).float() for part in inputs.split(chunk)])
