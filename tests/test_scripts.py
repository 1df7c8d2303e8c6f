"""The scripts that run every partition of a task: which commands they give, and that the commands take them.

A stand-in for Python notes each command and makes the file that the real one would make; the commands themselves are
tested on the same tasks in test_commands.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import eval
import train
from evaluation import summarise

ROOT = Path(__file__).parents[1]
PARTITIONS = ["partition1", "partition2", "partition3", "partition4", "partition5"]
PARSERS = {module.__name__: module.get_parser() for module in (train, eval, summarise)}
STAND_IN = r"""#!/usr/bin/env bash
printf '%q ' "$@" >> commands
echo >> commands
while [ $# -gt 0 ]; do
    case "$1" in
        --output) mkdir -p results; touch "$2" ;;
        --params-dict-name) mkdir -p ckpt; [ -f "$2" ] || touch "$2" ;;
    esac
    shift
done
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


def commands(repository: Path, script: str, **environment: str) -> list[tuple]:
    """Run a script from another folder; the module and the parsed arguments of every command that it gave."""
    noted = repository / "commands"
    noted.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", repository / "scripts" / script],
        cwd=repository.parent,
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    words = [shlex.split(line) for line in noted.read_text().splitlines()]
    assert all(first == "-m" for first, *_ in words)
    return [(module, PARSERS[module].parse_args(argv)) for _, module, *argv in words]


@pytest.mark.parametrize(
    ("script", "task", "partitions"),
    [
        ("run_mnist.sh", "same_dataset_mnist", PARTITIONS),
        ("run_cifar10.sh", "same_dataset_cifar10", PARTITIONS),
        ("run_different_dataset.sh", "different_dataset", ["all"]),
    ],
)
def test_every_partition_is_trained_evaluated_and_summarised(repository, script, task, partitions):
    *given, (last, summary) = commands(repository, script)
    assert [module for module, _ in given] == ["train", "train", "eval"] * len(partitions)
    for partition, (_, classifier), (_, cvae), (_, both) in zip(
        partitions, given[::3], given[1::3], given[2::3], strict=True
    ):
        for args in (classifier, cvae, both):
            assert (args.task, args.partition, args.data_dir) == (task, partition, Path("datasets"))
        assert (classifier.command, cvae.command) == ("train_classifier", "train_cvae")
        assert (classifier.seed, cvae.seed, both.seeds) == (123, 123, [123])
        assert (both.mode, both.ood_dataset) == (["all"], ["all"])
        assert both.params_dict_name == classifier.params_dict_name
        assert both.params_dict_name2 == cvae.params_dict_name != classifier.params_dict_name
    outputs = [args.output for _, args in given[2::3]]
    assert last == "evaluation.summarise" and list(map(Path, summary.results)) == outputs
    assert len(set(outputs)) == len(partitions)


def test_options_come_from_the_environment(repository):
    options = {"DEVICE": "cpu", "SEED": "7", "DATA_DIR": "my images", "TRAIN_ARGS": "--epochs 1", "EVAL_ARGS": "--lr 1"}
    (_, classifier), (_, cvae), (_, both), _ = commands(repository, "run_different_dataset.sh", **options)
    for args in (classifier, cvae, both):
        assert (args.device, args.data_dir) == ("cpu", repository.parent / "my images")
    assert (classifier.seed, cvae.seed, both.seeds) == (7, 7, [7])
    assert (classifier.epochs, cvae.epochs, both.epochs, both.lr) == (1, 1, None, 1.0)


def test_a_result_is_kept_until_its_networks_or_options_change(repository):
    def evaluated(**environment: str) -> list[Path]:
        given = commands(repository, "run_different_dataset.sh", **environment)
        return [args.output for module, args in given if module == "eval"]

    (output,) = evaluated()
    assert evaluated() == []
    (other,) = evaluated(EVAL_ARGS="--epochs 2")
    assert other != output and evaluated(EVAL_ARGS="--epochs 2") == evaluated() == []
    networks = sorted((repository / "ckpt").iterdir())
    assert len(networks) == 2
    for network in networks:
        now = (repository / output).stat().st_mtime + 1
        os.utime(network, (now, now))
        assert evaluated() == [output]
        os.utime(repository / output, (now + 1, now + 1))
