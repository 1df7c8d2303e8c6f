"""Results that were written under the former names give the tables that they gave."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from cmg.config import FineTuneConfig
from evaluation.metrics import detection_metrics
from reproduction import ablate, report
from reproduction.former import with_todays_keys, with_todays_names
from reproduction.tables import JobResult, detection_summary, read_result

SCORES = {  # detector -> IND test, pseudo-OOD (not before fine-tuning), OOD
    "MSP/-": ([0.1, 0.2, 0.3], None, [0.25, 0.4]),
    "energy/-": ([-9.0, -8.0, -7.0], None, [-7.5, -3.0]),
    "CMG-energy/1": ([-9.0, -8.0, -6.0], [-4.0, -3.0], [-5.0, -2.0]),
}
RUN = {
    "mode": "CMG-energy",
    "seed": 1,
    "margins": {"m_in": -8.5, "m_out": -3.5},
    "validated_step": None,
    "curve": [
        {"step": step, "accuracy": 0.9, "auroc": {"held-out-classes": value}, "validation_auroc": None}
        for step, value in ((0, 0.7), (20, 0.9), (24, 1.0))
    ],
}
FORMER_CONFIG = {  # as `asdict` gave it, and what was to be tuned
    "num_ind": 6,
    "sigma": 3.0,
    "epochs": 60,
    "batch_size": 128,
    "learning_rate": 1e-4,
    "check_every": 20,
    "mixing": {"kind": "coin", "probability": 0.5},
    "pseudo_batch_size": None,
    "mu": 0.1,
    "loss_energy": "all",
    "score_energy": "ind",
    "ind_quantile": 0.2,
    "pseudo_quantile": 0.8,
    "anchor": 0.0,
    "pseudo_pool": 0,
    "precision": "fp32",
    "tune": "head",
}
CONFIG = json.loads(json.dumps(asdict(FineTuneConfig(num_ind=6, sigma=3.0, epochs=60, eval_every=20))))
ABOUT = {
    "task": "same_dataset_digits",
    "command": "python -m reproduce",
    "jobs": 1,
    "done": 1,
    "wall_seconds": 1.0,
    "job_seconds": 1.0,
    "environment": {"torch": "2"},
    "images": {"IND test": 3},
}


def evaluated(at: str, config: dict) -> dict:
    """What eval writes, where `at` is what the step before fine-tuning is called."""

    def row(method: str, seed: int | None, step: str, auroc: float) -> dict:
        ind, _, ood = SCORES[f"{method}/{seed or '-'}"]
        rest = detection_metrics(torch.tensor(ind), torch.tensor(ood)) if step != "max" else {}
        return (
            {
                "method": method,
                "ood_dataset": "held-out-classes",
                "seed": seed,
                "at": step,
            }
            | rest
            | {"auroc": auroc}
        )

    ind = [{"method": "classifier", "seed": None, "at": at, "accuracy": 0.9, "ece": 0.05}]
    return {name: ABOUT[name] for name in ("task", "images", "environment")} | {
        "partition": "partition1",
        "seeds": [1],
        "config": config,
        "detection": [
            row("MSP", None, at, 5 / 6),
            row("energy", None, at, 5 / 6),
            row("CMG-energy", 1, "last", 1.0),
            row("CMG-energy", 1, "max", 1.0),
        ],
        "ind": [*ind, {"method": "CMG-energy", "seed": 1, "at": "last", "accuracy": 0.95, "ece": 0.04}],
        "runs": [RUN],
    }


def changes(at: str, config: dict) -> dict:
    """What the ablations write: the method, three values of sigma, another mixing."""
    whole = evaluated(at, config)
    kept = {key: [row for row in whole[key] if row["at"] != at] for key in ("detection", "ind")} | {"runs": [RUN]}
    variants = {
        variant: copy.deepcopy({"config": config | {"sigma": sigma}, "seconds": 2.0} | kept)
        for variant, sigma in (("", 3.0), ("--sigma 1", 1.0), ("--sigma 5", 5.0), ("--mixing-probability 0.9", 3.0))
    }
    return {"config": config, at: whole["detection"][:2], "variants": variants}


def write(folder: Path, at: str, config: dict) -> tuple[JobResult, Path]:
    """Both files of eval, read again, and the file of the ablations."""
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps(evaluated(at, config)))
    (folder / "ablations.json").write_text(json.dumps(changes(at, config)))
    arrays = {}
    for detector, sets in SCORES.items():
        step = "last" if detector.startswith("CMG") else at
        for name, values in zip(("IND test", "pseudo-OOD", "held-out-classes"), sets, strict=True):
            arrays |= {f"{detector}/{step}/{name}": np.array(values)} if values else {}
    np.savez_compressed(folder / "scores.npz", **arrays)
    return read_result("partition1", 1, folder / "eval.json", folder / "scores.npz"), folder / "ablations.json"


@pytest.fixture
def former(tmp_path) -> tuple[JobResult, Path]:
    return write(tmp_path / "former", "untouched", FORMER_CONFIG)


@pytest.fixture
def todays(tmp_path) -> tuple[JobResult, Path]:
    return write(tmp_path / "todays", "pretrained", CONFIG)


def test_a_former_result_reads_as_one_of_today(former, todays):
    (result, _), (expected, _) = former, todays
    assert result.content == expected.content
    assert result.scores.keys() == expected.scores.keys() and len(result.scores) == 7
    assert all(np.array_equal(result.scores[name], expected.scores[name]) for name in expected.scores)
    assert result.of("MSP", "pretrained", "held-out-classes")[0].tolist() == [0.25, 0.4]


def test_a_former_result_gives_its_table(former, todays, tmp_path):
    written = {}
    for name, (result, ablations) in {"former": former, "todays": todays}.items():
        folder = tmp_path / f"{name}_report"
        report.write_report(folder, ABOUT, [result], "First of all.", None, ablations)
        written[name] = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
    assert written["former"] == written["todays"]
    table = written["former"][Path("table.md")].decode()
    for line in (
        "| CMG-energy | last | 100.00 | 0.00 | 100.00 | 100.00 | 1 |",
        "| MSP | pretrained | 83.33 | 33.33 | 83.33 | 91.67 | 1 |",
        "pretrained: the classifier before fine-tuning.",
        "| classifier | pretrained | 90.00 | 5.00 |",
        "| --sigma 5 | 100.00 |",
    ):
        assert line in table, line
    assert "untouched" not in table
    pictures = {path.name for path in written["former"] if path.suffix == ".png"}
    assert pictures == {"scores_CMG-energy.png", "roc.png", "steps.png", "sigma.png", "mixing-probability.png"}


def test_former_and_new_results_go_into_one_table(former, todays):
    rows = {(row["method"], row["at"]): row["auroc"]["n"] for row in detection_summary([former[0], todays[0]])}
    assert rows == {("CMG-energy", at): 2 for at in ("last", "max")} | {(m, "pretrained"): 2 for m in ("MSP", "energy")}


def test_former_ablations_give_their_table(former, todays):
    former, todays = (with_todays_names(json.loads(path.read_text())) for _, path in (former, todays))
    assert former == todays and ablate.table(former) == ablate.table(todays)
    lines = ablate.table(former).splitlines()
    assert lines[2].startswith("| the method | CMG-energy | 70.00 | 100.00 (24) | - | 100.00 | 95.00 |")
    assert lines[-1].startswith("| pretrained classifier | energy | 83.33 |")


@pytest.mark.parametrize(
    ("former", "today"),
    [
        ({"mixing": {"kind": "weight", "probability": 0.5}}, {"mixing": "mixup"}),
        (
            {"mixing": {"kind": "none", "probability": 0.9}},
            {"mixing": "none", "mixing_probability": 0.9},
        ),
        ({"score_energy": "all"}, {"score": "energy-all"}),
        ({"ind_quantile": 0.95, "pseudo_quantile": 0.05}, {"margins": [0.95, 0.05]}),
        ({"check_every": 7, "tune": "joint"}, {"eval_every": 7, "tune": "joint"}),
    ],
)
def test_a_former_configuration_has_todays_fields(former, today):
    assert with_todays_names({"config": FORMER_CONFIG | former})["config"] == CONFIG | today


def test_what_has_todays_names_stays_as_it_is():
    content = evaluated("pretrained", CONFIG)
    assert with_todays_names(content) is content and with_todays_names({}) == {}
    assert with_todays_keys({"MSP/-/pretrained/IND test": 1}) == {"MSP/-/pretrained/IND test": 1}
    # A folder of OOD images may be called as the step was.
    assert with_todays_keys({"MSP/-/untouched/untouched": 1}) == {"MSP/-/pretrained/untouched": 1}
