"""The table of ablations: what it prints is what the runs gave."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

import eval
import train
from cli.errors import run_command
from cmg.config import config_for
from cmg.losses import MODES
from datasets.tasks import COMMANDS, TASKS
from evaluation.report import mean_and_sd
from reproduction import ablations
from reproduction.ablate import HEADER, cells, table
from reproduction.report import ablation_cells, own_value, sweep_points


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with checkpoints of the digits, of an epoch or two."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS:
            argv = ["--command", command, "--epochs", "1", "--device", "cpu", "--val-fraction", "0.8"]
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
    assert table(found) in printed
    header, rule, *lines = table(found).splitlines()
    assert [line.count("|") for line in (header, rule, *lines)] == [len(HEADER) + 1] * (2 + 4 * 2 + 2)
    assert [line.split(" | ")[0] for line in lines[::2]] == [
        "| the method", *(f"| `{variant}`" for variant in variants[1:]), "| pretrained classifier"
    ]  # fmt: skip
    double = json.loads(json.dumps(found))  # as if there were another OOD set, on which all is 50
    for rows in (double["pretrained"], *(one["detection"] for one in double["variants"].values())):
        rows += [row | {"ood_dataset": "another", "auroc": 0.5} for row in rows]
    for run in (run for one in double["variants"].values() for run in one["runs"]):
        for check in run["curve"]:
            check["auroc"]["another"] = 0.5
    first, second = table(double).split("\n\nanother:\n\n")
    assert first == f"held-out-classes:\n\n{table(found)}"
    assert "| the method | CMG-energy | 50.00 ± 0.00 | 50.00 ± 0.00 (0) |" in second
    msp = next(row["auroc"] for row in found["pretrained"] if row["method"] == "MSP")
    assert f"| pretrained classifier | MSP | {100 * msp:.2f} | - | - | - | - | - |" in lines
    for variant in variants:
        argv = ["--device", "cpu", "--precision", "fp32", "--epochs", "1", "--seeds", "1", "2", "--output", "b.json"]
        assert run_command(eval.main, eval.get_parser(), [*argv, *variant.split()]) == 0
        alone = json.loads(Path("b.json").read_text())
        tuned = [row for row in alone["detection"] if row["at"] != "pretrained"]
        assert found["variants"][variant]["detection"] == tuned
        assert found["variants"][variant]["config"] == alone["config"]
        for mode in MODES:
            start, best, validated, last, _ = cells(found["variants"][variant], mode, "held-out-classes")
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
    assert set(points) == set(MODES) and set(points["CMG-energy"]) == {3.0, 1.5}
    header, rows = ablation_cells(found)
    assert [row[0] for row in rows] == ["the method", *variants[1:]] and len(header) == 3
    assert rows[1][1].split(" ± ")[0] == f"{100 * mean(points['CMG-energy'][1.5]):.2f}"


def test_a_variant_that_is_no_option_of_eval_is_named(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    joint = "--tune joint --anchor 1"
    for variant, message in {
        "--sigma none": "--variant='--sigma none': argument --sigma: 'none' is not a number",
        "--sigmas 1": "--variant='--sigmas 1': unrecognized arguments: --sigmas 1",
        "--mixing 'coin": """--variant: "--mixing 'coin" cannot be split into options: no closing quotation""",
        "--least-explained 0.5": "--least-explained goes with --space features only; leave one of them out",
        joint: f"--variant={joint!r}: --anchor goes with --tune head or last-layer only; leave it out",
    }.items():
        assert run_ablations(f"--variant={variant}", "--output", "c.json") == 2
        assert capsys.readouterr().err == f"reproduction.ablations: error: {message}\n" and not Path("c.json").exists()


@pytest.mark.parametrize(
    ("variant", "flag"),
    [
        ("--mode CMG-softmax", "--mode"),
        ("--seeds 9", "--seeds"),
        ("--sigma 2 --ood-dataset held-out-classes", "--ood-dataset"),
        ("--partition partition2", "--partition"),
        ("--output x.json", "--output"),
        ("--params-dict-name x.pkl", "--params-dict-name"),
        ("--save-scores x.npz", "--save-scores"),
        ("--variant ''", "--variant"),
        ("--precision bf16", "--precision"),
    ],
)
def test_a_variant_that_changes_something_else_is_refused(place, monkeypatch, capsys, variant, flag):
    monkeypatch.chdir(place)
    assert run_ablations(f"--variant={variant}", "--output", "c.json") == 2
    changes = (
        "--sigma, --epochs, --batch-size, --lr, --half-life, --mu, --margins, --mixing, --mixing-probability, --pairs, "
        "--max-confidence, --residuals, --pseudo-batch-size, --pseudo-pool, --loss-energy, --score, "
        "--tune, --anchor, --interpolation, --least-explained, --eval-every"
    )
    message = f"--variant={variant!r}: {flag} is the same for all; a variant changes {changes}"
    assert capsys.readouterr().err == f"reproduction.ablations: error: {message}\n" and not Path("c.json").exists()


@pytest.mark.parametrize(
    "given", [["--baselines"], ["--recipe", "unattended"], ["--save-scores", "x.npz"], ["--save-detector", "x.pt"]]
)
def test_what_eval_does_for_one_run_is_refused(place, monkeypatch, capsys, given):
    monkeypatch.chdir(place)
    assert run_ablations(*given, "--output", "c.json") == 2
    message = f"{given[0]} is for a single run; leave it out here and give it to eval"
    assert capsys.readouterr().err == f"reproduction.ablations: error: {message}\n" and not Path("c.json").exists()


@pytest.mark.parametrize("variant", ablations.VARIANTS)
@pytest.mark.parametrize(
    "given",
    [["--mode", "CMG-softmax"], ["--mixing", "none"], ["--check-every", "50", "--pseudo-pool", "12"]],
    ids=" ".join,
)
def test_every_variant_is_taken_whatever_all_have(given, variant):
    argv = ["--device", "cpu", *given]
    args = ablations.get_parser().parse_args(argv)
    args.argv = argv
    request = eval.read_arguments(args)
    config = config_for(request.experiment, "fp32", **ablations.variant_options(args, variant, request))
    assert config.tune == (variant.split()[1] if "--tune" in variant else "head") and config.num_ind == 6
    pool = 12 if "--pseudo-pool" in given else TASKS["same_dataset_digits"].fine_tuning["pseudo_pool"]
    assert config.pseudo_pool == (0 if config.tune == "joint" else pool)


def test_an_option_of_all_variants_is_left_out_where_it_is_about_nothing():
    argv = ["--device", "cpu", "--space", "features", "--residuals", "4", "--least-explained", "0.5"]
    args = ablations.get_parser().parse_args(argv)
    args.argv = argv
    request = eval.read_arguments(args)
    whole, last = (ablations.variant_options(args, variant, request) for variant in ("", "--tune last-layer"))
    assert (whole["residuals"], whole["least_explained"]) == (4, 0.5)
    assert not {"residuals", "least_explained"} & set(last) and last["tune"] == "last-layer"
