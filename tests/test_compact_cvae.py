"""The compact form of the CVAE: the ordinary network's training, with fewer weights."""

from __future__ import annotations

import copy
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from cli.errors import run_command
from models.vae import ConditionalVAE, PlainEncoder
from tests import children
from tests.test_loop import assert_same_network, finish
from training.compact_cvae import compact, expand, see
from training.stages import STAGES
from training.train_cvae import kl_divergence
from utils import load_checkpoint

SHAPES = [(4, 1), (8, 1), (8, 3), (12, 1), (28, 1), (32, 3)]  # image sizes and channels


@pytest.fixture
def build(monkeypatch):
    """A function that makes a CVAE with few hidden units, in float64."""
    monkeypatch.setattr("models.vae.CVAE_HIDDEN", 16)

    def build(size: int, channels: int) -> ConditionalVAE:
        torch.manual_seed(size)
        return ConditionalVAE(image_channels=channels, image_size=size).double()

    return build


def steps(vae: ConditionalVAE, size: int, channels: int, count: int = 6) -> list[float]:
    """The losses of some steps of Adam, under a rising learning rate; no latent is rounded to fp32."""
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(vae.parameters(), fused=True)
    losses = []
    for step in range(count):
        images = torch.rand(8, channels, size, size, dtype=torch.float64, generator=random)
        noise = torch.randn(8, 32, dtype=torch.float64, generator=random)
        mean, logvar = vae.encode(images)
        found = vae.decode(mean + noise * torch.exp(logvar / 2), vae.embed(torch.arange(8) % 6))
        loss = (found - images).square().mean() + kl_divergence(mean, logvar).mean() / images[0].numel()
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_training_it_is_training_the_ordinary_network(build, size, channels):
    ordinary = build(size, channels)
    before, small = copy.deepcopy(ordinary.state_dict()), copy.deepcopy(ordinary)
    compact(small)
    assert steps(small, size, channels) == pytest.approx(steps(ordinary, size, channels), rel=1e-12)
    expand(small)
    found = small.state_dict()
    for name, expected in ordinary.state_dict().items():
        moved = (expected - before[name]).abs().max()
        assert moved > 0 and (found[name] - expected).abs().max() < 1e-9 * moved, name


@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_untouched_it_expands_to_the_same_bits(build, size, channels):
    ordinary = build(size, channels).float()
    vae = copy.deepcopy(ordinary)
    compact(vae)
    assert sorted(vae.state_dict()) != sorted(ordinary.state_dict())
    expand(vae)
    assert list(vae.state_dict()) == list(ordinary.state_dict()) and isinstance(vae.convE, PlainEncoder)
    assert all(torch.equal(vae.state_dict()[name], tensor) for name, tensor in ordinary.state_dict().items())


def test_a_state_holds_the_initial_weights_too(build):
    vaes = [build(8, 1), build(8, 1)]
    with torch.no_grad():
        vaes[1].fcE.weight += torch.rand_like(vaes[1].fcE.weight)
    for vae in vaes:
        compact(vae)
    vaes[1].load_state_dict(vaes[0].state_dict())
    for vae in vaes:
        expand(vae)
    assert torch.equal(vaes[0].fcE.weight, vaes[1].fcE.weight)


@pytest.mark.parametrize("size", [4, 8, 12, 16, 20, 28, 32])
def test_live_outputs_and_kinds_are_those_of_the_convolutions(size):
    torch.manual_seed(0)
    encoder = PlainEncoder(1, size).double()
    outputs = see(encoder)
    with torch.no_grad():
        seen = encoder.conv1(torch.rand(2, 1, size, size, dtype=torch.float64)).relu()
        first, second = encoder.conv2(seen).flatten(2)
    torch.testing.assert_close((first - second).abs().amax(0) > 1e-12, outputs.live)
    assert torch.equal(outputs.kinds.sum(0) + outputs.live.long(), torch.ones(size**2, dtype=torch.long))
    values = [first[:, kind] for kind in outputs.kinds]
    assert all((value - value[:, :1]).abs().max() < 1e-12 for value in values)
    firsts = torch.stack([value[:, 0] for value in values]) if values else torch.zeros(0, 128)
    assert len(firsts.mul(1e9).round().unique(dim=0)) == len(outputs.kinds)


