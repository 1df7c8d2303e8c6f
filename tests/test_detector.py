"""The saved detector: threshold, file, and the same scores as stage 2 gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import eval
import predict
from cli.errors import UserError, run_command
from cmg.config import FineTuneConfig
from cmg.detector import CMGDetector
from cmg.scores import PRETRAINED_SCORES, SCORES
from datasets.datasetsHelper import load_ind, to_float
from datasets.tasks import TASKS, Experiment
from evaluation.metrics import acceptance_threshold
from evaluation.post_hoc import POST_HOC
from models.main_model import MainModel
from training.train_classifier import build_classifier
from training.train_cvae import build_cvae
from utils import load_checkpoint, save_checkpoint

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


def detector_of(model: MainModel) -> CMGDetector:
    """A fitted detector of the classes 2, 3 and 4 that scores by the OOD slot."""
    config = FineTuneConfig(num_ind=3, sigma=1.0)
    detector = CMGDetector(model, None, config, "CMG-softmax", classes=(2, 3, 4))
    detector.adopt(model.classifier.state_dict())
    detector.threshold, detector.threshold_from = 0.25, "IND test"
    return detector


def test_a_saved_detector_scores_as_the_one_saved(tmp_path):
    model = MainModel(8, 1, 11, "mnist")
    detector = detector_of(model)
    detector.save(tmp_path / "d.pt", {"command": "c"}, "t")
    loaded = CMGDetector.load(tmp_path / "d.pt", CPU)
    images = torch.rand(5, 1, 8, 8)
    assert (loaded.classes, loaded.threshold, loaded.threshold_from) == ((2, 3, 4), 0.25, "IND test")
    assert loaded.rule() == "OOD above 0.25, which 95 % of the IND test images do not exceed"
    state, stored = model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(state[name], stored[name]) for name in state)
    with torch.no_grad():
        logits = model.eval()(images)
    # Memory layouts differ, and with them the order of sums.
    for one in (detector, loaded):
        scores, classes = one.judge(one.features(images))
        torch.testing.assert_close(scores, SCORES["ood-slot"](logits, 3))
        assert torch.equal(classes, logits[:, :3].argmax(1))
        torch.testing.assert_close(one.predict(images), scores, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("former", "score"),
    [("CMG-energy", "energy-ind"), ("CMG-energy over all logits", "energy-all"), ("CMG-softmax", "ood-slot")],
)
def test_detectors_saved_under_former_names_of_scores_load(tmp_path, former, score):
    model = MainModel(8, 1, 11, "mnist").eval()
    about = {"task": "t", "classes": (2, 3, 4), "image_size": 8, "image_channels": 1, "logits": 11}
    about |= {"networks": "mnist"} | {"score": former, "threshold": 0.25, "threshold_from": "IND test"}
    save_checkpoint(tmp_path / "d.pt", {"detector": about, "model": model.state_dict(), "origin": {}})
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        expected = SCORES[score](model(images), 3)
    torch.testing.assert_close(CMGDetector.load(tmp_path / "d.pt", CPU, "fp32").predict(images), expected)


def test_the_head_is_in_fp32_under_autocast():
    """bf16 logits would have many images share a score."""
    torch.manual_seed(0)
    model = MainModel(8, 1, 11, "mnist")
    detector = detector_of(model)
    images = torch.rand(64, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        features = detector.encoder.network.features(images)
        scores, _ = detector.judge(features.float())
        assert features.dtype == torch.bfloat16
    with torch.no_grad():
        expected = SCORES["ood-slot"](model.classifier(features.float()), 3)
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
    detector = detector_of(MainModel(8, 1, 11, "mnist"))
    with pytest.raises(ValueError, match=rf"images are {found}, expected torch.float32 \[B, 1, 8, 8\]$"):
        detector.predict(images)


def post_hoc_detector(name: str) -> tuple[CMGDetector, torch.Tensor]:
    """One fitted on 60 images of three classes, and images to judge."""
    draw = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    model, labels = MainModel(8, 1, 11, "mnist").eval(), torch.arange(60) % 3
    images = torch.rand(60, 1, 8, 8, generator=draw) * torch.linspace(0.2, 1, 3)[labels][:, None, None, None]
    with torch.no_grad():  # the last layer picks the nearest mean
        hidden, last = model.classifier.hidden(model.features(images)), model.classifier.fc2
        means = torch.stack([hidden[labels == c].mean(0) for c in range(3)])
        last.weight[:3], last.bias[:3] = means, -means.square().sum(1) / 2
    detector = CMGDetector(model, None, FineTuneConfig(num_ind=3, sigma=1.0), classes="abc")
    features = detector.encoder(images)
    detector.adopt_post_hoc(name, features, labels).calibrate(features, "IND training")
    return detector, torch.rand(7, 1, 8, 8, generator=draw)


OF_FEATURES = [name for name, baseline in POST_HOC.items() if baseline.reads != "images"]


@pytest.mark.parametrize("name", OF_FEATURES)
def test_a_saved_post_hoc_detector_scores_as_the_one_saved(tmp_path, name):
    detector, images = post_hoc_detector(name)
    detector.save(tmp_path / "d.pt")
    loaded = CMGDetector.load(tmp_path / "d.pt", CPU, "fp32")
    assert loaded.config().score == name and loaded.threshold == detector.threshold
    scores, classes = loaded.judge(loaded.features(images))
    expected, of_expected = detector.judge(detector.features(images))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)  # memory layouts differ
    assert torch.equal(classes, of_expected)


@pytest.mark.parametrize(("name", "score"), PRETRAINED_SCORES.items())
def test_msp_and_energy_as_detectors_have_their_closed_forms(name, score):
    detector, images = post_hoc_detector(name)
    with torch.no_grad():
        logits = detector.model(images)
    offset = 1 if name == "MSP" else 0  # pytorch-ood has -max where ours is 1 - max
    torch.testing.assert_close(detector.predict(images).double() + offset, score(logits).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(60, 511)}, "torch.float32 [60, 511], expected 512 an image"),
        ({"features": torch.zeros(60, 512, dtype=torch.int64)}, "torch.int64 [60, 512], expected 512 an image"),
        ({"labels": torch.full((60,), 3)}, "its labels are not the numbers of 3 classes"),
        ({"labels": torch.full((60,), -1)}, "its labels are not the numbers of 3 classes"),
        ({"labels": torch.zeros(60)}, "its labels are not the numbers of 3 classes"),
        ({"labels": None}, "does not hold what KNN is fitted on"),
        ({"more": 1}, "does not hold what KNN is fitted on"),
        ({"features": torch.full((60, 512), torch.nan)}, "values of features are not finite"),
    ],
)
def test_a_post_hoc_detector_edited_by_hand_is_refused(tmp_path, change, message):
    detector, _ = post_hoc_detector("KNN")
    detector.save(tmp_path / "d.pt")
    content = load_checkpoint(tmp_path / "d.pt")
    content["fitted_on"] |= change
    save_checkpoint(tmp_path / "d.pt", content)
    with pytest.raises(UserError) as refused:
        CMGDetector.load(tmp_path / "d.pt", CPU)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_what_reads_images_is_no_detector_of_features(tmp_path):
    with pytest.raises(ValueError, match="ODIN reads images, not features"):
        post_hoc_detector("ODIN")


def test_a_post_hoc_detector_is_not_exported(tmp_path, capsys):
    post_hoc_detector("KNN")[0].save(tmp_path / "d.pt")
    argv = ["--detector", str(tmp_path / "d.pt"), "--export", str(tmp_path / "d.onnx")]
    assert run_command(predict.main, predict.get_parser(), argv) == 2
    assert "scores with pytorch-ood's KNN" in capsys.readouterr().err and not (tmp_path / "d.onnx").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"classes": [["a"], ["b"], ["c"]]},
        {"classes": [None, 3, 4]},
        {"classes": [2.0, 3.0, 4.0]},
        {"classes": [torch.tensor(2), 3, 4]},
        {"classes": [2, 3, 3]},
        {"classes": []},
        {"classes": list(range(11))},  # no logit is left for the OOD slot
        {"classes": list(range(12)), "score": "energy-ind"},
        {"image_size": True},
        {"logits": 11.0},
        {"precision": ["fp32"]},
    ],
)
def test_a_detector_edited_by_hand_is_refused(tmp_path, change):
    detector_of(MainModel(8, 1, 11, "mnist")).save(tmp_path / "d.pt")
    content = load_checkpoint(tmp_path / "d.pt")
    content["detector"] |= change
    save_checkpoint(tmp_path / "d.pt", content)
    with pytest.raises(UserError, match="is not a detector|do not go with its network") as refused:
        CMGDetector.load(tmp_path / "d.pt", CPU)
    assert "\n" not in str(refused.value)


def test_what_is_no_detector_is_refused(tmp_path):
    save_checkpoint(tmp_path / "d.pt", MainModel(8, 1, 11, "mnist").state_dict())
    with pytest.raises(UserError, match="is not a detector. Make one with: python -m eval --mode MODE --save-detector"):
        CMGDetector.load(tmp_path / "d.pt", CPU)


def test_a_detector_without_a_cvae_cannot_be_fitted(digits_classifier):
    detector = detector_of(digits_classifier)
    with pytest.raises(ValueError, match="this detector has no CVAE to make pseudo-OOD images with"):
        detector.fit_features(torch.zeros(3, 128), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(("tune", "kept"), [("head", 0), ("last-layer", 2)])
def test_eval_saves_the_head_it_reports(tmp_path, monkeypatch, capsys, tune, kept):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    task = TASKS["same_dataset_digits"]
    experiment = Experiment.of("same_dataset_digits", task)
    classifier = build_classifier(task)
    save_checkpoint("c.pkl", classifier.state_dict())
    save_checkpoint("v.pkl", build_cvae(task).state_dict())
    argv = ["--params-dict-name", "c.pkl", "--params-dict-name2", "v.pkl", "--epochs", "1", "--precision", "fp32"]
    argv += ["--tune", tune, "--device", "cpu"]
    command = [*argv, "--mode", "CMG-energy", "--save-detector", "d.pt"]
    assert run_command(eval.main, eval.get_parser(), command) == 0
    detector = CMGDetector.load(Path("d.pt"), CPU)
    assert detector.classes == (0, 1, 2, 3, 4, 5) and detector.threshold_from == "IND test"
    scores = detector.predict(to_float(load_ind(experiment, tmp_path)[1].images))
    assert detector.threshold == pytest.approx(acceptance_threshold(scores), rel=1e-5)
    before, after = classifier.state_dict(), detector.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    head = ["classifier.fc1.weight", "classifier.fc1.bias", "classifier.fc2.weight", "classifier.fc2.bias"]
    assert changed == set(head[kept:])
    capsys.readouterr()
    assert run_command(eval.main, eval.get_parser(), [*argv, "--mode", "all", "--save-detector", "e.pt"]) == 2
    assert "--save-detector holds one detector" in capsys.readouterr().err
