"""The supervised contrastive loss, over the views of one process or of several."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from utils import autocast

TEMPERATURE = 0.07


def supervised_contrastive(embeddings: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Mean over views i of -mean over positives p of log( exp(s_ip / t) / sum over k != i of exp(s_ik / t) ).

    s is the cosine similarity, positives are the other views of the same label (Khosla et al., NeurIPS 2020,
    equation 2). The anchor is counted neither in the sum nor among the positives; CSI's code leaves it in the number
    that the positives are divided by, which makes each term smaller by |P| / (|P| + 1).

    With several processes the views of all are compared, each process averaging over its own as anchors: the mean of
    the processes' losses, weighted by their views, is the loss of all views, and so are its gradients.

    Args:
        embeddings: [N, D], of this process.
        labels: [N]; every label occurs at least twice.
    """
    with autocast(embeddings.device, "fp32"):
        mine = F.normalize(embeddings.float(), dim=1)
        everyone, first = gather(mine)
        everyone_labels, _ = gather(labels)
        itself = torch.arange(len(mine), device=mine.device)
        logits = (mine @ everyone.T / temperature).index_put((itself, first + itself), mine.new_tensor(-torch.inf))
        positive = (labels[:, None] == everyone_labels).index_put((itself, first + itself), labels.new_zeros(()).bool())
        log_shares = logits.log_softmax(1)
        return -(log_shares.where(positive, 0).sum(1) / positive.sum(1)).mean()


def gather(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes, one after the other, and where this process's begin. Gradients flow back to all."""
    if not dist.is_initialized():
        return rows, 0
    counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    counts = [int(count) for count in counts]
    return _Gather.apply(rows, counts), sum(counts[: dist.get_rank()])


class _Gather(torch.autograd.Function):
    """all_gather whose backward pass sums the gradients that all processes have for this one's rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[dist.get_rank()], None
