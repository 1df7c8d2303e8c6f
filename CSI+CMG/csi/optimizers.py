"""LARS, two optimizers as one, and the learning rates as pure functions of the epochs behind."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

MILESTONES = (0.6, 0.75, 0.9)


class LARS(torch.optim.Optimizer):
    """SGD with momentum, whose step for every tensor w is scaled by trust * |w| / (|g| + weight_decay * |w| + eps).

    You et al. 2017 (arXiv 1708.03888), equation 6. A tensor whose weights or gradient are all zero is not scaled.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust: float = 1e-3,
        eps: float = 1e-8,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in weights]
            velocities = [self.state[p].setdefault("velocity", torch.zeros_like(p)) for p in weights]
            w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, gradients))
            scale = group["trust"] * w / (g + group["weight_decay"] * w + group["eps"])
            scale = scale.where((w > 0) & (g > 0), 1.0)
            steps = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
            torch._foreach_mul_(steps, list(scale.unbind()))
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, steps)
            torch._foreach_add_(weights, velocities, alpha=-group["lr"])


class Together:
    """Optimizers of separate parameters that step as one; a schedule leads the first and leaves the others alone."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizers[0].param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict:
        return {"together": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        for optimizer, part in zip(self.optimizers, state["together"], strict=True):
            optimizer.load_state_dict(part)


def warmup_cosine(progress: float, peak: float, warmup: float, epochs: int) -> float:
    """From a tenth of the peak straight up to it over `warmup` epochs, then down a cosine to 0 at the last one."""
    if progress < warmup:
        return peak * (0.1 + 0.9 * progress / warmup)
    return peak * (1 + math.cos(math.pi * (progress - warmup) / (epochs - warmup))) / 2


def step_decay(progress: float, start: float, epochs: int) -> float:
    """Divided by 10 after 60, 75 and 90 % of the epochs."""
    return start / 10 ** sum(progress >= share * epochs for share in MILESTONES)
