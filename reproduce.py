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
from collections.abc import Sequence
from pathlib import Path

import eval
import train
from benchmarks import ablations
from datasets.tasks import add_data_arguments, task_from_arguments, task_names
from evaluation.baselines import POST_HOC
from reproduction.jobs import Job, Step, last_line
from training.options import check_options, option, parse_options
from utils import (
    UserError,
    add_machine_arguments,
    check_writable,
    counted,
    pick_all,
    pick_device,
    positive_int,
    run_command,
    short_name,
)

ABLATION_SEEDS = ("1", "2", "3")
SAMPLES, ABLATIONS = "samples.png", "ablations.json"
SHARED = ("task", "ind_dir", "ood_dir", "image_size", "grey", "ood_dataset", "baselines", "device", "data_dir")
FILES = ("output", "save_scores", "params_dict_name", "params_dict_name2")
REFUSED = {  # options of the steps that are not for the user to hand on -> what to do instead
    **{name: f"give {option(name)} to reproduce itself" for name in SHARED},
    **dict.fromkeys(("seed", "seeds"), "give --seeds to reproduce itself: how many"),
    **dict.fromkeys(FILES, "give --output to reproduce itself: the folder of all files"),
    "partition": "give --partitions to reproduce itself",
    "mode": "give --modes to reproduce itself",
    "command": "--classifier-args and --cvae-args are for one network each",
    "save_detector": "every job would write the same file; run eval on the networks of one",
    **dict.fromkeys(("log", "tensorboard"), "every job has logs of its own, NETWORK.jsonl in its folder"),
}
DECIDES = ("epochs", "batch_size", "lr", "warmup", "val_fraction")  # what train makes, beside the task and the seed
READERS = {  # step -> its command, and what that checks before the work beside what the parser does
    "eval": (eval, eval.read_run),
    "ablations": (ablations, ablations.read_arguments),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=task_names(), default=task_names()[0], help="(default: %(default)s)")
    add_machine_arguments(parser)
    parser.set_defaults(partition=None)
    parser.add_argument("--partitions", nargs="+", default=["all"], help="(default: all)")
    parser.add_argument("--seeds", type=positive_int, default=5, help="how many: 1, 2, … (default: %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=[*eval.MODE_NAMES, "all"], default=["all"], help="(default: all)")
    parser.add_argument("--ood-dataset", nargs="+", default=["all"], help="OOD sets (default: all of the task)")
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=list(POST_HOC),
        metavar="NAME",
        help="post-hoc detectors of pytorch-ood on the same classifiers and images (without a name: all)",
    )
    parser.add_argument(
        "--ablations", action="store_true", help="benchmarks.ablations on the first partition and seed, too"
    )
    parser.add_argument("--output", type=Path, help="folder (default: results/TASK)")
    for network in ("classifier", "cvae"):
        parser.add_argument(f"--{network}-args", default="", help="further options of train, quoted")
    parser.add_argument("--eval-args", default="", help="further options of eval, quoted")
    where = parser.add_argument_group("where the jobs run")
    where.add_argument("--launcher", choices=["local", "slurm"], default="local", help="(default: %(default)s)")
    where.add_argument(
        "--jobs",
        type=positive_int,
        help="at a time, of local (default: one for each free GPU, or 2 that share the cores)",
    )
    where.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="parameters of submitit, such as timeout_min=240 slurm_partition=gpu gpus_per_node=1 mem_gb=32",
    )
    add_data_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    from reproduction import launchers
    from reproduction.report import write_report
    from reproduction.tables import read_result

    start = time.monotonic()
    if args.slurm and args.launcher != "slurm":
        raise UserError("--slurm goes with --launcher slurm only; leave it out")
    task_name, jobs = make_jobs(args)
    check_steps(jobs[0])
    check_networks(jobs)
    folder = jobs[0].folder.parent
    check_writable(folder / "table.json")
    for job in jobs:
        job.write()
    waiting = [job for job in jobs if not job.is_done]
    print(
        f"{task_name}: {counted(len(jobs), 'job')}, {len(jobs) - len(waiting)} done already; results in {folder}",
        flush=True,
    )
    if args.launcher == "local":
        pick_device(args.device)
    if waiting and args.launcher == "slurm":
        for job in launchers.ended(waiting, folder / "slurm"):
            print(f"{job.name} ended without its results: {last_line(job.log)} (log: {job.log}); it is submitted again")
        numbers = launchers.submit(waiting, folder / "slurm", **slurm_parameters(args.slurm))
        print(f"in the queue: {', '.join(f'{name} as {number}' for name, number in numbers.items())}")
        print("Run the same command again to see how far they are, and for the tables of what is done")
    elif waiting:
        launchers.run_local(waiting, launchers.local_slots(args.device, args.jobs))

    done, left = [job for job in jobs if job.is_done], [job for job in jobs if not job.is_done]
    for job in left if args.launcher == "local" else ():
        print(f"{job.name} failed: {last_line(job.log)} (log: {job.log})")
    if done:
        results = [read_result(*job_of(job), *outputs(job.folder)) for job in done]
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
        samples, changes = (jobs[0].folder / name if jobs[0].is_done else None for name in (SAMPLES, ABLATIONS))
        print(f"\n{write_report(folder, about, results, samples, changes if args.ablations else None)}\n")
        print(f"wrote {folder}/table.md, table.csv, table.json and report.html")
    if left and args.launcher == "local":
        raise UserError(
            f"{len(left)} of {len(jobs)} jobs failed: mend what their logs say and run the same command again"
        )


