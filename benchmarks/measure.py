"""What every benchmark measures with: time, memory, arithmetic."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch

from utils import environment, keep_freed_memory


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, everything it started on the device included."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def plainly(work: Callable[[], object]) -> Callable[[], object]:
    """`work` of a plain implementation: with freed memory given back, as without `tune_processor`."""

    def run() -> object:
        keep_freed_memory(False)
        try:
            return work()
        finally:
            keep_freed_memory(True)

    return run


def in_turn(works: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each work over the rounds, in which all come in turn, so that all see the same machine; one
    more round before them warms up."""
    taken = [{name: seconds(work, device) for name, work in works.items()} for _ in range(rounds + 1)]
    return {name: statistics.median(times[name] for times in taken[1:]) for name in works}


def peak_mib(device: torch.device) -> int:
    """Most memory used so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage // (2**20 if sys.platform == "darwin" else 2**10)


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a large matrix product, in 10^12 operations a second: what the device can do at best."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a
    return 2 * size**3 / min(seconds(lambda: a @ a, device) for _ in range(5)) / 1e12


def print_share(
    about: str, who: str, count: int, times: dict[str, float], device: torch.device, precision: str
) -> None:
    """What `who` and the "floor" make of `count` images in the seconds of `times`, as a line and as JSON."""
    rate = {name: count / taken for name, taken in times.items()}
    share = rate[who] / rate["floor"]
    print(f"{about} on {device} in {precision}: {count:,} images, ", end="")
    print(f"{who} {rate[who]:,.1f} images/s, floor {rate['floor']:,.1f}, share {share:.2f}")
    result = {"images": count, "images_per_second": round(rate[who], 1)}
    result |= {"floor_images_per_second": round(rate["floor"], 1), "floor_share": round(share, 3)}
    print_json(result | {"peak_mib": peak_mib(device), "precision": precision} | environment(device))


def print_json(result: dict) -> None:
    """The last line of every benchmark."""
    print(json.dumps(result))
