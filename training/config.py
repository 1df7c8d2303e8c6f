"""Every option of stage 1, once: its name, its default, its help, and what the command line may give.

Imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from cli.options import DEFAULT_SEED, number, option, positive_float, positive_int, seed_number

LEARNING_RATE = 1e-3  # of Adam in stage 1


def resume_path(path: Path) -> Path:
    """Where the resumable state of a run is that will write `path`."""
    return path.parent / f"{path.name}.resume"


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What decides the result of a training run, beside the data and the network; recorded in its checkpoint.

    The last partial batch is kept. The seed is of initialisation, order, augmentation, noise and dropout, each a stream
    of its own. `precision` is "fp32" or "bf16", under which the networks run; losses are always fp32.
    """

    epochs: int = option(help="Passes over the training images", type=positive_int, default_of="the task's")
    batch_size: int = option(
        MISSING,
        "--batch-size",
        "--batch_size",
        help="Images per step, over all processes",
        type=positive_int,
        default_of="the task's",
    )
    learning_rate: float = option(LEARNING_RATE, "--lr", help="Learning rate of the optimizer", type=positive_float)
    seed: int = option(DEFAULT_SEED, help="Random seed", type=seed_number)
    precision: str
    warmup_steps: int = option(
        0, "--warmup", help="Steps over which the learning rate rises linearly", type=number(int, least=0)
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What decides a network beside the loop."""

    kl_weight: float | None = option(
        None,
        help="Weight of the KL term in the CVAE's loss",
        type=number(float, least=0),
        default_of="the task's",
        needs={"command": ("train_cvae",)},
    )
    classifier: Path | None = option(
        None,
        help="Checkpoint of the classifier on whose features the CVAE is trained",
        type=Path,
        default_of="where train writes it",
        needs={"space": ("features",)},
    )
    val_fraction: float = option(
        0.0,
        help="Share of the IND training images kept out, on which eval can choose its step",
        type=number(float, least=0, below=1),
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What does not change the result: what is kept, shown and compiled."""

    save_every: int | None = option(
        None,
        help="Epochs between resumable states",
        type=positive_int,
        default_of="1, or more where writing one takes longer than a twentieth of them",
    )
    restart: bool = option(False, help="Start over, ignoring what an earlier run left", action="store_true")
    compile: bool = option(False, help="Compile the network with torch.compile", action="store_true")
    log: Path | None = option(None, help="File to write one JSON line per epoch to", type=Path, default_of="none")
    tensorboard: Path | None = option(
        None, help="Folder to write the same metrics to for TensorBoard", type=Path, default_of="none"
    )
