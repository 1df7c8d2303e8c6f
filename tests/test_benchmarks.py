"""The benchmarks: what they measure with, and what they print."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import csi, measure, stage2
from benchmarks.measure import in_turn
from benchmarks.stage1 import PROFILE, in_own_process, shares_of_time
from cli.errors import Stopped, UserError, raise_stopped, run_command
from cmg.losses import MODES

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what is added to its list."""
    passed = []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: sum(passed))
    return passed


def test_medians_of_works_in_turn_without_the_first_round(clock):
    calls = []

    def work(name: str, *durations: float):
        left = iter(durations)
        return lambda: (calls.append(name), clock.append(next(left)))

    works = {"a": work("a", 100.0, 3.0, 1.0, 8.0), "b": work("b", 7.0, 0.5, 0.25, 0.75)}
    assert in_turn(works, 3, CPU) == {"a": 3.0, "b": 0.5}
    assert calls == ["a", "b"] * 4


def test_csi_prints_what_it_measured(monkeypatch, capsys):
    """With seconds of our choice, the whole step's and the network's by turns, after real work."""
    given = itertools.cycle([0.5, 0.4])
    monkeypatch.setattr(measure, "seconds", lambda work, device: (work(), next(given))[1])
    options = ["--batch-size", "10", "--repeats", "1", "--width", "2", "--device", "cpu", "--precision", "fp32"]
    assert run_command(csi.main, csi.get_parser(), options) == 0
    words, figures = capsys.readouterr().out.splitlines()
    assert words == "20.0 images/s, of whose time the network takes 80.0 %"
    figures = json.loads(figures)
    assert (figures["step_seconds"], figures["network_seconds"], figures["network_share"]) == (0.5, 0.4, 0.8)
    assert (figures["images_per_second"], figures["views_per_second"]) == (20.0, 160.0)
    assert (figures["batch_size"], figures["repeats"], figures["device"]) == (10, 1, "cpu")


def test_curves_are_compared_at_their_worst_check(capsys):
    """Of a plain side and an engine whose curves are given."""

    class Given:
        device = CPU
        data = SimpleNamespace(counts=lambda: {"IND training": 1621, "IND validation": 0, "IND test": 6031})

        def plain(self, modes, seeds):
            return 1.0, [0.5, 0.75, 0.875], 0

        def engine(self, modes, seeds, precision):
            return 1.0, [{"fp32": [0.5, 0.75, 0.875], "bf16": [0.5, 0.625, 0.9375]}[precision]], 0

    stage2.compare_curves(Given(), "bf16", seed=0)
    *table, last = capsys.readouterr().out.splitlines()
    assert table == [
        "1,621 IND training, 6,031 IND test, 3 evaluations",
        "",
        "| mode | auroc_first | auroc_last | auroc_difference_fp32 | auroc_difference_bf16 |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {mode} | 0.5 | 0.875 | 0 | 0.125 |" for mode in MODES),
    ]
    figures = json.loads(last)
    assert figures["evaluations"] == 3 and figures["device"] == "cpu"
    assert figures["curves"]["CMG-energy"]["auroc_difference_bf16"] == 0.125


def test_trained_networks_that_are_missing_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--trained", "partition2", "--data-dir", str(tmp_path), "--device", "cpu"]
    assert run_command(stage2.main, stage2.get_parser(), options) == 2
    assert "ckpt/same_dataset_mnist_partition2_classifier.pkl: no such file" in capsys.readouterr().err


def test_shares_of_time_are_those_of_the_parts():
    x = torch.randn(500, 500, requires_grad=True)
    shares = shares_of_time(lambda: torch.nn.functional.dropout((x @ x).relu(), 0.2).sum().backward(), CPU)
    assert list(shares) == [*PROFILE, "rest"] and sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert min(shares["products"], shares["activations"], shares["dropout"]) > 0
    assert shares["batch_norm"] == shares["optimizer"] == 0


def test_a_process_of_its_own_gives_its_result_or_its_end():
    assert in_own_process(os.getpid) not in (os.getpid(), None)
    with pytest.raises(UserError, match="^the process of 3 ended with status 3; see its message above$"):
        in_own_process(os._exit, 3)


def test_a_process_of_its_own_ends_when_this_one_is_stopped():
    before = signal.signal(signal.SIGALRM, raise_stopped)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1)
        with pytest.raises(Stopped, match="SIGALRM"):
            in_own_process(time.sleep, 600)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not multiprocessing.active_children()
