"""The result tables of a task: train what is missing for each partition and training seed, run stage 2, report.

    python -m reproduce --task same_dataset_digits --seeds 3 --baselines
    python -m reproduce --task different_dataset --seeds 5 --baselines --launcher slurm --slurm slurm_partition=gpu

writes results/TASK/table.md, .csv, .json, report.html and figures/. Interrupted in any way, the same command goes on:
what is done is never repeated, and a job that fails is reported with its log and does not stop the others.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, replace
from pathlib import Path

import eval
import train
from cli.errors import UserError, run_command
from cli.files import check_writable, short_name
from cli.options import (
    add_machine_arguments,
    check_options,
    flag,
    number,
    option_fields,
    parse_options,
    pick_all,
    positive_int,
)
from cli.progress import counted
from cmg.config import with_recipe
from cmg.losses import MODES
from datasets.experiments import (
    add_data_arguments,
    add_networks_argument,
    add_space_argument,
    experiment_from_arguments,
    task_names,
)
from datasets.tasks import CUSTOM
from reproduction import ablations
from reproduction.jobs import Job, Step, last_line
from training.config import LoopConfig, TrainingOptions

MOST_SEEDS = 10_000  # more than anyone wants, and few enough to be listed
ABLATION_SEEDS = ("1", "2", "3")
DRAWN, ABLATED = "samples.png", "ablations.json"  # files of the first job
DETECTOR = "detector.pt"  # the best one for the user's own images
SHARED = (
    *(
        "task",
        "networks",
        "space",
        "recipe",
        "ind_dir",
        "ood_dir",
        "image_size",
        "grey",
        "backbone",
        "backbone_weights",
    ),
    *("ood_dataset", "baselines", "device", "data_dir"),
)
FILES = ("output", "save_scores", "params_dict_name", "params_dict_name2", "classifier")
REFUSED = {  # options of the steps that are not for the user to hand on -> what to do instead
    **{name: f"give {flag(name)} to reproduce itself" for name in SHARED},
    **dict.fromkeys(("seed", "seeds"), "give --seeds and --tuning-seeds, their numbers, to reproduce itself"),
    **dict.fromkeys(FILES, "give --output, the folder of all files, to reproduce itself"),
    "partition": "give --partitions to reproduce itself",
    "mode": "give --modes to reproduce itself",
    "command": "--classifier-args and --cvae-args are for one network each",
    "save_detector": "every job would write the same file; run eval on the networks of one",
    **dict.fromkeys(("log", "tensorboard"), "every job has logs of its own, NETWORK.jsonl in its folder"),
}
TRAINING = option_fields(LoopConfig) | option_fields(TrainingOptions)
DECIDES = [name for name in TRAINING if name not in ("seed", "kl_weight")]  # what train makes, beside task and seed
CHECKED = {  # step -> its command, and what that checks before the work beside what the parser does
    "eval": (eval, eval.read_run),
    "ablations": (ablations, ablations.read_arguments),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task",
        choices=task_names(),
        default=task_names()[0],
        help="What is IND and what is OOD (default: %(default)s)",
    )
    add_machine_arguments(parser)
    add_networks_argument(parser)
    add_space_argument(parser)
    parser.set_defaults(partition=None)
    parser.add_argument("--partitions", nargs="+", default=["all"], help="Partitions to run (default: all)")
    parser.add_argument(
        "--seeds",
        type=number(int, above=0, most=MOST_SEEDS),
        default=5,
        help="Number of training seeds: 1, 2, … (default: %(default)s)",
    )
    parser.add_argument(
        "--tuning-seeds",
        type=number(int, above=0, most=MOST_SEEDS),
        default=1,
        help="Number of seeds of stage 2 for each training seed (default: %(default)s)",
    )
    parser.add_argument("--modes", nargs="+", choices=[*MODES, "all"], dest="mode", help="Modes of CMG (default: all)")
    eval.add_recipe_argument(parser)
    parser.add_argument("--ood-dataset", nargs="+", default=["all"], help="OOD sets (default: all of the task)")
    eval.add_baselines_argument(parser)
    parser.add_argument(
        "--ablations", action="store_true", help="Also run reproduction.ablations on the first partition and seed"
    )
    parser.add_argument("--output", type=Path, help="Folder of all files (default: results/TASK)")
    for network, name in {"classifier": "classifier", "cvae": "CVAE"}.items():
        parser.add_argument(f"--{network}-args", default="", help=f"Further options of train for the {name}, in quotes")
    parser.add_argument("--eval-args", default="", help="Further options of eval, in quotes")
    where = parser.add_argument_group("where the jobs run")
    where.add_argument(
        "--launcher", choices=["local", "slurm"], default="local", help="Where the jobs run (default: %(default)s)"
    )
    where.add_argument(
        "--jobs",
        type=positive_int,
        help="Jobs at a time (default: one for each free GPU, or 2 that share the cores)",
    )
    where.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="Parameters of submitit, such as timeout_min=240 slurm_partition=gpu gpus_per_node=1 mem_gb=32",
    )
    add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    from reproduction import best, launchers, report, tables

    start = time.monotonic()
    if args.slurm and args.launcher != "slurm":
        raise UserError("--slurm goes with --launcher slurm only; leave it out")
    task_name, jobs = make_jobs(args)
    check_steps(jobs[0])
    check_networks(jobs)
    folder = jobs[0].folder.parent
    check_writable(folder / "table.json")
    for job in jobs:
        check_writable(job.log)
        job.write()
    waiting = [job for job in jobs if not job.is_done]
    print(
        f"{task_name}: {counted(len(jobs), 'job')}, {len(jobs) - len(waiting)} done already; results in {folder}",
        flush=True,
    )
    if waiting and args.launcher == "slurm":
        for job in launchers.ended(waiting, folder / "slurm"):
            print(f"{job.name} ended without its results: {last_line(job.log)} (log: {job.log}); submitting it again")
        numbers = launchers.submit(waiting, folder / "slurm", **slurm_parameters(args.slurm))
        print(f"in the queue: {', '.join(f'{name} as {number}' for name, number in numbers.items())}")
        print("Run the same command again to see how far they are and to get the tables of what is done")
    elif waiting:
        launchers.run_local(waiting, launchers.local_slots(args.device, args.jobs, len(waiting)))

    done, left = [job for job in jobs if job.is_done], [job for job in jobs if not job.is_done]
    for job in left if args.launcher == "local" else ():
        print(f"{job.name} failed: {last_line(job.log)} (log: {job.log})")
    if done:
        results = read_results(done, task_name, args.tuning_seeds, tables.read_result)
        about = {
            "task": task_name,
            "command": shlex.join(["python", "-m", "reproduce", *args.argv]),
            "jobs": len(jobs),
            "done": len(done),
            "wall_seconds": round(time.monotonic() - start, 1),
            "job_seconds": sum(record["seconds"] for job in done for record in job.records().values()),
            "environment": results[0].content["environment"],
            "images": results[0].content["images"],
        }
        # The pictures of the first job are of the same networks as the first result only once it is done.
        made = {path.name: path for step in jobs[0].steps for path in step.outputs} if jobs[0].is_done else {}
        found = best.best_detector(tables.detection_summary(results))
        table = report.write_report(folder, about, results, found.sentence, made.get(DRAWN), made.get(ABLATED))
        print(f"\n{table}\n\n{found.sentence}")
        print(f"wrote {folder}/table.md, table.csv, table.json and report.html")
        if args.task == CUSTOM and done[0] is jobs[0]:
            detector = best.save_best(done[0], found.method, folder / DETECTOR)
            print(f"wrote {folder / DETECTOR}, {found.method} on the networks of {done[0].name}: {detector.rule()}")
    if left and args.launcher == "local":
        raise UserError(
            f"{len(left)} of {len(jobs)} jobs failed: fix what their logs report and run the same command again"
        )


def read_results(done: Sequence[Job], task_name: str, tuning: int, read_result: Callable) -> list:
    """What the jobs made; those of a partition must be of the same numbers of images. Raises `UserError`."""
    results, images = [], {}
    for job in done:
        partition, seed = job_of(job)
        expected = {"task": task_name, "partition": partition, "seeds": tuning_seeds(seed, tuning)} | images.get(
            partition, {}
        )
        results.append(read_result(partition, seed, *outputs(job.folder), expected))
        images[partition] = {"images": results[-1].content["images"]}
    return results


def make_jobs(args: argparse.Namespace) -> tuple[str, list[Job]]:
    """The name of the task and its jobs, one for each partition and training seed. Raises `UserError`."""
    args = with_recipe(args, ("space", "mode"))
    experiment = experiment_from_arguments(args)
    task_name, task = experiment.name, experiment.task
    partitions = pick_all("--partitions", args.partitions, list(task.partitions), task_name)
    modes = pick_all("--modes", args.mode, list(MODES), task_name)
    ood_names = eval.pick_ood(args, task_name, task.ood_datasets)
    in_features = task.space == "features"
    called = "_".join([task_name, *["features"] * in_features, *filter(None, [args.recipe])])
    root = args.output or Path("results") / short_name(called)
    which = [*experiment.task_options, *(word for path in args.ood_dir for word in ("--ood-dir", str(path)))]
    recipe = ("--recipe", args.recipe) if args.recipe else ()
    which += ["--precision", args.precision] if args.precision != "auto" else []
    machine = ["--data-dir", str(args.data_dir), *(["--device", args.device] if args.device else [])]
    more = {
        name: check_options(f"--{name}-args", getattr(args, f"{name}_args"), command.get_parser(), REFUSED)
        for name, command in {"classifier": train, "cvae": train, "eval": eval}.items()
    }
    jobs = []
    for partition in partitions:
        for seed in range(1, args.seeds + 1):
            folder = root / f"{partition}_seed{seed}"
            of_job = [*which, "--partition", partition]
            networks = {name: folder / f"{name}.pkl" for name in ("classifier", "cvae")}
            steps = [
                Step(
                    f"train_{name}",
                    "train",
                    (*of_job, "--command", f"train_{name}", "--seed", str(seed), "--params-dict-name", str(path))
                    + ("--log", str(folder / f"{name}.jsonl"), *more[name]),
                    (path,),
                )
                for name, path in networks.items()
            ]
            if in_features:
                classifier, cvae = steps
                steps[1] = replace(cvae, argv=(*cvae.argv, "--classifier", str(networks["classifier"])))
            loaded = ("--params-dict-name", str(networks["classifier"]), "--params-dict-name2", str(networks["cvae"]))
            tested = (
                *of_job,
                *(("--ood-dataset", *ood_names) if ood_names else ()),
                "--mode",
                *modes,
                *recipe,
                *loaded,
            )
            result, scores = outputs(folder)
            options = ("--seeds", *map(str, tuning_seeds(seed, args.tuning_seeds)))
            options += ("--output", str(result), "--save-scores", str(scores))
            options += () if args.baselines is None else ("--baselines", *args.baselines)
            steps.append(Step("eval", "eval", (*tested, *options, *more["eval"]), (result, scores)))
            if not jobs and not in_features:
                drawn = (*of_job, "--params-dict-name2", str(networks["cvae"]), "--output", str(folder / DRAWN))
                steps.append(Step("samples", "figure.samples", drawn, (folder / DRAWN,)))
            if not jobs and args.ablations:
                options = ("--seeds", *ABLATION_SEEDS, "--output", str(folder / ABLATED), *more["eval"])
                steps.append(Step("ablations", "reproduction.ablations", (*tested, *options), (folder / ABLATED,)))
            jobs.append(Job(folder, tuple(steps), tuple(machine)))
    return task_name, jobs


def check_steps(job: Job) -> None:
    """Find out before the work whether what is handed on to eval goes together, for one job as for all.

    Raises:
        UserError: it does not.
    """
    for step in job.steps:
        if step.name in CHECKED:
            command, read = CHECKED[step.name]
            args = parse_options("--eval-args", command.get_parser(), step.argv)
            args.argv = list(step.argv)
            try:
                read(args)
            except UserError as error:
                raise UserError(f"--eval-args: {error}") from None


def check_networks(jobs: Sequence[Job]) -> None:
    """Find out before the work whether networks that are there were trained otherwise, as far as it is recorded; train
    itself compares with the checkpoint.

    Raises:
        UserError: they were; train would refuse to replace them.
    """
    for job in jobs:
        recorded = job.recorded()
        for step in job.steps:
            if step.module != "train" or step.name not in recorded or not all(path.is_file() for path in step.outputs):
                continue
            try:
                then = training_options(step.name, recorded[step.name]["argv"])
            except UserError:  # options of another version
                continue
            now = training_options(step.name, step.argv)
            # MISSING is the task's own value, which may have been written out on the other side.
            pairs = {name: (then[name], now[name]) for name in DECIDES}
            differ = [
                flag(name, TRAINING) for name, pair in pairs.items() if MISSING not in pair and pair[0] != pair[1]
            ]
            if differ and "--restart" not in step.argv:
                raise UserError(
                    f"{job.folder} holds networks made with another {', '.join(differ)}: give the same options, "
                    "name another --output, or remove the folder"
                )


def training_options(flag: str, argv: Sequence[str]) -> dict[str, object]:
    """The values of `DECIDES` in the options of train. Raises `UserError`, which names `flag`."""
    given = vars(parse_options(flag, train.get_parser(), argv))
    return {name: TRAINING[name].default if given[name] is None else given[name] for name in DECIDES}


def tuning_seeds(seed: int, count: int) -> list[int]:
    """The seeds of stage 2 for a training seed: others for every one, and the same where there is one."""
    return list(range((seed - 1) * count + 1, seed * count + 1))


def outputs(folder: Path) -> tuple[Path, Path]:
    """What eval writes in the folder of a job: metrics and scores."""
    return folder / "eval.json", folder / "scores.npz"


def job_of(job: Job) -> tuple[str, int]:
    """Partition and training seed of a job."""
    partition, seed = job.name.rsplit("_seed", 1)
    return partition, int(seed)


def slurm_parameters(words: list[str]) -> dict[str, object]:
    """ "timeout_min=240 slurm_partition=gpu" -> {"timeout_min": 240, "slurm_partition": "gpu"}. Raises `UserError`."""
    parameters = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise UserError(f"--slurm {word}: expected NAME=VALUE, such as timeout_min=240")
        parameters[name] = int(value) if value.isdecimal() else value
    return parameters


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
