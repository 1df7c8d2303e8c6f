"""Stage 2 and evaluation: fine-tune the classifier's head against class-mixed pseudo-OOD images, report OOD detection.

    python -m eval --mode CMG-energy
    python -m eval --task different_dataset --ood-dataset all --mode all --seeds 1 2 3 4 5
    python -m eval --task custom --ind-dir birds --ood-dir insects --ood-dir planes

reads the two checkpoints that `train` wrote, prints a table and writes everything behind it to a JSON file.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets.tasks import (
    COMMANDS,
    Task,
    add_data_arguments,
    all_partitions,
    default_checkpoint,
    task_from_arguments,
    task_names,
)
from evaluation.baselines import POST_HOC
from training.options import LEARNING_RATE
from training.runs import refuse_idle_options
from utils import (
    UserError,
    add_common_arguments,
    changed_options,
    check_outputs,
    number,
    pick_all,
    positive_float,
    positive_int,
    run_command,
    seed_number,
    short_name,
)

MODE_NAMES = ("CMG-energy", "CMG-softmax")
TUNED = ("head", "last-layer", "joint")
MIXINGS = ("coin", "weight", "none")
METHOD = (
    "ood_dataset",
    "epochs",
    "batch_size",
    "lr",
    "sigma",
    "mixing",
    "mixing_probability",
    "pseudo_batch_size",
    "loss_energy",
    "score_energy",
    "check_every",
    "margins",
    "tune",
    "anchor",
    "pseudo_pool",
    "precision",
)
# What the default name of the results tells.
NAMED = (*METHOD, "ood_dir", "baselines", "params_dict_name", "params_dict_name2")
NOT_JOINT = dict.fromkeys(
    ("pseudo_batch_size", "check_every", "anchor", "pseudo_pool", "save_detector"), ("tune", ("head", "last-layer"))
)
# Not asked of the variants of benchmarks.ablations, which are the same for every mode and mixing.
NEEDS = {"mixing_probability": ("mixing", ("coin",))} | dict.fromkeys(
    ("margins", "loss_energy", "score_energy"), ("mode", ("CMG-energy", "all"))
)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, task_names(), all_partitions())
    parser.add_argument(
        "--mode",
        nargs="+",
        choices=[*MODE_NAMES, "all"],
        default=["all"],
        help="loss and score, one or several (default: all)",
    )
    parser.add_argument(
        "--ood-dataset",
        nargs="+",
        default=["all"],
        help="OOD sets of the task, or names of folders given by --ood-dir (default: all)",
    )
    parser.add_argument(
        "--params-dict-name", type=Path, help="the classifier's checkpoint (default: where train writes it)"
    )
    parser.add_argument("--params-dict-name2", type=Path, help="the CVAE's checkpoint (default: where train writes it)")
    parser.add_argument(
        "--seeds", "--seed", nargs="+", type=seed_number, default=[123], help="of stage 2 (default: 123)"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file of the results (default: results/TASK_PARTITION_MODES_SEEDS.json)"
    )
    parser.add_argument(
        "--save-detector", type=Path, help="write the fine-tuned detector of one mode and seed, for scoring new images"
    )
    parser.add_argument("--save-scores", type=Path, help="write the scores of all images, for plots, as a .npz file")
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=list(POST_HOC),
        metavar="NAME",
        help="post-hoc detectors of pytorch-ood on the untouched classifier, beside MSP and energy, which are always "
        f"there: {', '.join(POST_HOC)} (without a name: all)",
    )
    method = parser.add_argument_group(
        "the method", "the defaults are the paper's; anything else is another experiment"
    )
    method.add_argument("--epochs", type=positive_int, help="passes over the IND training images (default: the task's)")
    method.add_argument("--batch-size", type=positive_int, help="(default: 128; of --tune joint the task's)")
    method.add_argument("--lr", type=positive_float, help="learning rate of Adam (default: 1e-4; of --tune joint 1e-3)")
    method.add_argument(
        "--sigma",
        type=positive_float,
        help="standard deviation of the latent of pseudo-OOD images (default: the task's)",
    )
    method.add_argument(
        "--mixing",
        choices=MIXINGS,
        default="coin",
        help="of two class embeddings: a coin for each dimension, one weight for each image, none "
        "(default: %(default)s)",
    )
    method.add_argument(
        "--mixing-probability",
        type=number(float, least=0, most=1),
        default=0.5,
        help="of the first class, where a coin decides (default: %(default)s)",
    )
    method.add_argument(
        "--pseudo-batch-size", type=positive_int, help="pseudo-OOD images that meet a batch (default: --batch-size)"
    )
    method.add_argument(
        "--loss-energy",
        choices=("all", "ind"),
        default="all",
        help="logits of the energies in the loss and margins of CMG-energy: all, or the IND classes' "
        "(default: %(default)s)",
    )
    method.add_argument(
        "--score-energy", choices=("ind", "all"), default="ind", help="the same of its score (default: %(default)s)"
    )
    method.add_argument("--check-every", type=positive_int, help="steps between evaluations (default: the task's)")
    quantile = number(float, least=0, below=1)
    method.add_argument(
        "--margins",
        nargs=2,
        type=quantile,
        default=[0.2, 0.8],
        metavar=("IN", "OUT"),
        help="quantiles of IND and pseudo-OOD energies (default: 0.2 0.8)",
    )
    method.add_argument(
        "--tune",
        choices=TUNED,
        default="head",
        help="which part is fine-tuned; joint: nothing is, the whole classifier is trained anew against pseudo-OOD "
        "images (default: %(default)s)",
    )
    method.add_argument(
        "--anchor",
        type=number(float, least=0),
        default=0.0,
        help="weight of the head's squared distance from its start (default: %(default)s)",
    )
    method.add_argument(
        "--pseudo-pool",
        type=number(int, least=0),
        default=0,
        help="draw from so many pseudo-OOD images made once (default: 0, always fresh)",
    )
    add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    from evaluation.report import format_ind_table, format_table
    from evaluation.results import left_out
    from training.scored import save_scores
    from training.stage2 import make_detector, run_stage2
    from utils import write_json

    setup = read_run(args)
    changed = changed_options(args, get_parser(), NAMED)
    output = args.output or default_output(setup.task_name, setup.partition, setup.modes, setup.seeds, changed)
    check_outputs(output, args.save_scores, args.save_detector, inputs=setup.paths.values())
    config = make_config(args, setup)
    inputs = load(args, setup)
    print(f"{setup.task_name} {setup.partition} on {setup.device} in {config.precision}: {inputs.summary}", flush=True)

    baselines = [] if args.baselines is None else list(dict.fromkeys(args.baselines)) or list(POST_HOC)
    results = run_stage2(
        inputs, config, setup.modes, setup.seeds, args.tune, score_pseudo=bool(args.save_scores), baselines=baselines
    )
    about = describe("eval", args, setup, inputs) | {"config": asdict(config) | {"tune": args.tune}}
    write_json(output, about | {key: results[key] for key in ("detection", "ind", "runs", "left_out")})
    written = [str(output)]
    if args.save_scores:
        save_scores(args.save_scores, results["scores"])
        written.append(str(args.save_scores))
    if args.save_detector:
        detector = make_detector(inputs, results["tuned"][0], args.tune, config)
        detector.save(args.save_detector, about)
        written.append(f"{args.save_detector}: {detector.config.rule()}")
    print(f"\n{format_table(results['detection'], left_out([results]))}\n\n{format_ind_table(results['ind'])}\n")
    print("\n".join(f"wrote {one}" for one in written))


@dataclass(frozen=True)
class Setup:
    """What the arguments ask for, checked; `paths` of the checkpoints are by training command."""

    task_name: str
    task: Task
    partition: str
    modes: list[str]
    ood_names: list[str]
    seeds: list[int]
    paths: dict[str, Path]
    device: object


def read_arguments(args: argparse.Namespace) -> Setup:
    """Check the arguments before anything is loaded. Raises `UserError`."""
    from utils import pick_device

    task_name, task, partition = task_from_arguments(args)
    modes = pick_all("--mode", args.mode, MODE_NAMES, task_name)
    ood_names = pick_all("--ood-dataset", args.ood_dataset, task.ood_datasets, task_name)
    seeds = list(dict.fromkeys(args.seeds))
    refuse_idle_options(args, get_parser(), NOT_JOINT)
    if args.save_detector and len(modes) * len(seeds) > 1:
        raise UserError(f"--save-detector holds one detector: name one of --mode {' '.join(modes)} and one of --seeds")
    given = {"train_classifier": args.params_dict_name, "train_cvae": args.params_dict_name2}
    paths = {command: given[command] or default_checkpoint(task_name, partition, command) for command in COMMANDS}
    return Setup(task_name, task, partition, modes, ood_names, seeds, paths, pick_device(args.device))


def read_run(args: argparse.Namespace) -> Setup:
    """`read_arguments`, for one run: no option may be given that it would not look at."""
    setup = read_arguments(args)
    refuse_idle_options(args, get_parser(), NEEDS)
    return setup


def make_config(args: argparse.Namespace, setup: Setup):
    """The `FineTuneConfig` of the arguments; joint training has the classifier's defaults."""
    from models.vae import Mixing
    from training.fine_tune import FineTuneConfig
    from utils import pick_precision

    task, joint = setup.task, args.tune == "joint"
    own = {"batch_size": task.batch_size, "learning_rate": LEARNING_RATE} if joint else {}
    given = {"batch_size": args.batch_size, "learning_rate": args.lr}
    return FineTuneConfig(
        num_ind=len(task.partitions[setup.partition]),
        epochs=args.epochs or (task.epochs["train_classifier"] if joint else task.fine_tune_epochs),
        check_every=args.check_every or task.check_every,
        sigma=args.sigma or task.sigma,
        mixing=Mixing(args.mixing, args.mixing_probability),
        pseudo_batch_size=args.pseudo_batch_size,
        loss_energy=args.loss_energy,
        score_energy=args.score_energy,
        ind_quantile=args.margins[0],
        pseudo_quantile=args.margins[1],
        anchor=args.anchor,
        pseudo_pool=args.pseudo_pool,
        precision=pick_precision(args.precision, setup.device),
        **own | {name: value for name, value in given.items() if value is not None},
    )


