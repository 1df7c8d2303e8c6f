"""Every option of stage 2, once: its name, its default, its help, and what the command line may give.

Each field made with `option` is an argument of `eval` and of whatever else runs stage 2. A new option is one field
here, and the line of the method that reads it. Imports no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cli.options import Machine, number, option, positive_float, positive_int
from cmg.losses import MODES
from cmg.mixing import MIXINGS, PAIRS
from cmg.scores import SCORES
from datasets.tasks import SPACES, Experiment
from training.config import LEARNING_RATE

JOINT = "joint"  # of `tune`: nothing is fine-tuned, a whole new classifier is trained
FINE_TUNING = {"tune": ("head", "last-layer")}


def modes_with(option_name: str) -> dict[str, tuple[str, ...]]:
    """What an option needs that only some modes read: one of those modes."""
    return {"mode": (*(name for name, mode in MODES.items() if option_name in mode.options), "all")}


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig:
    """What decides the result of stage 2, beside the networks and the images. The defaults are the method's.

    `num_ind` is the number of IND classes; `precision`, "fp32" or "bf16", is what networks and heads run in: losses
    and scores are always fp32.
    """

    num_ind: int
    sigma: float = option(
        help="Standard deviation of the latents of pseudo-OOD images", type=positive_float, default_of="the task's"
    )
    epochs: int = option(15, help="Passes over the IND training images", type=positive_int, default_of="the task's")
    batch_size: int = option(128, help="IND images in a step", type=positive_int)
    learning_rate: float = option(1e-4, "--lr", help="Learning rate of Adam", type=positive_float)
    half_life: float = option(
        0.0,
        help="Steps in which the learning rate falls by half; 0: it does not fall",
        type=number(float, least=0),
        needs=FINE_TUNING,
    )
    mu: float = option(
        0.1,
        help="Weight of the energy terms in the loss of CMG-energy",
        type=number(float, least=0),
        needs=modes_with("mu"),
    )
    margins: tuple[float, float] = option(
        (0.2, 0.8),
        help="Quantiles of the energies of IND and pseudo-OOD images that become m_in and m_out",
        type=number(float, least=0, below=1),
        nargs=2,
        metavar=("IN", "OUT"),
        needs=modes_with("margins"),
    )
    mixing: str = option(
        "bernoulli",
        help="How two class embeddings are mixed",
        choices=MIXINGS,
        former={"coin": "bernoulli", "weight": "mixup"},
    )
    mixing_probability: float = option(
        0.5,
        help="Probability of the first class in each dimension",
        type=number(float, least=0, most=1),
        needs={"mixing": tuple(name for name, mixing in MIXINGS.items() if mixing.uses_probability)},
    )
    pairs: str = option(
        "independent",
        help="How the two classes of a pseudo-OOD image are drawn: independently, so that they may be the same, or "
        "distinct",
        choices=PAIRS,
        needs={"mixing": tuple(name for name, mixing in MIXINGS.items() if mixing.uses_second)},
    )
    max_confidence: float = option(
        1.0,
        help="Leave out pseudo-OOD images that the classifier before fine-tuning gives one IND class with more than "
        "this probability: they look like that class",
        type=number(float, above=0, most=1),
        needs=FINE_TUNING,
    )
    residuals: float = option(
        0.0,
        help="To each pseudo-OOD feature add this times what the CVAE of features leaves unexplained of a random IND "
        "training image",
        type=number(float, least=0),
        needs={"tune": ("head",)},
    )
    pseudo_batch_size: int | None = option(
        None,
        help="Pseudo-OOD images in a step",
        type=positive_int,
        default_of="as many as --batch-size",
        needs=FINE_TUNING,
    )
    pseudo_pool: int = option(
        0,
        help="Draw from this many pseudo-OOD images made once, instead of new ones in every step; 0: new ones",
        type=number(int, least=0),
        default_of="the task's",
        needs=FINE_TUNING,
    )
    loss_energy: str = option(
        "all",
        help="Logits whose energy the loss and the margins of CMG-energy see: all, or the IND classes' only",
        choices=("all", "ind"),
        needs=modes_with("loss_energy"),
    )
    score: str | None = option(
        None, help="OOD score of the fine-tuned head", choices=SCORES, default_of="the mode's own"
    )
    tune: str = option(
        "head",
        help="What is trained: the head, its last layer only, or a whole new classifier (joint)",
        choices=("head", "last-layer", JOINT),
    )
    anchor: float = option(
        0.0,
        help="Weight of the head's squared distance from its start, added to the loss",
        type=number(float, least=0),
        needs=FINE_TUNING,
    )
    interpolation: float = option(
        1.0,
        help="Share of the fine-tuned head's weights in the head that is scored and saved; the rest is the pretrained "
        "head's",
        type=number(float, least=0, most=1),
        needs=FINE_TUNING,
    )
    least_explained: float = option(
        0.0,
        help="Share of the variance of the IND training features that a CVAE of features must explain; below it the "
        "head stays as it is",
        type=number(float, least=0, most=1),
        needs={"tune": ("head",)},
    )
    eval_every: int = option(
        100,
        "--eval-every",
        "--check-every",
        help="Steps between two evaluations; the first is before the first step, one more after the last",
        type=positive_int,
        default_of="the task's",
        needs=FINE_TUNING,
    )
    precision: str = "fp32"

    def score_of(self, mode: str) -> str:
        """The key of `SCORES` with which a head of `mode` is scored."""
        return self.score or MODES[mode].score


# Options of `eval` under one name, docs/recipe.md; none is the method. It is frozen: its figures are reported.
RECIPES: dict[str | None, dict[str, object]] = {
    None: {"space": SPACES[0], "mode": ["all"]},
    "unattended": {
        "space": "features",
        "mode": ["CMG-energy"],
        "pairs": "distinct",
        "residuals": 6.0,
        "max_confidence": 0.9,
        "learning_rate": 1e-3,
        "half_life": 400.0,
        "interpolation": 0.75,
        "least_explained": 0.75,
    },
}


def with_recipe(args: argparse.Namespace, only: Collection[str] | None = None) -> argparse.Namespace:
    """The arguments with what their recipe says, or `only` some of it, in the place of what was not given."""
    options = {name: value for name, value in RECIPES[args.recipe].items() if only is None or name in only}
    return argparse.Namespace(
        **vars(args) | {name: value for name, value in options.items() if getattr(args, name) is None}
    )


def config_for(experiment: Experiment, precision: str, **given: object) -> FineTuneConfig:
    """The configuration of stage 2 for a task: the method's, what differs for the task, and what is `given`.

    Joint training has the classifier's own schedule.
    """
    task = experiment.task
    own = dict(task.fine_tuning)
    if given.get("tune") == JOINT:
        own |= {"epochs": task.epochs["train_classifier"], "batch_size": task.batch_size}
        own |= {"learning_rate": LEARNING_RATE, "pseudo_pool": 0}
    return FineTuneConfig(num_ind=experiment.num_ind, precision=precision, **own | given)


@dataclass(frozen=True)
class Request:
    """What a command line of `eval` asks for, checked.

    Attributes:
        paths: of the checkpoints, by training command.
        options: fields of `FineTuneConfig` that were given.
        argv: the command line, for the record.
    """

    experiment: Experiment
    modes: list[str]
    ood_names: list[str]
    seeds: list[int]
    paths: dict[str, Path]
    options: dict[str, object]
    machine: Machine
    argv: list[str]
