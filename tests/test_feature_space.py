"""Class mixing in feature space: the CVAE of features, its training, and stage 2 with it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import cmg.evaluate
import eval as evaluate
import figure.samples
import reproduce
import train
from cmg.config import FineTuneConfig
from cmg.data import FeatureBank
from cmg.pseudo_ood import PseudoOOD, decode, draw_codes
from cmg.stage2 import Stage2, split_model
from datasets.datasetsHelper import Images
from datasets.tasks import TASKS, Experiment
from models.feature_vae import FeatureCVAE
from reproduction import ablations, launchers
from tests.commands import error_of, run
from tests.test_reproduce import run_here
from training.stages import STAGES
from training.train_cvae import CVAEObjective, kl_divergence
from training.train_feature_cvae import evaluate_feature_cvae, little_explained
from utils import generator, load_checkpoint

CONFIG = FineTuneConfig(num_ind=6, sigma=2.0)


@pytest.fixture
def vae() -> FeatureCVAE:
    torch.manual_seed(0)
    return FeatureCVAE(128).eval().requires_grad_(False)


# --- the network --------------------------------------------------------------------------------


def test_features_are_standardised_and_brought_back(vae):
    features = torch.randn(500, 128) * torch.arange(128) + 3  # the first is constant
    vae.standardise.fit(features)
    inside = vae.standardise(features)
    assert inside[:, 1:].mean(0).abs().max() < 1e-5 and (inside[:, 1:].std(0, correction=0) - 1).abs().max() < 1e-5
    assert torch.equal(inside[:, 0], torch.zeros(500))
    z, embedding = torch.randn(7, 32), torch.randn(7, 32)
    plain = vae.decoder(torch.cat([z, embedding], 1))
    torch.testing.assert_close(vae.standardise(vae.decode(z, embedding)), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.encode(features)[0], vae.fc_mean(vae.encoder(inside)))


def test_features_that_do_not_vary_are_explained_to_no_part(vae):
    metrics = evaluate_feature_cvae(vae, Images(torch.zeros(5, 128), torch.zeros(5, dtype=torch.long)), 6, "fp32")
    assert metrics["explained"] == 0.0


def test_the_loss_is_of_standardised_features(vae):
    features, labels, noise = torch.randn(9, 128) * 4 + 1, torch.arange(9) % 6, torch.randn(9, 32)
    vae.standardise.fit(features)
    found = CVAEObjective(kl_weight=0.5)(vae, features, labels, noise)
    made, mean, logvar = vae(features, labels, noise)
    mse = F.mse_loss(vae.standardise(made), vae.standardise(features))
    expected = mse + 0.5 * kl_divergence(mean, logvar).mean() / 128
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("scale", "explained"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.75)])
def test_the_share_of_variance_explained(vae, scale, explained):
    features = torch.randn(50, 128) * 3 + 2
    vae.standardise.fit(features)

    class Known(FeatureCVAE):
        def encode(self, features):
            return torch.arange(len(features))[:, None].expand(-1, 32).float(), torch.zeros(len(features), 32)

        def decode(self, z, embedding):
            return self.standardise.inverse(scale * self.standardise(features[z[:, 0].long()]))

    known = Known(128)
    known.load_state_dict(vae.state_dict())
    metrics = evaluate_feature_cvae(known, Images(features, torch.zeros(50, dtype=torch.long)), 6, "fp32")
    assert metrics["explained"] == pytest.approx(explained, abs=1e-6)
    remark = little_explained(metrics)
    assert remark == "" if explained >= 0.75 else remark.startswith("The generator explains 0 % of the variance")


# --- stage 2 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["head", "last-layer"])
def test_what_is_made_does_not_pass_the_extractor(digits_classifier, vae, tune):
    def images(part):
        raise AssertionError("the extractor was asked")

    split = split_model(digits_classifier, tune)._replace(features=images)
    stage2 = Stage2.of(split, vae, replace(CONFIG, tune=tune))
    codes = draw_codes(20, 32, CONFIG, generator(1, "x"))
    expected = decode(vae, codes, 2.0)
    if tune == "last-layer":
        expected = digits_classifier.classifier.hidden(expected)
    torch.testing.assert_close(stage2.pseudo.encode(codes), expected)


def test_residuals_of_ind_training_images_are_added(digits_classifier, vae):
    """Each pseudo-OOD feature gets that of one image, wherever a batch begins."""
    draw = torch.Generator().manual_seed(1)
    features, labels = torch.randn(50, 128, generator=draw), torch.arange(50) % 6
    bank = FeatureBank(features, labels, features[:0], features[:6], labels[:6], {})
    mean, _ = vae.encode(features)
    residuals = features - vae.decode(mean, vae.embed(labels))
    stage2 = Stage2.of(split_model(digits_classifier, "head"), vae, replace(CONFIG, residuals=4.0))
    pseudo, _ = stage2.source_for(bank)
    codes = pseudo.draw(2000, generator(1, "x"))
    added = pseudo.encode(codes) - decode(vae, codes, 2.0)
    distances = torch.cdist(added, 4 * residuals, compute_mode="donot_use_mm_for_euclid_dist")
    distance, of = distances.min(1)
    assert distance.max() < 1e-3 and sorted(of.unique().tolist()) == list(range(50))
    assert torch.bincount(of).max() < 80  # of 40 expected
    torch.testing.assert_close(pseudo.encode(codes.rows(700, 900)), pseudo.encode(codes)[700:900])
    plain = draw_codes(2000, 32, CONFIG, generator(1, "x"))
    assert all(torch.equal(*pair) for pair in zip(codes[:4], plain[:4], strict=True))


@pytest.mark.parametrize("tune", ["head", "last-layer"])
@pytest.mark.parametrize("asked", [{"residuals": 4.0}, {"least_explained": 0.5}], ids=str)
def test_residuals_need_a_cvae_of_the_features_that_are_tuned_on(digits_classifier, digits_cvae, vae, tune, asked):
    bank = FeatureBank(torch.zeros(5, 128), torch.arange(5), *[torch.empty(0)] * 3, {})
    config = replace(CONFIG, tune=tune, **asked)
    stage2 = Stage2.of(split_model(digits_classifier, tune), digits_cvae if tune == "head" else vae, config)
    with pytest.raises(ValueError, match=r"^residuals and least_explained need a CVAE of features, and tune head$"):
        stage2.source_for(bank)


def test_images_go_through_the_extractor_still(digits_classifier, digits_cvae):
    pseudo = PseudoOOD(digits_cvae, digits_classifier.features, CONFIG)
    codes = draw_codes(5, 32, CONFIG, generator(1, "x"))
    torch.testing.assert_close(pseudo.encode(codes), digits_classifier.features(decode(digits_cvae, codes, 2.0)))


def test_an_experiment_in_feature_space_has_values_of_its_own():
    digits = Experiment.of("same_dataset_digits", TASKS["same_dataset_digits"])
    features = digits.in_space("features")
    assert features.task.epochs == {"train_classifier": 60, "train_cvae": 200} and features.task.kl_weight == 1.0
    assert features.task.fine_tuning["sigma"] == 2.0 and digits.in_space("images") == digits
    assert features.checkpoint("train_cvae") == Path("ckpt/same_dataset_digits_partition1_cvae_features.pkl")
    assert features.checkpoint("train_classifier") == digits.checkpoint("train_classifier")


# --- commands -----------------------------------------------------------------------------------


SHORT = ("--epochs", 1, "--lr", "1e-6")  # too short to explain anything


def parsed(command, *argv: str):
    args = command.get_parser().parse_args(argv)
    args.argv = list(argv)
    return args


FEATURES = ("--command", "train_cvae", "--space", "features", "--device", "cpu")


def test_from_images_to_metrics(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    expected = "ckpt/same_dataset_digits_partition1_classifier.pkl: no such file; it should hold the classifier of"
    assert expected in error_of(capsys, train, *FEATURES)
    assert run(train, "--epochs", 2, "--device", "cpu") == 0
    assert run(train, *FEATURES, *SHORT) == 0
    out = capsys.readouterr().out
    assert "IND test images: explained " in out and "The generator explains" in out
    assert "is already complete" not in out and run(train, *FEATURES, *SHORT) == 0
    assert "is already complete" in capsys.readouterr().out
    argv = ("--space", "features", "--device", "cpu", "--epochs", 1, "--output", "r.json")
    assert run(evaluate, *argv) == 0
    out, results = capsys.readouterr().out, json.loads(Path("r.json").read_text())
    explained = results["generator"]["explained"]
    assert f"The generator explains {100 * explained:.0f} % of the variance" in out and explained < 0.75
    assert results["config"]["sigma"] == 2.0 and results["command"].startswith("python -m eval --space features")
    assert results["checkpoints"]["train_cvae"]["origin"]["space"] == "features"

    with monkeypatch.context() as patch:  # of features far from those it was trained on
        patch.setattr(cmg.evaluate, "evaluate_feature_cvae", lambda *_: {"explained": -math.inf, "kl_nats": math.inf})
        assert run(evaluate, *argv, "--output", "far.json") == 0
    assert json.loads(Path("far.json").read_text())["generator"] == {"explained": None, "kl_nats": None}
    assert "The generator explains -inf % of the variance" in capsys.readouterr().out

    assert "--tune joint trains the whole classifier" in error_of(capsys, evaluate, *argv, "--tune", "joint")
    assert "there are no images to draw" in error_of(capsys, figure.samples, "--space", "features")
    assert "is not the cvae of same_dataset_digits (lacks" in error_of(
        capsys, evaluate, "--params-dict-name2", "ckpt/same_dataset_digits_partition1_cvae_features.pkl"
    )
    taken = "ckpt/same_dataset_digits_partition1_classifier.pkl"
    for output in (["--params-dict-name", taken, "--restart"], ["--params-dict-name", "x", "--log", taken]):
        assert "it is read by this command; name another file" in error_of(capsys, train, *FEATURES, *output)
    joint = ("--space", "features", "--device", "cpu", "--epochs", 1, "--variant=--tune joint", "--output", "a.json")
    assert "--tune joint trains the whole classifier" in error_of(capsys, ablations, *joint)
    request, variants = ablations.read_arguments(parsed(ablations, "--space", "features"))
    assert "--tune joint" not in variants and "--tune joint" in ablations.read_arguments(parsed(ablations))[1]

    shutil.copy("ckpt/same_dataset_digits_partition1_classifier.pkl", "other.pkl")
    assert run(evaluate, *argv, "--params-dict-name", "other.pkl") == 0  # the same classifier
    assert (
        run(train, "--epochs", 1, "--seed", 5, "--params-dict-name", "other.pkl", "--restart", "--device", "cpu") == 0
    )
    error = error_of(capsys, evaluate, *argv, "--params-dict-name", "other.pkl")
    assert error.endswith("--command train_cvae --restart --classifier other.pkl")
    assert run(train, "--epochs", 1, "--restart", "--device", "cpu") == 0
    error = error_of(capsys, evaluate, *argv)
    assert "was trained on the features of another classifier than" in error and "--space features" in error
    assert "made with other options (classifier was" in error_of(capsys, train, *FEATURES, *SHORT)


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(train, "--epochs", 1, "--device", "cpu") == 0
    stage, steps = STAGES["train_feature_cvae"], iter(range(10**6))

    class Interrupted(CVAEObjective):
        def __call__(self, *args):
            if next(steps) == 15:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(*args)

    with monkeypatch.context() as patch:
        patch.setitem(STAGES, "train_feature_cvae", replace(stage, objective=lambda task: Interrupted(task.kl_weight)))
        assert run(train, *FEATURES, "--epochs", 2, "--params-dict-name", "parts") == 143
    assert run(train, *FEATURES, "--epochs", 2, "--params-dict-name", "parts") == 0
    assert "resuming at epoch 2" in capsys.readouterr().out
    assert run(train, *FEATURES, "--epochs", 2, "--params-dict-name", "whole") == 0
    parts, whole = (load_checkpoint(Path(name)) for name in ("parts", "whole"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole) and list(parts) == list(whole)


def test_reproduce_trains_the_cvae_on_its_own_classifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launchers, "run_local", run_here)
    few = "--epochs 1 --val-fraction 0.9"
    argv = ["--space", "features", "--partitions", "partition2", "--seeds", 1, "--device", "cpu"]
    argv += [f"--classifier-args={few}", f"--cvae-args={few}", "--eval-args=--epochs 1"]
    assert run(reproduce, *argv) == 0
    folder = Path("results/same_dataset_digits_features")
    results = json.loads((folder / "partition2_seed1" / "eval.json").read_text())
    assert "explained" in results["generator"] and (folder / "report.html").is_file()
    recorded = json.loads((folder / "partition2_seed1" / "done.json").read_text())["train_cvae"]["argv"]
    assert recorded[-2:] == ["--classifier", str(folder / "partition2_seed1" / "classifier.pkl")]
