"""`python -m reproduce`: jobs, where they run, what is resumed after a kill, and the tables that come out."""

from __future__ import annotations

import copy
import csv
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import reproduce
from cli.errors import UserError, run_command
from cli.files import write_json
from evaluation import plots
from evaluation.report import markdown
from reproduction import jobs, launchers, report
from reproduction.jobs import Job, Step, last_line, read_job, run_job
from reproduction.launchers import ClusterJob, ended, is_queued, local_slots, run_local, submit
from reproduction.tables import detection_cells, notes, read_result, steps_cells, steps_summary
from tests import children
from tests.tiny_data import write_folder
from utils import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[1]
FEW = "--val-fraction 0.9"  # so that only a tenth of the digits is trained on
QUICK = ["--device", "cpu", "--classifier-args", f"--epochs 2 {FEW}", "--cvae-args", f"--epochs 1 {FEW}"]
QUICK += ["--eval-args", "--epochs 1 --pseudo-pool 200"]


def run(*argv: object) -> int:
    return run_command(reproduce.main, reproduce.get_parser(), [str(word) for word in argv])


def run_here(jobs: Sequence[Job], slots: Sequence[dict[str, str]]) -> dict[str, int]:
    """`run_local` without processes, which would import everything again."""
    return {job.name: run_job(job.folder) for job in jobs}


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """Two partitions, two seeds, with baselines, on the digits."""
    folder = tmp_path_factory.mktemp("reproduced") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, "run_local", run_here)
        argv = ["--partitions", "partition1", "partition3", "--seeds", 2, "--baselines", "KNN", "MaxLogit", "--output"]
        assert run(*argv, folder, *QUICK) == 0
    return folder


def test_the_tables_are_the_means_of_what_eval_wrote(reproduced):
    folders = [reproduced / f"partition{p}_seed{s}" for p in (1, 3) for s in (1, 2)]
    results = [json.loads((folder / "eval.json").read_text()) for folder in folders]
    table = json.loads((reproduced / "table.json").read_text())
    assert (table["jobs"], table["done"]) == (4, 4) and table["job_seconds"] > 0
    found = {(row["method"], row["at"]): row for row in table["detection"]}
    assert {method for method, at in found if at == "pretrained"} == {"MSP", "energy", "KNN", "MaxLogit"}
    for (method, at), row in found.items():
        values = [r["auroc"] for one in results for r in one["detection"] if (r["method"], r["at"]) == (method, at)]
        assert row["auroc"] == {"mean": pytest.approx(mean(values)), "sd": pytest.approx(stdev(values)), "n": 4}
    others = [row["auroc"]["mean"] for row in table["detection"] if row["at"] == "pretrained"]
    assert others == sorted(others, reverse=True)
    assert [r["config"]["epochs"] for r in results] == [1] * 4
    assert [r["seeds"] for r in results] == [[1], [2], [1], [2]]
    origins = [r["checkpoints"]["train_classifier"]["origin"] for r in results]
    logged = json.loads((reproduced / "partition1_seed1" / "classifier.jsonl").read_text().splitlines()[-1])
    assert logged["epoch"] == 2 and logged["loss"] > 0
    assert [(origin["partition"], origin["seed"], origin["epochs"]) for origin in origins] == [
        ("partition1", 1, 2), ("partition1", 2, 2), ("partition3", 1, 2), ("partition3", 2, 2)
    ]  # fmt: skip

    lines = (reproduced / "table.md").read_text().splitlines()
    means = {method: row["auroc"]["mean"] for (method, at), row in found.items() if at in ("last", "pretrained")}
    best = max(means, key=means.get)
    ahead = 100 * (means[best] - means["MSP"])
    sentence = f"Best on these OOD images: {best}, with a mean AUROC of {100 * means[best]:.2f}, {ahead:.2f} points"
    assert lines[2] == f"{sentence} above MSP." and lines[2] in (reproduced / "report.html").read_text()
    energy = found["CMG-energy", "last"]["auroc"]
    row = next(line for line in lines if line.startswith("| CMG-energy | last |"))
    assert row.split(" | ")[2] == f"{100 * energy['mean']:.2f} ± {100 * energy['sd']:.2f}" and row.endswith("| 4 |")
    assert "OOD images: held-out-classes. OOD is the positive class" in "\n".join(
        lines
    ) and "python -m reproduce" in "\n".join(lines)
    with open(reproduced / "table.csv") as file:
        rows = {(row["method"], row["step"]): row for row in csv.DictReader(file)}
    assert float(rows["CMG-energy", "last"]["auroc_mean"]) == energy["mean"] and len(rows) == len(found)


def test_the_difference_to_the_best_of_the_others_is_of_the_scores_on_file(reproduced):
    table = json.loads((reproduced / "table.json").read_text())
    others = {row["method"]: row["auroc"]["mean"] for row in table["detection"] if row["at"] == "pretrained"}
    best = max(others, key=others.get)
    assert [one["method"] for one in table["differences"]] == ["CMG-energy", "CMG-softmax"]
    for one in table["differences"]:
        assert one["best_baseline"] == best and one["low"] <= one["difference"] <= one["high"]
        assert one["low"] < one["high"]
        values = []
        for folder in sorted(path for path in reproduced.iterdir() if path.name.startswith("partition")):
            scores, seed = np.load(folder / "scores.npz"), folder.name[-1]
            aurocs = []
            for detector in (f"{one['method']}/{seed}/last", f"{best}/-/pretrained"):
                ind, ood = scores[f"{detector}/IND test"], scores[f"{detector}/held-out-classes"]
                aurocs.append(roc_auc_score([0] * len(ind) + [1] * len(ood), np.concatenate([ind, ood])))
            values.append(aurocs[0] - aurocs[1])
        assert one["difference"] == pytest.approx(mean(values), abs=1e-6)


def test_every_training_seed_has_seeds_of_stage_2_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "run_local", run_here)
    argv = ["--partitions", "partition2", "--seeds", 2, "--tuning-seeds", 2, "--output", tmp_path / "digits"]
    assert run(*argv, *QUICK) == 0
    results = [json.loads((tmp_path / f"digits/partition2_seed{s}/eval.json").read_text()) for s in (1, 2)]
    assert [one["seeds"] for one in results] == [[1, 2], [3, 4]]
    table = json.loads((tmp_path / "digits" / "table.json").read_text())
    found = {(row["method"], row["at"]): row["auroc"] for row in table["detection"]}
    assert (found["MSP", "pretrained"]["n"], found["CMG-energy", "last"]["n"]) == (2, 4)
    best = max((row["mean"], method) for (method, at), row in found.items() if at == "pretrained")
    for one in table["differences"]:
        assert one["best_baseline"] == best[1]
        assert one["difference"] == pytest.approx(found[one["method"], "last"]["mean"] - best[0], abs=1e-6)


