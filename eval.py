"""Stage 2 and evaluation: fine-tune the classifier's head against class-mixed pseudo-OOD images, report OOD detection.

    python -m eval --mode CMG-energy
    python -m eval --task different_dataset --ood-dataset all --mode all --seeds 1 2 3 4 5
    python -m eval --task custom --ind-dir birds --ood-dir insects --ood-dir planes

reads the two checkpoints that `train` wrote, prints a table and writes everything behind it to a JSON file. The method
itself is in `cmg/`; `cmg/reference.py` is where to begin.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cli.errors import UserError, run_command
from cli.files import short_name
from cli.options import (
    Machine,
    add_machine_arguments,
    add_options,
    add_seeds_argument,
    changed_options,
    idle_options,
    option_fields,
    options_given,
    pick_all,
)
from cmg.config import JOINT, RECIPES, FineTuneConfig, Request, with_recipe
from cmg.losses import MODES
from datasets.experiments import add_data_arguments, add_experiment_arguments, experiment_from_arguments
from datasets.tasks import COMMANDS, Experiment
from evaluation.post_hoc import POST_HOC
from training.config import LEARNING_RATE

# What the default name of the results tells.
NAMED = (
    "ood_dataset",
    *option_fields(FineTuneConfig),
    *("recipe", "precision", "ood_dir", "baselines", "params_dict_name", "params_dict_name2"),
)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_experiment_arguments(parser)
    add_machine_arguments(parser)
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=[*MODES, "all"],
        help="Modes, each a loss and a score (default: all)",
    )
    parser.add_argument(
        "--ood-dataset",
        nargs="+",
        default=["all"],
        help="OOD sets of the task, or names of folders given by --ood-dir (default: all)",
    )
    parser.add_argument(
        "--params-dict-name", type=Path, help="The classifier's checkpoint (default: where train writes it)"
    )
    parser.add_argument("--params-dict-name2", type=Path, help="The CVAE's checkpoint (default: where train writes it)")
    add_seeds_argument(parser, " of stage 2")
    parser.add_argument(
        "--output", type=Path, help="JSON file of the results (default: results/TASK_PARTITION_MODES_SEEDS.json)"
    )
    parser.add_argument(
        "--save-detector", type=Path, help="Write the fine-tuned detector of one mode and seed, for scoring new images"
    )
    parser.add_argument("--save-scores", type=Path, help="Write the scores of all images, for plots, as a .npz file")
    add_baselines_argument(parser)
    method = parser.add_argument_group(
        "the method", "The defaults are the paper's, or the task's own; anything else is another experiment"
    )
    add_recipe_argument(method)
    add_options(
        method,
        FineTuneConfig,
        sometimes={
            "batch_size": "; with --tune joint the task's",
            "learning_rate": f"; with --tune joint {LEARNING_RATE}",
        },
    )
    add_data_arguments(parser)
    return parser


def add_recipe_argument(parser: argparse._ActionsContainer) -> None:
    """Options that go together."""
    parser.add_argument(
        "--recipe",
        choices=list(filter(None, RECIPES)),
        help="Options that go together, beside which others count: unattended, a fine-tuning of which the last step "
        "can be taken, in feature space (docs/recipe.md; default: none, the method)",
    )


def add_baselines_argument(parser: argparse.ArgumentParser) -> None:
    """Which post-hoc detectors stand beside CMG."""
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=list(POST_HOC),
        metavar="NAME",
        help="Post-hoc detectors of pytorch-ood on the pretrained classifier, beside MSP and energy, which are always "
        f"there: {', '.join(POST_HOC)} (without a name: all)",
    )


def main(args: argparse.Namespace) -> None:
    from cmg.evaluate import evaluate

    request = read_run(args)
    output = args.output or default_output(
        request,
        # Beside a recipe, or joint training, an option's own default may be a change.
        changed_options(args, get_parser(), NAMED, None if args.tune == JOINT or args.recipe else FineTuneConfig),
    )
    baselines = [] if args.baselines is None else list(dict.fromkeys(args.baselines)) or list(POST_HOC)
    evaluate(request, baselines, output, args.save_scores, args.save_detector)


def read_arguments(args: argparse.Namespace) -> Request:
    """Check the arguments before anything is loaded. Raises `UserError`."""
    args = with_recipe(args)
    experiment = experiment_from_arguments(args)
    modes = pick_all("--mode", args.mode, list(MODES), experiment.name)
    ood_names = pick_ood(args, experiment.name, experiment.task.ood_datasets)
    seeds = list(dict.fromkeys(args.seeds))
    check_fine_tuning(args, experiment, ood_names)
    if args.save_detector and args.tune == JOINT:
        raise UserError("--save-detector goes with --tune head or last-layer only; leave it out")
    if args.save_detector and len(modes) * len(seeds) > 1:
        raise UserError(f"--save-detector holds one detector: name one of --mode {' '.join(modes)} and one of --seeds")
    given = {"train_classifier": args.params_dict_name, "train_cvae": args.params_dict_name2}
    return Request(
        experiment,
        modes,
        ood_names,
        seeds,
        {command: given[command] or experiment.checkpoint(command) for command in COMMANDS},
        options_given(args, FineTuneConfig),
        Machine.of(args),
        args.argv,
    )


def pick_ood(args: argparse.Namespace, task_name: str, known: Sequence[str]) -> list[str]:
    """The OOD sets asked for, of those that the task has; none where it has none, and pseudo-OOD samples take their
    place. Raises `UserError`."""
    return pick_all("--ood-dataset", args.ood_dataset, known, task_name) if known or args.ood_dataset != ["all"] else []


def check_fine_tuning(args: argparse.Namespace, experiment: Experiment, ood_names: Sequence[str]) -> None:
    """Raise `UserError` where the options of stage 2 do not go with the task: features are to be explained where there
    are none, or a whole classifier is to be trained against features, or without OOD images: each run has features of
    its own then, in which nothing stands for them."""
    for name in ("least_explained", "residuals"):
        if getattr(args, name) and experiment.task.space != "features":
            given = f"--recipe {args.recipe}" if args.recipe else f"--{name.replace('_', '-')}"
            raise UserError(f"{given} goes with --space features only; leave one of them out")
    if args.tune == JOINT and experiment.task.space == "features":
        raise UserError("--tune joint trains the whole classifier on images, and the CVAE makes features; leave it out")
    if args.tune == JOINT and not ood_names:
        raise UserError(f"--tune joint: {experiment.name} has no OOD images; name a folder of them with --ood-dir DIR")


def read_run(args: argparse.Namespace) -> Request:
    """`read_arguments`, for one run: no option may be given that it would not look at."""
    request = read_arguments(args)
    for remark in idle_options(with_recipe(args), FineTuneConfig):
        raise UserError(f"--recipe {args.recipe}: {remark}" if args.recipe else f"{remark}; leave it out")
    return request


def default_output(request: Request, changed: str) -> Path:
    """results/TASK_PARTITION_MODES_seedSEEDS.json, with what was changed of the method before the dot; a long one ends
    in a hash, and the file itself tells the options."""
    modes, seeds = "+".join(request.modes), "-".join(map(str, request.seeds))
    changed = "_space-features" * (request.experiment.task.space == "features") + changed
    name = f"{request.experiment.name}_{request.experiment.partition}_{modes}_seed{seeds}{changed}"
    return Path("results") / f"{short_name(name)}.json"


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