def load(args: argparse.Namespace, setup: Setup):
    """The networks and images of stage 2. Raises `UserError`."""
    from training.stage2 import load_inputs

    return load_inputs(
        setup.task_name, setup.task, setup.partition, setup.paths, setup.ood_names, args.data_dir, setup.device
    )


def describe(module: str, args: argparse.Namespace, setup: Setup, inputs) -> dict:
    """What a file of results says of how it was made, beside the configuration of stage 2."""
    from utils import environment

    return {
        "command": shlex.join(["python", "-m", module, *args.argv]),
        "task": setup.task_name,
        "partition": setup.partition,
        "positive_class": "OOD",
        "seeds": setup.seeds,
        "images": inputs.data.counts(),
        "checkpoints": {
            command: {"file": str(path), "origin": inputs.origins[command]} for command, path in setup.paths.items()
        },
        "environment": environment(setup.device),
    }


def default_output(task_name: str, partition: str, modes: list[str], seeds: list[int], changed: str) -> Path:
    """results/TASK_PARTITION_MODES_seedSEEDS.json, with what was changed of the method before the dot; a long one
    ends in a hash, and the file itself tells the options."""
    name = f"{task_name}_{partition}_{'+'.join(modes)}_seed{'-'.join(map(str, seeds))}{changed}"
    return Path("results") / f"{short_name(name)}.json"


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
