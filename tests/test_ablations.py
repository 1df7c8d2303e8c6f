"""The tables of ablations and precision: what they print is what the runs gave."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

import pytest

import eval
import train
from benchmarks import ablations, precision
from benchmarks.ablations import cells, markdown
from datasets.tasks import COMMANDS
from evaluation.report import mean_and_sd
from reproduction.report import ablation_cells, own_value, sweep_points
from utils import run_command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with checkpoints of the digits, of an epoch or two."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS:
            argv = ["--command", command, "--epochs", "2", "--device", "cpu", "--val-fraction", "0.1"]
            assert run_command(train.main, train.get_parser(), argv) == 0
    return folder


def run_ablations(*argv: str) -> int:
    return run_command(ablations.main, ablations.get_parser(), ["--device", "cpu", "--precision", "fp32", *argv])


def test_ablations_are_runs_of_eval_with_those_options(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    variants = ["", "--sigma 1.5", "--tune joint --epochs 1", "--mixing-probability 0.9"]
    given = [f"--variant={variant}" for variant in variants]
    assert run_ablations("--epochs", "1", "--seeds", "1", "2", "--output", "a.json", *given) == 0
    printed = capsys.readouterr().out
    found = json.loads(Path("a.json").read_text())
    assert list(found["variants"]) == variants and found["config"]["sigma"] == 3.0
    assert markdown(found) in printed
    for variant in variants:
        argv = ["--device", "cpu", "--precision", "fp32", "--epochs", "1", "--seeds", "1", "2", "--output", "b.json"]
        assert run_command(eval.main, eval.get_parser(), [*argv, *variant.split()]) == 0
        alone = json.loads(Path("b.json").read_text())
        tuned = [row for row in alone["detection"] if row["at"] != "untouched"]
        assert found["variants"][variant]["detection"] == tuned
        assert found["variants"][variant]["config"] == alone["config"]
        for mode in eval.MODE_NAMES:
            start, best, validated, last, _ = cells(found["variants"][variant], mode)
            values = [row["auroc"] for row in tuned if (row["method"], row["at"]) == (mode, "last")]
            assert last == mean_and_sd(values) and f"| {last} |" in printed
            curves = [run["curve"] for run in alone["runs"] if run["mode"] == mode]
            if "joint" in variant:
                assert (start, best, validated) == ("-", "-", "-")
            else:
                top = [max(check["auroc"]["held-out-classes"] for check in curve) for curve in curves]
                assert best.startswith(mean_and_sd(top) + " (") and validated.endswith(")")
    assert own_value(found, "--sigma") == 3.0 and own_value(found, "--mixing-probability") == 0.5
    points = sweep_points(found, "--sigma")
    assert set(points) == set(eval.MODE_NAMES) and set(points["CMG-energy"]) == {3.0, 1.5}
    header, rows = ablation_cells(found)
    assert [row[0] for row in rows] == ["the method", *variants[1:]] and len(header) == 3
    assert rows[1][1].split(" ± ")[0] == f"{100 * mean(points['CMG-energy'][1.5]):.2f}"


def test_a_variant_that_is_no_option_of_eval_is_named(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit):
        run_ablations("--variant=--sigma none", "--output", "c.json")
    assert "argument --sigma: 'none' is not a number" in capsys.readouterr().err
    assert run_ablations("--variant=--tune joint --anchor 1", "--output", "c.json") == 2
    assert (
        "--anchor goes with --tune head or last-layer only" in capsys.readouterr().err and not Path("c.json").exists()
    )


@pytest.mark.parametrize("variant", ablations.VARIANTS)
@pytest.mark.parametrize("given", [["--mode", "CMG-softmax"], ["--mixing", "none"]], ids=" ".join)
def test_every_variant_is_taken_in_every_mode_and_mixing(given, variant):
    args = ablations.get_parser().parse_args(["--device", "cpu", *given])
    args.argv = given
    config, tune = ablations.variant_config(args, eval.read_arguments(args), variant)
    assert tune == (variant.split()[1] if "--tune" in variant else "head") and config.num_ind == 6


def test_precision_compares_the_same_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--quick", "--device", "cpu", "--classifier-args=--epochs 2", "--eval-args=--mode CMG-energy"]
    assert run_command(precision.main, precision.get_parser(), argv) == 0
    *table, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert figures.pop("seeds") == [1, 2]
    assert {"accuracy", "mse", "kl_nats", "AUROC CMG-energy last, held-out-classes"} <= set(figures)
    for name, found in figures.items():
        difference = found["bf16"]["mean"] - found["fp32"]["mean"]
        assert found["difference"] == pytest.approx(difference)
        row = f"| {name} | {found['fp32']['mean']:.4f} ± {found['fp32']['sd']:.4f} |"
        assert any(line.startswith(row) for line in table)
    accuracies = []
    for seed in (1, 2):
        argv = ["--epochs", "2", "--seed", str(seed), "--precision", "fp32", "--device", "cpu"]
        assert run_command(train.main, train.get_parser(), [*argv, "--params-dict-name", f"{seed}.pkl"]) == 0
        accuracies.append(float(capsys.readouterr().out.split("accuracy ")[1].split()[0]))
    assert figures["accuracy"]["fp32"]["mean"] == pytest.approx(mean(accuracies), abs=1e-4)
    assert figures["accuracy"]["fp32"]["sd"] == pytest.approx(stdev(accuracies), abs=1e-4)
