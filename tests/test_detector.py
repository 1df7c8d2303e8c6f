"""The saved detector: threshold, file, and the same scores as stage 2 gave."""

from __future__ import annotations

import pytest
import torch

import eval
from datasets.datasetsHelper import load_ind, to_float
from datasets.tasks import TASKS
from evaluation.detector import Detector, DetectorConfig, acceptance_threshold, load_detector
from evaluation.scores import SCORES
from models.main_model import MainModel
from training.train_classifier import build_classifier
from training.train_cvae import build_cvae
from utils import UserError, run_command, save_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, 1.0), (10, 10.0), (20, 19.0), (21, 20.0), (100, 95.0)],
)
def test_threshold_is_the_least_score_that_95_percent_do_not_exceed(count, expected):
    scores = torch.arange(count, 0, -1).double()
    threshold = acceptance_threshold(scores)
    assert threshold == expected
    assert (scores <= threshold).double().mean() >= 0.95
    assert (scores < threshold).double().mean() < 0.95


CONFIG = DetectorConfig(
    task="t", classes=(2, 3, 4), image_size=8, image_channels=1, logits=11, networks="mnist", score="CMG-softmax",
    threshold=0.25, threshold_from="IND test",
)  # fmt: skip


def test_a_saved_detector_scores_as_the_one_saved(tmp_path):
    model = MainModel(8, 1, 11, "mnist")
    detector = Detector(model, CONFIG)
    detector.save(tmp_path / "d.pt", {"command": "c"})
    loaded = load_detector(tmp_path / "d.pt", CPU)
    images = torch.rand(5, 1, 8, 8)
    assert loaded.config == CONFIG
    state, stored = model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(state[name], stored[name]) for name in state)
    with torch.no_grad():
        logits = model(images)
    # Memory layouts differ, and with them the order of sums.
    for found in (detector(images), loaded(images)):
        torch.testing.assert_close(found[0], SCORES["CMG-softmax"](logits, 3))
        assert torch.equal(found[1], logits[:, :3].argmax(1))


def test_the_head_is_in_fp32_under_autocast():
    """bf16 logits would have many images share a score."""
    torch.manual_seed(0)
    model = MainModel(8, 1, 11, "mnist")
    detector = Detector(model, CONFIG)
    images = torch.rand(64, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        features, (scores, _) = detector.network.features(images), detector(images)
        assert features.dtype == torch.bfloat16
    with torch.no_grad():
        expected = SCORES["CMG-softmax"](model.classifier(features.float()), 3)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)
    assert len(scores.unique()) == 64


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(2, 3, 8, 8), r"torch.float32 \[2, 3, 8, 8\]"),
        (torch.zeros(2, 1, 8, 9), r"torch.float32 \[2, 1, 8, 9\]"),
        (torch.zeros(2, 1, 8, 8).double(), r"torch.float64 \[2, 1, 8, 8\]"),
    ],
)
def test_other_images_are_refused(images, found):
    detector = Detector(MainModel(8, 1, 11, "mnist"), CONFIG)
    with pytest.raises(ValueError, match=rf"images are {found}, expected torch.float32 \[B, 1, 8, 8\]$"):
        detector(images)


def test_what_is_no_detector_is_refused(tmp_path):
    save_checkpoint(tmp_path / "d.pt", MainModel(8, 1, 11, "mnist").state_dict())
    with pytest.raises(UserError, match="is no detector. Make one with: python -m eval --mode MODE --save-detector"):
        load_detector(tmp_path / "d.pt", CPU)


@pytest.mark.parametrize(("tune", "kept"), [("head", 0), ("last-layer", 2)])
def test_eval_saves_the_head_it_reports(tmp_path, monkeypatch, capsys, tune, kept):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    task = TASKS["same_dataset_digits"]
    classifier = build_classifier(task)
    save_checkpoint("c.pkl", classifier.state_dict())
    save_checkpoint("v.pkl", build_cvae(task).state_dict())
    argv = ["--params-dict-name", "c.pkl", "--params-dict-name2", "v.pkl", "--epochs", "1", "--precision", "fp32"]
    argv += ["--tune", tune, "--device", "cpu"]
    command = [*argv, "--mode", "CMG-energy", "--save-detector", "d.pt"]
    assert run_command(eval.main, eval.get_parser(), command) == 0
    detector = load_detector("d.pt", CPU)
    assert detector.config.classes == (0, 1, 2, 3, 4, 5) and detector.config.threshold_from == "IND test"
    scores, _ = detector(to_float(load_ind(task, "partition1", tmp_path)[1].images))
    assert detector.config.threshold == pytest.approx(acceptance_threshold(scores), rel=1e-5)
    before, after = classifier.state_dict(), detector.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    head = ["classifier.fc1.weight", "classifier.fc1.bias", "classifier.fc2.weight", "classifier.fc2.bias"]
    assert changed == set(head[kept:])
    capsys.readouterr()
    assert run_command(eval.main, eval.get_parser(), [*argv, "--mode", "all", "--save-detector", "e.pt"]) == 2
    assert "--save-detector holds one detector" in capsys.readouterr().err