def test_mnist_has_a_sixth_of_the_columns():
    vae = ConditionalVAE()
    assert vae.fcE.in_features == 100_352
    before = sum(p.numel() for p in vae.parameters())
    initial = vae.fcE.weight.data_ptr()
    compact(vae)
    encoder = vae.convE
    assert encoder.live.shape == (1024, 100 * 128) and encoder.mean.shape == (1024, 128, 26)
    assert before - sum(p.numel() for p in vae.parameters()) == 1024 * (100_352 - 16_128)
    assert encoder.initial.data_ptr() == initial  # no second copy of them
    assert sum(buffer.numel() for buffer in vae.buffers()) < 3000  # which several processes exchange in every step


def test_other_networks_stay_as_they_are():
    for vae in (ConditionalVAE(image_channels=3, image_size=32, dataset="narrow"), torch.nn.Linear(1, 1)):
        modules = list(vae.modules())
        compact(vae)
        expand(vae)
        assert list(vae.modules()) == modules


def test_bf16_gives_what_the_ordinary_network_does(digits_cvae):
    vae, images = copy.deepcopy(digits_cvae), torch.rand(16, 1, 8, 8)
    compact(vae)
    with torch.no_grad():
        exact = torch.cat(digits_cvae.encode(images))
        with torch.autocast("cpu", torch.bfloat16):
            ordinary, found = torch.cat(digits_cvae.encode(images)), torch.cat(vae.encode(images))
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 1.5 * (ordinary - exact).abs().max()


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def digits(monkeypatch, tmp_path):
    """A function that trains the digits' CVAE with `train`; a signal comes in the step `stop`, counted from 0."""
    monkeypatch.chdir(tmp_path)
    stage = STAGES["train_cvae"]

    def run(*argv: str, stop: int | None = None, **changed) -> int:
        count = iter(range(10**6))

        def objective(task):
            inner = stage.objective(task)

            class Interrupted:
                draw = inner.draw

                def __call__(self, *args):
                    if next(count) == stop:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return inner(*args)

            return Interrupted()

        monkeypatch.setitem(STAGES, "train_cvae", replace(stage, objective=objective, **changed))
        return run_command(train.main, train.get_parser(), [*options("v"), *argv])

    return run


def options(file: object) -> list[str]:
    what = ["--command", "train_cvae", "--epochs", "2", "--params-dict-name", str(file), "--log", f"{file}.log"]
    return [*what, "--device", "cpu", "--precision", "fp32"]


def test_a_stopped_run_resumes_to_the_same_bits(digits, capsys):
    warm = ["--warmup", "15", "--val-fraction", "0.1"]
    assert digits(*warm, "--params-dict-name", "whole") == 0
    assert digits(*warm, stop=13) == 143
    state = load_checkpoint(Path("v.resume"))["model"]
    assert state["convE.live"].shape == (1024, 16 * 128) and state["convE.mean"].shape == (1024, 128, 17)
    assert digits(*warm) == 0
    assert "resuming at epoch 2" in capsys.readouterr().out
    assert_same_network("v", "whole")
    assert {name: t.shape for name, t in load_checkpoint(Path("v")).items()} == {
        name: t.shape for name, t in ConditionalVAE(image_size=8).state_dict().items()
    }


def test_the_command_ends_with_the_ordinary_networks_figures(digits, capsys):
    figures = []
    for changed in ({}, {"compact": lambda model: None}):
        assert digits("--restart", **changed) == 0
        words = capsys.readouterr().out.split("IND test images: ")[1].split()
        figures.append([float(word.strip(",")) for word in words[1:4:2]])
    assert figures[0] == pytest.approx(figures[1], rel=1e-2)


def test_a_state_of_the_ordinary_network_is_refused_in_one_line(digits, capsys):
    assert digits(stop=13, compact=lambda model: None) == 143
    capsys.readouterr()
    assert digits() == 2
    error = capsys.readouterr().err
    assert "v.resume: is not a state of this training (Error(s) in loading" in error and error.count("\n") == 1
    assert digits("--restart") == 0


def test_two_processes_train_as_one(digits, tmp_path):
    assert digits() == 0
    two = tmp_path / "two"
    assert finish(children.start_two(children.train, options(two), output=tmp_path / "output")) == [0, 0]
    losses = [[json.loads(line)["loss"] for line in open(f"{file}.log")] for file in ("v", two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert list(load_checkpoint(two)) == list(load_checkpoint(Path("v")))
