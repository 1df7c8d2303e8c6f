"""A step of training as one CUDA graph: a small network's hundreds of launches would keep a GPU waiting for Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# That run as they are: what a step keeps, such as an optimizer's moments, is allocated when it runs first.
FIRST_STEPS = 3


class Graphed:
    """A step, a function of tensors on one GPU, recorded once for every set of their shapes and replayed from then on.

    The step must not wait for the device, and its optimizer be `capturable`. What it returns is overwritten by the next
    call.
    """

    def __init__(self, step: Callable[..., Tensor]):
        self.step = step
        self.runs: dict[tuple[torch.Size, ...], int] = {}
        self.recorded: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self.recorded:
            self.runs[shapes] = self.runs.get(shapes, 0) + 1
            if self.runs[shapes] <= FIRST_STEPS:
                return self.run(*inputs)
            self.recorded[shapes] = self.record(*inputs)
        graph, own, output = self.recorded[shapes]
        for tensor, given in zip(own, inputs, strict=True):
            tensor.copy_(given)
        graph.replay()
        return output

    def run(self, *inputs: Tensor) -> Tensor:
        """The step as it is, on a stream beside the current one, as it has to be before it is recorded."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            output = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(beside)
        return output

    def record(self, *inputs: Tensor) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        """The step as a graph, without running it, with the tensors that it reads and the one that it returns."""
        graph, own = torch.cuda.CUDAGraph(), tuple(tensor.clone() for tensor in inputs)
        with torch.cuda.graph(graph):
            output = self.step(*own)
        return graph, own, output
