"""The trainings of stage 1 as a table: what `python -m train --command …` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from datasets.tasks import Task
from training.compact_cvae import compact, expand
from training.loop import Objective
from training.train_classifier import ClassifierObjective, build_classifier, evaluate_classifier
from training.train_cvae import CVAEObjective, build_cvae, collapse_remark, evaluate_cvae
from training.train_feature_cvae import build_feature_cvae, evaluate_feature_cvae, little_explained


@dataclass(frozen=True)
class Stage:
    """One training command.

    Attributes:
        build: the untrained network of a task.
        objective: what a task's training minimises.
        evaluate: (model, test images, number of IND classes, precision) -> metrics.
        remark: metrics -> a line that the user should know about them, or nothing.
        compact, expand: bring the network into the form in which it is trained, and back, both in place.
    """

    build: Callable[[Task], nn.Module]
    objective: Callable[[Task], Objective]
    evaluate: Callable[..., dict[str, float]]
    remark: Callable[[dict[str, float]], str] = lambda metrics: ""
    compact: Callable[[nn.Module], None] = lambda model: None
    expand: Callable[[nn.Module], None] = lambda model: None


def cvae_objective(task: Task) -> CVAEObjective:
    return CVAEObjective(task.kl_weight)


STAGES = {
    "train_classifier": Stage(build_classifier, lambda task: ClassifierObjective(task.augment), evaluate_classifier),
    "train_cvae": Stage(build_cvae, cvae_objective, evaluate_cvae, collapse_remark, compact, expand),
    # What `train_cvae` is in feature space.
    "train_feature_cvae": Stage(build_feature_cvae, cvae_objective, evaluate_feature_cvae, little_explained),
}


def stage_of(task: Task, command: str) -> Stage:
    """What a training command, a key of `COMMANDS`, trains for a task."""
    in_features = command == "train_cvae" and task.space == "features"
    return STAGES["train_feature_cvae" if in_features else command]