def make_jobs(args: argparse.Namespace) -> tuple[str, list[Job]]:
    """The name of the task and its jobs, one for each partition and training seed. Raises `UserError`."""
    task_name, task, _ = task_from_arguments(args)
    partitions = pick_all("--partitions", args.partitions, list(task.partitions), task_name)
    modes = pick_all("--modes", args.modes, eval.MODE_NAMES, task_name)
    ood_names = pick_all("--ood-dataset", args.ood_dataset, task.ood_datasets, task_name)
    root = args.output or Path("results") / short_name(task_name)
    which = [*(task.options or ("--task", task_name))]
    which += [word for ood_dir in args.ood_dir for word in ("--ood-dir", str(ood_dir))]
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
            loaded = ("--params-dict-name", str(networks["classifier"]), "--params-dict-name2", str(networks["cvae"]))
            tested = (*of_job, "--ood-dataset", *ood_names, "--mode", *modes, *loaded)
            result, scores = outputs(folder)
            options = ("--seeds", str(seed), "--output", str(result), "--save-scores", str(scores))
            options += () if args.baselines is None else ("--baselines", *args.baselines)
            steps.append(Step("eval", "eval", (*tested, *options, *more["eval"]), (result, scores)))
            if not jobs:
                drawn = (*of_job, "--params-dict-name2", str(networks["cvae"]), "--output", str(folder / SAMPLES))
                steps.append(Step("samples", "figure.samples", drawn, (folder / SAMPLES,)))
            if not jobs and args.ablations:
                options = ("--seeds", *ABLATION_SEEDS, "--output", str(folder / ABLATIONS), *more["eval"])
                steps.append(Step("ablations", "benchmarks.ablations", (*tested, *options), (folder / ABLATIONS,)))
            jobs.append(Job(folder, tuple(steps), tuple(machine)))
    return task_name, jobs


def check_steps(job: Job) -> None:
    """Find out before the work whether what is handed on to eval goes together, for one job as for all.

    Raises:
        UserError: it does not.
    """
    for step in job.steps:
        if step.name in READERS:
            command, read = READERS[step.name]
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
                then = vars(parse_options(step.name, train.get_parser(), recorded[step.name]["argv"]))
            except UserError:  # options of another version
                continue
            now = vars(parse_options(step.name, train.get_parser(), step.argv))
            # None is the task's own value, which may have been written out on the other side.
            differ = [
                option(name) for name in DECIDES if then[name] != now[name] and None not in (then[name], now[name])
            ]
            if differ and not now["restart"]:
                raise UserError(
                    f"{job.folder} holds networks made with another {', '.join(differ)}: give the options of then, "
                    "name another --output, or remove the folder"
                )


def outputs(folder: Path) -> tuple[Path, Path]:
    """What eval writes in the folder of a job: figures and scores."""
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