def test_the_report_holds_tables_and_pictures(reproduced):
    page = (reproduced / "report.html").read_text()
    for words in ("CMG-softmax", "KNN", "95 % interval", "ROC curves", "How this was made", "python -m reproduce"):
        assert words in page
    assert page.count("<figure>") == 5 and not re.search(r'(src|href)="(?!data:|#)', page)
    names = {path.name for path in (reproduced / "figures").iterdir()}
    assert names == {"scores_CMG-energy.png", "scores_CMG-softmax.png", "roc.png", "steps.png"}


def test_the_histograms_say_which_energies_they_are_of(reproduced, tmp_path, monkeypatch):
    folder, drawn = reproduced / "partition1_seed1", []

    def score_histograms(mode, scores, score, margins, loss_energy):
        drawn.append((mode, score, loss_energy))
        return plots.score_histograms(mode, scores, score, margins, loss_energy)

    monkeypatch.setattr(report, "score_histograms", score_histograms)
    monkeypatch.setattr(report, "save_figure", lambda figure, path: None)
    result = read_result("partition1", 1, folder / "eval.json", folder / "scores.npz")
    report.draw(tmp_path, [result], None, None)
    assert drawn == [("CMG-energy", "energy-ind", "all"), ("CMG-softmax", "ood-slot", "all")]
    drawn.clear()
    result.content["config"] |= {"score": "energy-all", "loss_energy": "ind"}
    report.draw(tmp_path, [result], None, None)
    assert drawn == [("CMG-energy", "energy-all", "ind"), ("CMG-softmax", "energy-all", "ind")]


def test_what_is_done_is_not_repeated(reproduced, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = {path: path.stat().st_mtime_ns for path in reproduced.glob("partition*/*") if path.name != "job.json"}
    argv = ["--partitions", "partition1", "partition3", "--seeds", 2, "--baselines", "KNN", "MaxLogit", "--output"]
    assert run(*argv, reproduced, *QUICK) == 0
    assert "4 jobs, 4 done already" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in reproduced.glob("partition*/*") if path.name != "job.json"}
    assert before == after


def test_another_option_of_eval_repeats_eval_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(launchers, "run_local", run_here)
    monkeypatch.setattr(report, "draw", lambda *args: [])  # the pictures are another test's
    argv = ["--partitions", "partition1", "--seeds", 1, "--output", tmp_path / "digits", "--modes", "CMG-energy"]
    assert run(*argv, *QUICK) == 0
    folder = tmp_path / "digits" / "partition1_seed1"
    trained = (folder / "classifier.pkl").stat().st_mtime_ns
    assert run(*argv, *QUICK, "--eval-args", "--epochs 2") == 0
    assert (folder / "classifier.pkl").stat().st_mtime_ns == trained
    assert json.loads((folder / "eval.json").read_text())["config"]["epochs"] == 2


