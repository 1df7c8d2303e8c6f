"""The scripts that run every partition of a task: which command they give, and the jobs that this command makes of it.

A stand-in for Python notes the command; the jobs themselves are tested in test_reproduce, their steps in test_commands.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import eval
import reproduce
import train
from reproduction.jobs import Job

ROOT = Path(__file__).parents[1]
PARTITIONS = ["partition1", "partition2", "partition3", "partition4", "partition5"]
PARSERS = {module.__name__: module.get_parser() for module in (train, eval)}
STAND_IN = r"""#!/usr/bin/env bash
printf '%q ' "$@" >> commands
echo >> commands
"""


@pytest.fixture
def repository(tmp_path) -> Path:
    """The scripts, and an environment in which Python is the stand-in."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN)
    python.chmod(0o755)
    stamp = 'touch ".venv/.requirements.txt.$(cat requirements*.txt | cksum | cut -d" " -f1)"'
    subprocess.run(["bash", "-c", stamp], cwd=tmp_path, check=True)
    return tmp_path


def jobs_of(repository: Path, script: str, *options: str, **environment: str) -> list[Job]:
    """Run a script from another folder; the jobs of the one command that it gave."""
    done = subprocess.run(
        ["bash", repository / "scripts" / script, *options],
        cwd=repository.parent,
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (command,) = (repository / "commands").read_text().splitlines()
    dash_m, module, *argv = shlex.split(command)
    assert (dash_m, module) == ("-m", "reproduce")
    _, jobs = reproduce.make_jobs(reproduce.get_parser().parse_args(argv))
    return jobs


def commands(job: Job) -> list[argparse.Namespace]:
    """The parsed arguments of the two trainings and of eval."""
    steps = [step for step in job.steps if step.name != "samples"]
    assert [step.module for step in steps] == ["train", "train", "eval"]
    return [PARSERS[step.module].parse_args([*step.argv, *job.machine]) for step in steps]


@pytest.mark.parametrize(
    ("script", "task", "partitions"),
    [
        ("run_mnist.sh", "same_dataset_mnist", PARTITIONS),
        ("run_cifar10.sh", "same_dataset_cifar10", PARTITIONS),
        ("run_different_dataset.sh", "different_dataset", ["all"]),
    ],
)
def test_every_partition_is_trained_evaluated_and_summarised(repository, script, task, partitions):
    jobs = jobs_of(repository, script)
    assert [job.name for job in jobs] == [f"{partition}_seed1" for partition in partitions]
    outputs = []
    for partition, job in zip(partitions, jobs, strict=True):
        classifier, cvae, both = commands(job)
        for args in (classifier, cvae, both):
            assert (args.task, args.partition, args.data_dir) == (task, partition, Path("datasets"))
            assert args.device is None
        assert (classifier.command, cvae.command) == ("train_classifier", "train_cvae")
        assert (classifier.seed, cvae.seed, both.seeds) == (1, 1, [1])
        assert set(both.mode) == {"CMG-energy", "CMG-softmax"} and both.ood_dataset
        assert both.params_dict_name == classifier.params_dict_name
        assert both.params_dict_name2 == cvae.params_dict_name != classifier.params_dict_name
        outputs.append(both.output)
    assert {output.parents[1] for output in outputs} == {Path("results") / task}
    assert len(set(outputs)) == len(partitions)


def test_options_come_from_the_environment(repository):
    options = {
        "DEVICE": "cpu",
        "SEEDS": "2",
        "DATA_DIR": "my images",
        "TRAIN_ARGS": "--epochs 1",
        "EVAL_ARGS": "--lr 1",
    }
    jobs = jobs_of(repository, "run_different_dataset.sh", **options)
    assert [job.name for job in jobs] == ["all_seed1", "all_seed2"]
    for seed, job in enumerate(jobs, start=1):
        classifier, cvae, both = commands(job)
        for args in (classifier, cvae, both):
            assert (args.device, args.data_dir) == ("cpu", repository.parent / "my images")
        assert (classifier.seed, cvae.seed, both.seeds) == (seed, seed, [seed])
        assert (classifier.epochs, cvae.epochs, both.epochs, both.learning_rate) == (1, 1, None, 1.0)


def test_further_options_are_those_of_reproduce(repository):
    options = ["--partitions", "partition2", "--modes", "CMG-energy", "--output", "my results"]
    (job,) = jobs_of(repository, "run_mnist.sh", *options)
    assert job.folder == Path("my results") / "partition2_seed1" and commands(job)[2].mode == ["CMG-energy"]


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_every_script_is_one_that_bash_can_read(script):
    checked = subprocess.run(["bash", "-n", ROOT / "scripts" / script], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
