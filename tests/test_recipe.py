"""Recipes: options of eval under one name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import eval as evaluate
import reproduce
import train
from cmg.config import RECIPES
from evaluation.report import PRETRAINED
from reproduction import launchers
from tests.commands import error_of, run
from tests.test_reproduce import run_here
from utils import load_checkpoint

FEATURES = ("--command", "train_cvae", "--space", "features", "--device", "cpu")
SHORT = ("--device", "cpu", "--epochs", 3, "--seeds", 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a classifier of the digits and a CVAE of its features that explains a part of them."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(train, "--epochs", 2, "--device", "cpu") == 0
        assert run(train, *FEATURES, "--epochs", 2) == 0
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """The same in a folder of one's own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "ckpt", "ckpt")
    return tmp_path


def test_a_recipe_is_its_options_written_out(place, capsys):
    fixed = {"pairs": "distinct", "residuals": 6.0, "max_confidence": 0.9}
    fixed |= {"learning_rate": 1e-3, "half_life": 400.0, "interpolation": 0.75}
    recipe = {"space": "features", "mode": ["CMG-energy"], "least_explained": 0.75}
    assert RECIPES["unattended"] == recipe | fixed
    tuned = ("--least-explained", 0)  # however little the short training has explained
    flags = {name: f"--{name.replace('_', '-')}" for name in fixed} | {"learning_rate": "--lr"}
    words = [word for name, value in fixed.items() for word in (flags[name], value)]
    assert run(evaluate, *SHORT, "--recipe", "unattended", *tuned, "--output", "a.json") == 0
    options = ("--space", "features", "--mode", "CMG-energy", *words, *tuned)
    assert run(evaluate, *SHORT, *options, "--output", "b.json") == 0
    first, second = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert first["detection"] == second["detection"] and first["config"] == second["config"]
    assert first["config"] | fixed == first["config"]
    assert {row["method"] for row in first["detection"]} == {"MSP", "energy", "CMG-energy"}


def test_what_is_given_beside_a_recipe_counts(place, capsys):
    argv = ("--recipe", "unattended", "--interpolation", "0.3", "--mode", "all", "--least-explained", "0")
    assert run(evaluate, *SHORT, *argv, "--output", "a.json") == 0
    found = json.loads(Path("a.json").read_text())
    assert found["config"]["interpolation"] == 0.3 and found["config"]["pairs"] == "distinct"
    assert "CMG-softmax" in {row["method"] for row in found["detection"]}


def test_a_name_tells_the_recipe(place, capsys):
    name = "same_dataset_digits_partition1_CMG-energy_seed1_space-features_epochs-3{}_recipe-unattended.json"
    assert run(evaluate, *SHORT, "--recipe", "unattended") == 0
    assert run(evaluate, *SHORT, "--recipe", "unattended", "--residuals", 0) == 0  # the method's, not the recipe's
    found = {path.name for path in Path("results").iterdir()}
    assert found == {name.format(""), name.format("_residuals-0.0")}


@pytest.mark.parametrize(
    ("least", "left"), [("0.0001", False), ("1", True)], ids=["explained enough", "too little explained"]
)
def test_a_generator_that_explains_little_leaves_the_head_alone(place, capsys, least, left):
    argv = ("--space", "features", "--mode", "CMG-energy", "--least-explained", least, "--lr", "1e-3")
    assert run(evaluate, *SHORT, *argv, "--output", "a.json", "--save-detector", "d.pt") == 0
    printed, found = capsys.readouterr().out, json.loads(Path("a.json").read_text())
    saved, classifier = (
        load_checkpoint(Path("d.pt")),
        load_checkpoint(Path("ckpt/same_dataset_digits_partition1_classifier.pkl")),
    )
    same = [torch.equal(saved["model"][name], value) for name, value in classifier.items() if name in saved["model"]]
    assert same and all(same) == left
    assert ("The head stays as it was: the generator explains less than 100 %" in printed) == left
    assert found["config"]["epochs"] == (0 if left else 3) and bool(found["unchanged"]) == left
    accuracies = {row["at"]: row["accuracy"] for row in found["ind"]}
    assert (accuracies["last"] == accuracies[PRETRAINED]) or not left


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipe", "unattended", "--space", "images"], "--recipe unattended goes with --space features only"),
        (["--least-explained", "0.5"], "--least-explained goes with --space features only"),
        (["--residuals", "4"], "--residuals goes with --space features only"),
        (["--residuals", "4", "--space", "features", "--tune", "last-layer"], "--residuals goes with --tune head only"),
        (
            ["--recipe", "unattended", "--tune", "last-layer"],
            "--recipe unattended: --residuals goes with --tune head only",
        ),
        (
            ["--recipe", "unattended", "--mixing", "none"],
            "--recipe unattended: --pairs goes with --mixing bernoulli or mixup",
        ),
        (["--recipe", "unattend"], "argument --recipe: invalid choice: 'unattend' (choose from"),
    ],
)
def test_what_does_not_go_with_it_is_one_line(place, capsys, argv, message):
    assert message in error_of(capsys, evaluate, *argv)


def test_reproduce_takes_it_in_its_space_and_modes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launchers, "run_local", run_here)
    few = "--epochs 1 --val-fraction 0.9"
    argv = ["--recipe", "unattended", "--partitions", "partition2", "--seeds", 1, "--device", "cpu"]
    argv += [f"--classifier-args={few}", f"--cvae-args={few}", "--eval-args=--epochs 1"]
    assert run(reproduce, *argv) == 0
    folder = Path("results/same_dataset_digits_features_unattended")
    found = json.loads((folder / "partition2_seed1" / "eval.json").read_text())
    assert found["config"]["residuals"] == 6.0 and "explained" in found["generator"]
    assert {row["method"] for row in found["detection"]} == {"MSP", "energy", "CMG-energy"}
    assert "--eval-args: no --recipe here: give --recipe to reproduce itself" in error_of(
        capsys, reproduce, "--eval-args=--recipe unattended"
    )