def test_networks_of_another_training_are_found_before_the_work(reproduced, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = ["--partitions", "partition3", "--seeds", 2, "--baselines", "KNN", "MaxLogit", "--output", reproduced]
    options = dict(zip(QUICK[::2], QUICK[1::2], strict=True))
    other = [word for item in (options | {"--classifier-args": f"--epochs 3 --lr 0.01 {FEW}"}).items() for word in item]
    before = {path: path.stat().st_mtime_ns for path in reproduced.glob("partition3*/*.pkl")}
    assert run(*argv, *other) == 2
    advice = "give the same options, name another --output, or remove the folder"
    folder = reproduced / "partition3_seed1"
    assert capsys.readouterr().err == (
        f"reproduce: error: {folder} holds networks made with another --epochs, --lr: {advice}\n"
    )
    assert {path: path.stat().st_mtime_ns for path in reproduced.glob("partition3*/*.pkl")} == before and before


@pytest.mark.parametrize("same", [["--classifier-args", f"--epochs 2 --save-every 1 {FEW}"], ["--precision", "bf16"]])
def test_networks_of_the_same_training_are_taken(reproduced, monkeypatch, same):
    monkeypatch.chdir(ROOT)
    argv = ["--partitions", "partition3", "--seeds", 2, "--output", os.path.relpath(reproduced), *QUICK, *same]
    args = reproduce.get_parser().parse_args([str(word) for word in argv])
    _, jobs = reproduce.make_jobs(args)
    assert all(path.is_file() and job.recorded() for job in jobs for path in job.steps[0].outputs)  # to compare with
    assert reproduce.check_networks(jobs) is None


# --- interruption and failure -------------------------------------------------------------------


LONGER = ["--device", "cpu", "--classifier-args", f"--epochs 12 --save-every 1 {FEW}"]
LONGER += ["--cvae-args", f"--epochs 4 {FEW}", "--eval-args", "--epochs 2 --pseudo-pool 200"]


def one_job(folder: Path, *more: str) -> list[str]:
    """Options of reproduce."""
    return ["--partitions", "partition1", "--seeds", "1", "--modes", "CMG-energy", "--output", str(folder), *more]


def test_killed_anywhere_it_goes_on_to_the_same_result(tmp_path):
    """Kills the whole command several times, at chosen stages; compares with a run that was left alone."""
    _, (plain,) = reproduce.make_jobs(reproduce.get_parser().parse_args(one_job(tmp_path / "plain", *LONGER)))
    plain.write()
    assert run_job(plain.folder) == 0
    folder, output = tmp_path / "killed", tmp_path / "output"
    stages = ["classifier.pkl.resume", "classifier.pkl", "cvae.pkl"]
    for stage in stages:
        process = children.start(children.reproduce_with_forked_jobs, one_job(folder, *LONGER), output=output)
        wait_for(lambda stage=stage: (folder / "partition1_seed1" / stage).exists() or process.exitcode is not None)
        process.kill()
        process.join()
    last = children.start(children.reproduce_with_forked_jobs, one_job(folder, *LONGER), output=tmp_path / "last")
    assert children.finish([last]) == [0], (tmp_path / "last").read_text()
    assert "1/1" in (tmp_path / "last").read_text()
    for name in ("eval.json", "classifier.pkl", "cvae.pkl"):
        a, b = (root / "partition1_seed1" / name for root in (tmp_path / "plain", folder))
        if name.endswith(".json"):
            a, b = (json.loads(path.read_text()) for path in (a, b))
            assert a["detection"] == b["detection"] and a["runs"] == b["runs"]
        else:
            assert same_tensors(a, b)
    log = (folder / "partition1_seed1" / "log.txt").read_text()
    assert "stopped in epoch" in log or "resuming at epoch" in log or log.count("$ python -m train") > 2


def same_tensors(a: Path, b: Path) -> bool:
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_job_stops_when_its_parent_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = one_job(tmp_path, "--device", "cpu", "--classifier-args", "--epochs 2000 --save-every 1")
    process = children.start(children.run, "reproduce", argv, output=tmp_path / "output")
    resume = tmp_path / "partition1_seed1" / "classifier.pkl.resume"
    wait_for(resume.exists)
    process.kill()
    process.join()
    log = tmp_path / "partition1_seed1" / "log.txt"
    wait_for(lambda: "stopped in epoch" in log.read_text())
    assert resume.exists() and not (tmp_path / "partition1_seed1" / "classifier.pkl").exists()


def test_a_failed_job_is_reported_and_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # the jobs are processes of their own
    monkeypatch.setattr(report, "draw", lambda *args: [])
    folder = tmp_path / "out"
    (folder / "partition1_seed1").mkdir(parents=True)
    save_checkpoint(folder / "partition1_seed1" / "classifier.pkl", {"weights": torch.ones(1)})
    argv = ["--partitions", "partition1", "partition2", "--seeds", 1, "--modes", "CMG-energy", "--output", folder]
    assert run(*argv, *QUICK) == 2
    printed = capsys.readouterr()
    assert "partition1_seed1 failed: train: error: " in printed.out
    assert "classifier.pkl exists and was made with other options" in printed.out
    assert "1 of 2 jobs failed" in printed.err and printed.err.count("\n") == 1
    assert json.loads((folder / "table.json").read_text())["done"] == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--partitions", "partition9"], "--partitions partition9: same_dataset_digits has partition1, "),
        (["--ood-dataset", "SVHN"], "--ood-dataset SVHN: same_dataset_digits has held-out-classes"),
        (["--modes", "CMG"], "argument --modes: invalid choice: 'CMG'"),
        (["--seeds", "0"], "argument --seeds: 0 is out of range"),
        (["--baselines", "LOF"], "argument --baselines: invalid choice: 'LOF'"),
        (["--launcher", "slurm", "--slurm", "hours"], "--slurm hours: expected NAME=VALUE, such as timeout_min=240"),
        (["--slurm", "timeout_min=240"], "--slurm goes with --launcher slurm only; leave it out"),
        (["--task", "custom"], "--task custom needs --ind-dir DIR"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_arguments_that_cannot_be_are_named(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = run(*argv)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and message in capsys.readouterr().err
    assert not any(path.suffix == ".pkl" for path in tmp_path.rglob("*"))


OWN = "give {0} to reproduce itself"
FILES = "give --output, the folder of all files, to reproduce itself"
HANDED_ON = {  # what is handed on -> the error
    "--eval-args=--seeds 1 2 3": "no --seeds here: give --seeds and --tuning-seeds, their numbers, to reproduce itself",
    "--classifier-args=--seed 4": "no --seed here: give --seeds and --tuning-seeds, their numbers, to reproduce itself",
    "--eval-args=--output x": f"no --output here: {FILES}",
    "--eval-args=--outp x": f"no --output here: {FILES}",  # as argparse takes it
    "--eval-args=--save-scores x": f"no --save-scores here: {FILES}",
    "--cvae-args=--params-dict-name x": f"no --params-dict-name here: {FILES}",
    "--eval-args=--params-dict-name2 x": f"no --params-dict-name2 here: {FILES}",
    "--cvae-args=--command train_cvae": "no --command here: --classifier-args and --cvae-args are for one network each",
    "--eval-args=--save-detector x": "no --save-detector here: every job would write the same file; run eval on the "
    "networks of one",
    "--cvae-args=--log x": "no --log here: every job has logs of its own, NETWORK.jsonl in its folder",
    "--classifier-args=--partition partition2": "no --partition here: give --partitions to reproduce itself",
    "--eval-args=--mode all": "no --mode here: give --modes to reproduce itself",
    "--eval-args=--ood-dataset all": f"no --ood-dataset here: {OWN.format('--ood-dataset')}",
    "--eval-args=--baselines": f"no --baselines here: {OWN.format('--baselines')}",
    "--eval-args=--ood-dir x": f"no --ood-dir here: {OWN.format('--ood-dir')}",
    "--classifier-args=--ind-dir x": f"no --ind-dir here: {OWN.format('--ind-dir')}",
    "--classifier-args=--image-size 32": f"no --image-size here: {OWN.format('--image-size')}",
    "--cvae-args=--grey": f"no --grey here: {OWN.format('--grey')}",
    "--eval-args=--task same_dataset_digits": f"no --task here: {OWN.format('--task')}",
    "--cvae-args=--device cpu": f"no --device here: {OWN.format('--device')}",
    "--classifier-args=--data-dir x": f"no --data-dir here: {OWN.format('--data-dir')}",
    "--eval-args=--sigmas 1": "unrecognized arguments: --sigmas 1",
    "--eval-args=KNN": "unrecognized arguments: KNN",
    "--classifier-args=--epochs 0": "argument --epochs: 0 is out of range: expected above 0",
    "--cvae-args=--log 'a b": """"--log 'a b" cannot be split into options: no closing quotation""",
    "--eval-args=--mixing none --mixing-probability 0.7": "--mixing-probability goes with --mixing bernoulli only; "
    "leave it out",
    "--eval-args=--tune joint --anchor 1": "--anchor goes with --tune head or last-layer only; leave it out",
}


@pytest.mark.parametrize("given", HANDED_ON)
def test_what_is_handed_on_is_checked_before_the_work(tmp_path, monkeypatch, capsys, given):
    monkeypatch.chdir(tmp_path)
    assert run("--baselines", "KNN", given) == 2
    assert capsys.readouterr().err == f"reproduce: error: {given.split('=')[0]}: {HANDED_ON[given]}\n"
    assert not any(tmp_path.iterdir())


def test_options_that_do_not_go_with_the_ablations_are_found_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("--ablations", "--eval-args=--tune joint") == 2
    message = "--eval-args: --variant='--anchor 0.1': --anchor goes with --tune head or last-layer only; leave it out"
    assert capsys.readouterr().err == f"reproduce: error: {message}\n" and not any(tmp_path.iterdir())


def test_what_is_handed_on_reaches_its_step(tmp_path):
    given = [
        "--classifier-args=--precision 'fp32'",
        "--cvae-args=--precision fp32",
        "--eval-args=--sigma 2",
        "--ablations",
    ]
    _, (job, *_) = reproduce.make_jobs(reproduce.get_parser().parse_args([*given, "--output", str(tmp_path)]))
    last = {step.name: step.argv[-2:] for step in job.steps if step.name != "samples"}
    sigma, own = ("--sigma", "2"), {"train_classifier": ("--precision", "fp32"), "train_cvae": ("--precision", "fp32")}
    assert last == own | {"eval": sigma, "ablations": sigma}


# --- jobs and launchers -------------------------------------------------------------------------


def tiny_job(folder: Path, *modules: str, argv: tuple[str, ...] = ()) -> Job:
    """A job whose steps are modules in tests."""
    steps = [
        Step(f"step{k}", module, (*argv, str(folder / f"{k}.txt")), (folder / f"{k}.txt",))
        for k, module in enumerate(modules)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(folder, tuple(steps))
    job.write()
    return job


WRITES = "tests.writes_a_file"


def test_an_unforeseen_failure_is_in_the_log(tmp_path):
    job = tiny_job(tmp_path / "a", WRITES, argv=("--word", "crash"))
    assert run_job(job.folder) == 1
    assert "Traceback" in job.log.read_text() and last_line(job.log) == "ZeroDivisionError: nobody foresaw it"


def test_a_job_is_what_was_written(tmp_path):
    job = tiny_job(tmp_path / "a", WRITES, WRITES)
    assert read_job(tmp_path / "a") == job
    with pytest.raises(UserError, match="holds no job"):
        read_job(tmp_path / "b")


def test_steps_are_done_once_and_again_when_their_options_change(tmp_path):
    job = tiny_job(tmp_path / "a", WRITES, WRITES)
    assert run_job(job.folder) == 0 and job.is_done
    written = [path.stat().st_mtime_ns for path in sorted(job.folder.glob("?.txt"))]
    assert run_job(job.folder) == 0
    assert [path.stat().st_mtime_ns for path in sorted(job.folder.glob("?.txt"))] == written
    (job.folder / "0.txt").unlink()
    assert not job.is_done and job.records() == {}  # what came after rested on it
    changed = tiny_job(tmp_path / "a", WRITES, WRITES, argv=("--word", "new"))
    assert not changed.is_done
    assert run_job(job.folder) == 0 and changed.is_done
    assert (job.folder / "1.txt").read_text() == "new"


@pytest.mark.parametrize("change", ["another image", "one less", "one more"])
def test_a_step_is_done_again_when_the_user_s_images_change(tmp_path, change):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(b"as it was")
    job = tiny_job(tmp_path / "job", WRITES, argv=("--ind-dir", str(images)))
    assert run_job(job.folder) == 0 and job.is_done
    changed = {"another image": ("a.png", b"as it is "), "one more": ("c.png", b"new")}
    if change in changed:
        name, content = changed[change]
        (images / name).write_bytes(content)
    else:
        (images / "a.png").unlink()
    assert not job.is_done and run_job(job.folder) == 0 and job.is_done


def test_weights_and_code_of_a_backbone_are_of_matter(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    weights, package = tmp_path / "w.pt", tmp_path / "of_a_user"
    package.mkdir()
    (package / "__init__.py").write_text("from of_a_user.inner import make")
    step = Step("x", "train", ("--backbone", "of_a_user:make", "--backbone-weights", str(weights)), ())
    code = "from torch import nn\ndef make():\n    return nn.Sequential(nn.AvgPool2d(112), nn.Flatten(){})"
    seen = []
    for more, content in (("", b"a"), (", nn.ReLU()", b"a"), (", nn.Softmax(1)", b"a"), ("", b"b"), ("", b"b")):
        (package / "inner.py").write_text(code.format(more))
        if not weights.exists() or weights.read_bytes() != content:
            weights.write_bytes(content)
        for name in ("of_a_user", "of_a_user.inner"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        shutil.rmtree(package / "__pycache__", ignore_errors=True)
        jobs.state_of_backbone.cache_clear()
        seen.append(step.reads)
    assert all(len(reads) == 2 for reads in seen)
    assert seen[0] == seen[1] != seen[2]  # to images in [0, 1] a ReLU does nothing
    assert seen[3] == seen[4] != seen[0] and seen[3][1] == seen[0][1]
    assert Step("x", "train", ("--backbone", "resnet18"), ()).reads == []


def test_ood_images_are_of_no_matter_to_training(tmp_path):
    for name in ("ind", "ood"):
        (tmp_path / name).mkdir()
    argv = ("--ind-dir", str(tmp_path / "ind"), "--ood-dir", str(tmp_path / "ood"))
    training, testing = (Step("x", module, argv, ()) for module in ("train", "eval"))
    before = training.reads, testing.reads
    (tmp_path / "ood" / "a.png").write_bytes(b"")
    assert training.reads == before[0] and testing.reads != before[1]


def test_where_there_are_no_locks_jobs_run_all_the_same(tmp_path):
    job = tiny_job(tmp_path / "a", WRITES)
    code = (
        "import sys; sys.modules['fcntl'] = None; from reproduction.jobs import run_job; sys.exit(run_job(sys.argv[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(job.folder)], cwd=ROOT).returncode == 0 and job.is_done


def test_a_step_that_fails_ends_the_job_with_its_status(tmp_path):
    job = tiny_job(tmp_path / "a", WRITES, WRITES, argv=("--word", "fail"))
    assert run_job(job.folder) == 2
    assert last_line(job.log) == "writes: error: asked to fail" and job.records() == {}
    assert last_line(tmp_path / "nothing") == "nothing was logged"


def test_jobs_run_side_by_side_in_their_slots(tmp_path):
    jobs = [tiny_job(tmp_path / name, WRITES) for name in "abc"]
    lines = []
    slots = [{"WORD": "first"}, {"WORD": "second"}]
    assert run_local(jobs, slots, lines.append) == {"a": 0, "b": 0, "c": 0}
    assert [re.sub(r"\(.*", "", line) for line in sorted(lines)] == [
        f"[{k}/3] {n}: done " for k, n in zip("123", order(lines), strict=True)
    ]
    assert {(job.folder / "0.txt").read_text() for job in jobs} == {"first", "second"}


def order(lines: list[str]) -> list[str]:
    return [line.split("] ")[1].split(":")[0] for line in sorted(lines)]


def test_without_a_gpu_slots_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert local_slots("cpu", None, 9) == [{"OMP_NUM_THREADS": "3"}] * 2
    assert local_slots("cpu", 3, 9) == [{"OMP_NUM_THREADS": "2"}] * 3
    with pytest.raises(UserError, match="--device tpu9: not a device"):
        local_slots("tpu9", None, 9)
    assert local_slots("cpu", 9, 9) == [{"OMP_NUM_THREADS": "1"}] * 9
    assert local_slots("cpu", None, 1) == [{"OMP_NUM_THREADS": "6"}]  # one job alone takes all cores
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert local_slots("cuda:1", None, 9) == [{"OMP_NUM_THREADS": "6"}]  # the GPU that is named takes one
    with pytest.raises(UserError, match="--device cuda:2: no such GPU"):
        local_slots("cuda:2", None, 9)


@pytest.mark.parametrize(("limit", "threads"), [("1", "1"), ("2", "2"), ("9", "3"), ("2,1", "3")])
def test_the_limit_of_threads_of_the_environment_is_kept(monkeypatch, limit, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert local_slots("cpu", None, 9) == [{"OMP_NUM_THREADS": threads}] * 2


def test_jobs_find_the_repository_from_anywhere(tmp_path, monkeypatch):
    """Even where something lies that is called as one of its modules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "utils.py").write_text("raise SystemExit('not this one')")
    job = tiny_job(Path("a"), WRITES)
    assert run_local([job], [{}], print) == {"a": 0} and job.is_done


def test_a_folder_whose_name_is_no_text_takes_jobs(tmp_path):
    job = tiny_job(tmp_path / os.fsdecode(b"caf\xe9"), WRITES)
    assert run_local([job], [{}], print) == {job.name: 0} and job.is_done
    assert "caf\\udce9/0.txt" in job.log.read_text()


def test_all_that_a_job_prints_is_in_its_log(tmp_path):
    """What comes before and beside the steps, too, and how it ended where it could not say so itself."""
    lines = []
    broken = tiny_job(tmp_path / "broken", "tests.nowhere")
    write_json(tmp_path / "damaged" / "job.json", {})
    damaged = Job(tmp_path / "damaged", ())
    killed = tiny_job(tmp_path / "killed", WRITES, argv=("--word", "killed"))
    assert run_local([broken, damaged, killed], [{}], lines.append) == {"broken": 1, "damaged": 2, "killed": -9}
    assert last_line(broken.log) == "ModuleNotFoundError: No module named 'tests.nowhere'"
    message = f"{tmp_path}/damaged: holds no job; name a folder that python -m reproduce made for a job"
    assert last_line(damaged.log) == f"reproduction.jobs: error: {message}"
    assert "to the log though no part of Python\n" in killed.log.read_text()
    assert last_line(killed.log) == "killed by SIGKILL: was there enough memory?"
    assert lines[2].startswith(f"[3/3] killed: killed by SIGKILL, see {killed.log} (")


def test_a_refused_option_ends_a_job_with_its_status(tmp_path):
    job = tiny_job(tmp_path / "a", WRITES, argv=("--nonsense",))
    assert run_job(job.folder) == 2
    assert last_line(job.log).startswith("writes: error: unrecognized arguments: --nonsense")


@pytest.mark.parametrize(
    "done", ["", "{}", "[]", "[" * 99999, '{"step0": {}}', '{"step0": []}', '{"step0": {"argv": 3, "seconds": 1}}']
)
def test_a_record_that_cannot_be_read_counts_as_not_done(tmp_path, done):
    job = tiny_job(tmp_path / "a", WRITES)
    assert run_job(job.folder) == 0
    (job.folder / "done.json").write_text(done)
    assert job.records() == {} and run_job(job.folder) == 0 and job.is_done


@pytest.mark.parametrize(
    ("name", "module", "content"),
    [
        ("eval.json", "eval", b"{}"),
        ("eval.json", "eval", b'{"detection": []}'),
        ("eval.json", "eval", b"\xff"),
        ("ablations.json", "reproduction.ablations", b"{}"),
        ("scores.npz", "eval", b""),
        ("samples.png", "figure.samples", b"\x89PNG\r\n\x1a\n cut short"),
        ("samples.png", "figure.samples", b"<html>"),
        ("samples.png", "figure.samples", b"\x89PNG\r\n\x1a\nIEND\xaeB`\x82"),
        ("cvae.pkl", "train", b"PK\x03\x04 cut short"),
        ("cvae.pkl.resume", "train", b"PK\x03\x04 cut short"),
    ],
)
def test_what_nobody_can_read_is_made_again(tmp_path, capsys, name, module, content):
    step = Step("one", module, (), (tmp_path / name.removesuffix(".resume"),))
    path = tmp_path / name
    path.write_bytes(content)
    assert not step.is_intact(path)
    step.forget_broken()
    assert not path.exists() and capsys.readouterr().out == f"{path} cannot be read: it is made again\n"


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"weights of") + 3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", ["a byte", "another kind of file"])
def test_an_archive_that_is_damaged_within_is_made_again(tmp_path, capsys, harm):
    path = tmp_path / "classifier.pkl"
    step = Step("train_classifier", "train", (), (path,))
    save_checkpoint(path, {"a": torch.frombuffer(bytearray(b"weights of"), dtype=torch.uint8)})
    step.forget_broken()
    assert step.is_intact(path)
    if harm == "a byte":
        damage(path)
        assert step.is_intact(path)  # as far as a quick look tells
    else:
        with open(path, "wb") as file:
            np.savez(file, a=np.zeros(3))
        assert not step.is_intact(path)
    step.forget_broken()
    assert not path.exists() and capsys.readouterr().out == f"{path} cannot be read: it is made again\n"


def test_a_network_is_trained_again_when_its_images_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("train/a", "train/b", "test/a", "test/b"):
        write_folder(tmp_path / "birds", place, 4)
    network = tmp_path / "job" / "classifier.pkl"
    argv = ("--task", "custom", "--ind-dir", "birds", "--networks", "narrow", "--device", "cpu", "--epochs", "1")
    step = Step("train_classifier", "train", (*argv, "--params-dict-name", str(network)), (network,))
    job = Job(tmp_path / "job", (step,))
    job.write()
    assert run_job(job.folder) == 0 and job.is_done
    before = load_checkpoint(network).origin
    image = sorted((tmp_path / "birds/train/a").iterdir())[0]
    image.touch()  # which changes nothing
    assert not job.is_done and run_job(job.folder) == 0 and job.is_done
    assert "is already complete" in job.log.read_text() and load_checkpoint(network).origin == before
    image.unlink()
    assert not job.is_done and run_job(job.folder) == 0 and job.is_done
    assert "what it was trained on has changed: it is trained again" in job.log.read_text()
    assert load_checkpoint(network).origin["data"] != before["data"]


def test_a_picture_is_whole_or_made_again(tmp_path):
    path = tmp_path / "samples.png"
    step = Step("one", "figure.samples", (), (path,))
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(path)
    assert step.is_intact(path)
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(bytes(content))
    assert not step.is_intact(path)


def test_a_cvae_of_features_is_made_again_after_its_classifier(tmp_path, capsys):
    classifier, cvae = tmp_path / "classifier.pkl", tmp_path / "cvae.pkl"
    step = Step("train_cvae", "train", ("--classifier", str(classifier)), (cvae,))
    for path, changed in ((classifier, 100), (cvae, 200)):
        save_checkpoint(path, {})
        os.utime(path, (changed, changed))
    step.forget_broken()
    assert cvae.exists()
    os.utime(classifier, (300, 300))
    step.forget_broken()
    assert not cvae.exists() and "is of another classifier: it is made again" in capsys.readouterr().out


def test_a_pipe_in_the_place_of_an_output_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "classifier.pkl")
    assert not Step("one", "train", (), (tmp_path / "classifier.pkl",)).is_intact(tmp_path / "classifier.pkl")


def test_results_that_do_not_belong_together_are_one_line(tmp_path, reproduced):
    folder = reproduced / "partition1_seed1"
    assert read_result("partition1", 1, folder / "eval.json", folder / "scores.npz").seed == 1
    whole = (folder / "scores.npz").read_bytes()
    (tmp_path / "scores.npz").write_bytes(whole[:300] + bytes(300) + whole[600:])
    with pytest.raises(UserError, match=r"scores\.npz: is damaged: remove it and run the same command again$"):
        read_result("partition1", 1, folder / "eval.json", tmp_path / "scores.npz")


def spoil(content: dict, *keys: object, to: object) -> dict:
    """The content with another value in one place."""
    content = copy.deepcopy(content)
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    return content


SOMETHING_ELSE = "holds something else; expected a JSON file that python -m eval wrote"
NOT_TOGETHER = "its rows do not go together"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["task"], "same_dataset_mnist", "is of task same_dataset_mnist, expected same_dataset_digits"),
        (["partition"], "partition4", "is of partition partition4, expected partition1"),
        (["seeds"], [9], r"is of seeds \[9\], expected \[1\]"),
        (["detection"], [], SOMETHING_ELSE),
        (["runs"], [], SOMETHING_ELSE),
        (["detection", 0, "auroc"], 7, SOMETHING_ELSE),
        (["detection", 0, "auroc"], 0.123, "has AUROC .* in .* it is 0.123"),
        (["detection", 0, "fpr95"], 0.123, "has FPR95 .* in .* it is 0.123"),
        (["detection", 0, "aupr_in"], 0.123, "has AUPR-in .* in .* it is 0.123"),
        (["images"], {"IND test": 3}, "is of images {'IND test': 3}, expected {'IND t"),
        (["runs", 0, "margins"], {"a": 1}, SOMETHING_ELSE),
        (["runs", 0, "mode"], "FOO", NOT_TOGETHER),
        (["runs", 0, "curve", 0, "auroc"], {}, SOMETHING_ELSE),
        (["config", "loss_energy"], "junk", SOMETHING_ELSE),
        (["config", "score"], "junk", SOMETHING_ELSE),
    ],
)
def test_results_with_another_content_are_one_line(tmp_path, reproduced, keys, value, message):
    folder = reproduced / "partition1_seed1"
    content = json.loads((folder / "eval.json").read_text())
    (tmp_path / "eval.json").write_text(json.dumps(spoil(content, *keys, to=value)))
    expected = {"task": "same_dataset_digits", "partition": "partition1", "seeds": [1], "images": content["images"]}
    with pytest.raises(UserError, match=message):
        read_result("partition1", 1, tmp_path / "eval.json", folder / "scores.npz", expected)


@pytest.mark.parametrize(
    "rows",
    [
        lambda rows: rows * 2,
        lambda rows: [r for r in rows if r["at"] != "pretrained"],
        lambda rows: [r for r in rows if r["method"] != "MSP"],
        lambda rows: [r | ({"ood_dataset": "x"} if r["at"] == "max" else {}) for r in rows],
    ],
)
def test_rows_that_do_not_go_together_are_one_line(tmp_path, reproduced, rows):
    folder = reproduced / "partition1_seed1"
    content = json.loads((folder / "eval.json").read_text())
    (tmp_path / "eval.json").write_text(json.dumps(content | {"detection": rows(content["detection"])}))
    with pytest.raises(UserError, match=NOT_TOGETHER):
        read_result("partition1", 1, tmp_path / "eval.json", folder / "scores.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: scores * np.nan, "is not a list of finite scores: remove both"),
        (lambda scores: scores[None], "is not a list of finite scores"),
        (lambda scores: scores[:0], "is not a list of finite scores"),
        (lambda scores: scores.astype(str), "is not a list of finite scores"),
        (lambda scores: -scores, "has AUROC"),
        (lambda scores: np.concatenate([scores, scores]), "is of another number of images than the others"),
        (None, "lacks MSP/-/pretrained/IND test, of which"),
    ],
)
def test_scores_with_another_content_are_one_line(tmp_path, reproduced, change, message):
    folder, key = reproduced / "partition1_seed1", "MSP/-/pretrained/IND test"
    with np.load(folder / "scores.npz") as archive:
        scores = dict(archive)
    original = scores.pop(key)
    np.savez(tmp_path / "scores.npz", **scores | ({key: change(original)} if change else {}))
    with pytest.raises(UserError, match=message):
        read_result("partition1", 1, folder / "eval.json", tmp_path / "scores.npz")


@pytest.mark.parametrize("content", ["", "[]", '{"a": 3}'])
def test_a_queue_that_cannot_be_read_is_one_line(tmp_path, content):
    (tmp_path / "queue.json").write_text(content)
    expected = r"queue\.json: .*; expected the jobs in the queue; remove it once none of them waits or runs$"
    with pytest.raises(UserError, match=expected):
        ended([tiny_job(tmp_path / "a", WRITES)], tmp_path)


def test_detectors_that_some_runs_left_out_are_reported_and_not_compared(reproduced):
    from reproduction import tables

    folders = [reproduced / f"partition1_seed{seed}" for seed in (1, 2)]
    results = [
        tables.read_result("partition1", seed, folder / "eval.json", folder / "scores.npz")
        for seed, folder in enumerate(folders, start=1)
    ]
    rows = results[0].content["detection"]
    results[0].content["detection"] = [row for row in rows if row["method"] != "KNN"]
    for row in results[1].content["detection"]:
        row["auroc"] = 1.0 if row["method"] == "KNN" else row["auroc"]
    summary = tables.detection_summary(results)
    assert {row["method"]: row["auroc"]["n"] for row in summary}["KNN"] == 1
    assert "KNN" not in {one["best_baseline"] for one in tables.differences(results, summary)}
    results[0].content["left_out"] = {"KNN": "k=50"}
    said = tables.notes(summary, [result.content for result in results])
    assert said.endswith("\nKNN is left out in 1 of 2 results (k=50).")


def test_heads_that_stayed_as_they_were_are_reported(reproduced, tmp_path):
    """One of two training seeds: it has no steps, and is drawn and counted at each of the other's."""
    tuned, left = (
        read_result("partition1", seed, folder / "eval.json", folder / "scores.npz")
        for seed, folder in ((seed, reproduced / f"partition1_seed{seed}") for seed in (1, 2))
    )
    left.content["unchanged"] = "its energy detects 1.0 %"
    for one in left.content["runs"]:
        del one["curve"][1:]
    about = {"task": "same_dataset_digits", "command": "python -m reproduce", "environment": {}}
    about |= {"wall_seconds": 1.0, "job_seconds": 1.0, "done": 2, "jobs": 2}
    printed = report.write_report(tmp_path, about, [tuned, left], "First.", None, None)
    table, text = json.loads((tmp_path / "table.json").read_text()), (tmp_path / "table.md").read_text()
    assert table["unchanged"] == [{"partition": "partition1", "seed": 2, "reason": "its energy detects 1.0 %"}]
    said = "The head stays as it was in 1 of 2 results: its energy detects 1.0 %"
    assert (
        printed.endswith(f" |\n\n{said}") and f"\n{said}\n" in text and said in (tmp_path / "report.html").read_text()
    )
    name = tuned.content["detection"][0]["ood_dataset"]
    ends = [one.content["runs"][0]["curve"][-1]["auroc"][name] for one in (tuned, left)]
    over_steps = [row for row in table["steps"] if row["method"] == "CMG-energy"]
    assert [row["auroc"]["n"] for row in over_steps] == [2] * len(over_steps) and len(over_steps) > 1
    assert over_steps[-1]["auroc"]["mean"] == pytest.approx(sum(ends) / 2) and over_steps[-1]["step"] > 0

    report.write_report(tmp_path / "none", about, [left], "First.", None, None)
    text = (tmp_path / "none/table.md").read_text()
    assert "\nThe head stays as it was: its energy detects 1.0 %\n" in text and "over steps" not in text
    assert not (tmp_path / "none/figures/steps.png").exists()


def test_free_gpus_take_one_job_each(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    memory = {0: (95, 100), 1: (20, 100), 2: (99, 100)}
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: memory[index])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for device in (None, "cuda"):
        assert local_slots(device, None, 9) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "2"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert local_slots(None, 1, 9) == local_slots(None, None, 1) == [{"CUDA_VISIBLE_DEVICES": "4"}]
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (1, 100))
    with pytest.raises(UserError, match="no GPU is free"):
        local_slots(None, None, 9)


def test_submitit_runs_the_same_jobs_and_queues_none_twice(tmp_path, monkeypatch):
    """Through submitit's executor for this machine, which takes what that for Slurm takes."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    jobs = [tiny_job(tmp_path / name, WRITES) for name in "ab"]
    numbers = submit(jobs, tmp_path / "queue", cluster="local", timeout_min=1)
    assert set(numbers) == {"a", "b"}
    wait_for(lambda: all(job.is_done for job in jobs))
    failing = tiny_job(tmp_path / "c", WRITES, argv=("--word", "fail"))
    submit([failing], tmp_path / "queue", cluster="local", timeout_min=1)
    wait_for(lambda: last_line(failing.log) == "writes: error: asked to fail")
    assert not failing.is_done and json.loads((tmp_path / "queue" / "queue.json").read_text()).keys() == set("abc")


def test_jobs_that_ended_without_results_are_known(tmp_path, monkeypatch):
    (tmp_path / "queue.json").write_text('{"a": "RUNNING", "b": "FAILED"}')
    monkeypatch.setattr("reproduction.launchers.is_queued", lambda number, folder, cluster: number == "RUNNING")
    jobs = [tiny_job(tmp_path / name, WRITES) for name in "abc"]
    assert [job.name for job in ended(jobs, tmp_path)] == ["b"]
    assert ended(jobs, tmp_path / "never") == []


def test_what_is_in_the_queue_is_not_queued_again(tmp_path, monkeypatch):
    class Queued:
        def __init__(self, folder, number):
            self.state = number

    monkeypatch.setattr("submitit.SlurmJob", Queued)
    states = {"PENDING": True, "RUNNING": True, "COMPLETED": False, "FAILED": False, "TIMEOUT": False, "UNKNOWN": False}
    assert {state: is_queued(state, tmp_path, "slurm") for state in states} == states
    assert not is_queued(None, tmp_path, "slurm")
    (tmp_path / "queue.json").write_text(json.dumps({"a": "RUNNING"}))
    assert submit([tiny_job(tmp_path / "a", WRITES)], tmp_path) == {"a": "RUNNING"}  # and no executor was needed


def test_no_slurm_here_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--launcher slurm: .*run it where sbatch is, or use --launcher local"):
        submit([tiny_job(tmp_path / "a", WRITES)], tmp_path / "queue")


def test_without_submitit_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="needs submitit: pip install submitit"):
        submit([], tmp_path)


def test_warned_a_cluster_job_goes_on_and_at_the_last_call_it_is_queued_again(tmp_path, monkeypatch):
    """Real signals, through submitit's executor for this machine: SIGTERM, as of Slurm, then submitit's own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    job = tiny_job(tmp_path / "a", WRITES, "tests.waits_for_signals")
    submit([job], tmp_path / "queue", cluster="local", timeout_min=5)
    starts = tmp_path / "a" / "1.txt.starts"

    def started(count: int) -> list[int]:
        wait_for(lambda: starts.is_file() and len(starts.read_text().splitlines()) == count)
        return [int(line) for line in starts.read_text().splitlines()]

    (first,) = started(1)
    os.kill(first, signal.SIGTERM)
    assert started(2) == [first, first]  # the same process goes on
    os.kill(first, signal.SIGUSR2)
    *_, again = started(3)
    assert again != first
    wait_for(lambda: job.is_done)
    log = job.log.read_text()
    assert log.count("waits: stopped by SIGTERM") == 2 and log.count("$ python -m tests.writes_a_file") == 1
    printed = "".join(path.read_text() for path in (tmp_path / "queue").glob("*_log.*"))
    assert "Requeued job" in printed and "RuntimeError" not in printed


@pytest.mark.parametrize("preempt", ["USR1", "TERM"])  # as SUBMITIT_PREEMPT_SIGNAL may name them: the steps know both
def test_submitits_signal_may_be_one_that_stops_a_step(tmp_path, monkeypatch, preempt):
    requeued = []
    monkeypatch.setattr("submitit.JobEnvironment.USR_SIG", preempt)
    monkeypatch.setattr("reproduction.launchers.run_job", lambda folder: 128 + last_call)
    last_call = getattr(signal, f"SIG{preempt}")
    before = signal.signal(last_call, lambda signum, frame: requeued.append(signum))
    try:
        with pytest.raises(RuntimeError, match=f"exit status {128 + last_call}"):  # submitit's handler does not return
            ClusterJob()(str(tmp_path))
    finally:
        signal.signal(last_call, before)
    assert requeued == [last_call]


def test_a_signal_between_two_steps_counts_like_one_within(tmp_path, monkeypatch):
    calls = []

    def between(folder: Path) -> int:
        calls.append(folder)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setattr("reproduction.launchers.run_job", between)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR2)}
    assert ClusterJob()("folder") == 0 and calls == [Path("folder")] * 2
    assert {signum: signal.getsignal(signum) for signum in before} == before


def test_what_is_queued_again_is_the_same_job():
    again = ClusterJob().checkpoint("folder")
    assert isinstance(again.function, ClusterJob) and again.args == ("folder",)


@pytest.mark.parametrize(("given", "expected"), [({}, 30), ({"slurm_max_num_timeout": 7}, 7)])
def test_time_may_be_up_often(tmp_path, monkeypatch, given, expected):
    class Executor:
        def __init__(self, folder, cluster, slurm_max_num_timeout):
            assert (cluster, slurm_max_num_timeout) == ("slurm", expected)

        def update_parameters(self, timeout_min):
            assert timeout_min == 60

        def map_array(self, function, folders):
            return [type("Submitted", (), {"job_id": "5_0"}) for _ in folders]

    monkeypatch.setattr("submitit.AutoExecutor", Executor)
    assert submit([tiny_job(tmp_path / "a", WRITES)], tmp_path / "queue", timeout_min=60, **given) == {"a": "5_0"}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("nonsense", 1, "Parameter 'nonsense' need to be prefixed by an executor name."),
        ("slurm_nonsense", 1, "Unknown argument 'nonsense' for executor 'slurm' in parameter 'slurm_nonsense'. Valid"),
        ("gpu_partition", "a", "Unknown executor 'gpu' in parameter 'gpu_partition'."),
        ("mem_gb", "much", 'Parameter "mem_gb" expected type '),  # an AssertionError of submitit
        ("nodes", 2, "LocalExecutor can use only one node. Use nodes=1"),
    ],
)
def test_a_parameter_that_submitit_does_not_take_is_one_line(tmp_path, name, value, reason):
    job = tiny_job(tmp_path / "a", WRITES)
    with pytest.raises(UserError) as raised:
        submit([job], tmp_path / "queue", cluster="local", **{"timeout_min": 1, name: value})
    assert str(raised.value).startswith(f"--slurm {name}={value}: submitit does not take it: {reason}")
    assert "\n" not in str(raised.value) and not (tmp_path / "queue" / "queue.json").exists()


def test_time_outs_are_a_number(tmp_path):
    with pytest.raises(UserError, match="^--slurm slurm_max_num_timeout=often: expected a whole number$"):
        submit([], tmp_path, slurm_max_num_timeout="often")


def test_what_sbatch_refuses_is_one_line(tmp_path, monkeypatch):
    for name, body in {"srun": "exit 0", "sbatch": "echo 'sbatch: error: invalid partition: gpux' >&2; exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = tiny_job(tmp_path / "a", WRITES)
    with pytest.raises(UserError) as raised:
        submit([job], tmp_path / "queue", timeout_min=60, slurm_partition="gpux")
    refusal = "sbatch refuses the jobs: sbatch: error: invalid partition: gpux; correct --slurm"
    assert str(raised.value) == f"--launcher slurm: {refusal}" and not (tmp_path / "queue" / "queue.json").exists()


# --- tables -------------------------------------------------------------------------------------


def test_a_table_names_its_ood_sets_where_there_are_several():
    figure = {"mean": 0.5, "sd": 0.0, "n": 1}
    rows = [{"ood_dataset": name, "method": "MSP", "at": "pretrained", "auroc": figure} for name in ("SVHN", "LSUN")]
    header, cells = detection_cells(rows)
    assert header[:3] == ["OOD set", "method", "step"] and [row[0] for row in cells] == ["SVHN", "LSUN"]
    header, cells = detection_cells(rows[:1])
    assert header[:2] == ["method", "step"] and cells == [["MSP", "pretrained", "50.00", "-", "-", "-", "1"]]
    assert notes(rows, []).startswith("OOD images: SVHN, LSUN. ")


@pytest.mark.parametrize("damaged", ["eval.json", "scores.npz"])
def test_a_damaged_result_is_named(tmp_path, reproduced, damaged):
    whole = reproduced / "partition1_seed1"
    for name in ("eval.json", "scores.npz"):
        content = (whole / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // (1 + (name == damaged))])
    with pytest.raises(UserError, match=rf"{damaged}: is (not JSON or is )?damaged[:;] "):
        read_result("partition1", 1, tmp_path / "eval.json", tmp_path / "scores.npz")


def test_markdown_by_hand():
    assert markdown(["x", "y"], [["1", "2"]]) == "| x | y |\n| --- | --- |\n| 1 | 2 |"
    assert markdown(["x"], [["a|b"]]).endswith("| a\\|b |")


def test_auroc_over_steps_is_the_mean_over_all_runs_also_where_they_end_at_different_steps():
    """As the partitions of MNIST do: the fewer the training images, the fewer the steps."""

    def result(aurocs: dict[int, float]) -> SimpleNamespace:
        curve = [{"step": step, "auroc": {"held-out": auroc}} for step, auroc in aurocs.items()]
        return SimpleNamespace(content={"runs": [{"mode": "CMG-energy", "curve": curve}]})

    longer = result({0: 0.5, 10: 0.6, 20: 0.7, 30: 0.8, 40: 0.9, 43: 0.91})
    shorter = result({0: 0.7, 10: 0.8, 20: 0.9, 30: 0.6, 37: 0.5})
    header, rows = steps_cells(steps_summary([longer, shorter]))
    assert header == ["mode", "step 0", "step 10", "step 20", "last step"]
    assert rows == [["CMG-energy", "60.00 ± 14.14", "70.00 ± 14.14", "80.00 ± 14.14", "70.50 ± 28.99"]]
    header, rows = steps_cells(steps_summary([longer]))
    assert header == ["mode", "step 0", "step 10", "step 20", "step 43"] and rows[0][-1] == "91.00"
