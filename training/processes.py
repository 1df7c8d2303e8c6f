"""The processes of one training run: one by itself, or several under torchrun."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Before there is a group: functions in there take it as a default argument. They would keep it, and gloo's threads,
# from ending before the interpreter does, which may then abort.
import torch.distributed.nn  # noqa: F401
from torch import nn

from cli.errors import UserError, handling
from utils import start_computing


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is, and its device."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over the processes; batch norm synchronised on CUDA."""
        if self.world == 1:
            return model
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        with waiting_for_others():
            return nn.parallel.DistributedDataParallel(model, device_ids=[self.device.index] if on_gpu else None)

    def share(self, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        """This process's rows of a global batch, and the weight that makes the average over processes of the
        local mean losses equal the mean over the global batch."""
        if self.world == 1:
            return batch, 1.0
        mine = batch[self.rank :: self.world]
        if not len(mine):  # every process must take part in every step
            return batch[:1], 0.0
        return mine, len(mine) * self.world / len(batch)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over the processes."""
        if self.world == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.world

    def any(self, flag: bool) -> bool:
        """Whether any process raises the flag."""
        return flag if self.world == 1 else bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined_processes(device_name: str | None) -> Iterator[Processes]:
    """Within the block, be one of the group that torchrun started, or alone.

    Raises:
        UserError: the device is not there, there are more processes than GPUs, or another process of the group ended.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        yield _join(device_name, world)
    except RuntimeError as error:
        if world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise UserError(f"another of the {world} processes failed; see its own message") from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(device_name: str | None, world: int) -> Processes:
    """Each process takes the GPU of its local rank, or the CPU."""
    device = start_computing(device_name)
    if world == 1:
        return Processes(device)
    if device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started more processes than this machine has GPUs ({torch.cuda.device_count()}): "
                "lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    with waiting_for_others():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(device, dist.get_rank(), world)


def waiting_for_others():
    """Within the block a stop signal ends the process at once: torch waits where no handler of Python's is called."""
    return handling(signal.SIG_DFL)
