"""Post-hoc detectors: closed forms and plain computations, every name of the table, and `eval --baselines`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import eval
from cli.errors import run_command
from cli.progress import Progress
from cmg.scores import PRETRAINED_SCORES
from datasets.datasetsHelper import Images, load_ind, load_ood, to_float
from datasets.tasks import HELD_OUT, TASKS, Experiment
from evaluation.baselines import POST_HOC, Parts, baseline_scores, fit_and_score
from evaluation.metrics import auroc
from evaluation.report import IND_TEST
from models.main_model import MainModel
from training.train_classifier import build_classifier
from training.train_cvae import build_cvae
from utils import save_checkpoint

TASK = TASKS["same_dataset_digits"]
DIGITS = Experiment.of("same_dataset_digits", TASK)
NUM_IND = 6
OF_FEATURES = [name for name, baseline in POST_HOC.items() if baseline.reads != "images"]
QUIET = Progress(0, "", enabled=False)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Images, dict[str, torch.Tensor]]:
    """240 IND training images, and 60 images of each set that is scored."""
    train, test = load_ind(DIGITS, tmp_path_factory.mktemp("data"))
    ood = load_ood(DIGITS, HELD_OUT, tmp_path_factory.mktemp("data"))
    return train.at(torch.arange(240)), {IND_TEST: test.images[:60], HELD_OUT: ood[:60]}


@torch.no_grad()
def penultimate(model: MainModel, images: torch.Tensor) -> torch.Tensor:
    """What the last layer sees, [N, 512]."""
    return model.classifier.hidden(model.features(to_float(images)))


def scores_of(model: MainModel, train: Images, sets: dict[str, torch.Tensor], names: Sequence[str] = tuple(POST_HOC)):
    """`baseline_scores` of images."""
    features = {name: penultimate(model, images) for name, images in sets.items()}
    return baseline_scores(model, penultimate(model, train.images), train.labels, features, sets, NUM_IND, names)


def fit_last_layer(model: MainModel, train: Images) -> MainModel:
    """A classifier without an epoch of training: the last layer by least squares, the other outputs held down."""
    with torch.no_grad():
        features = penultimate(model, train.images).double()
        targets = 10 * F.one_hot(train.labels, NUM_IND).double()
        ridge = 1e-3 * torch.eye(len(features), dtype=torch.float64)
        weights = features.T @ torch.linalg.solve(features @ features.T + ridge, targets)
        model.classifier.fc2.weight[:NUM_IND] = weights.T.float()
        model.classifier.fc2.bias[:NUM_IND] = 0
        model.classifier.fc2.bias[NUM_IND:] = -3
    return model.requires_grad_(False)


@pytest.fixture
def classifier(digits_classifier, digits) -> MainModel:
    return fit_last_layer(digits_classifier, digits[0])


def score(name: str, train: torch.Tensor, labels: torch.Tensor, **sets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores of features by one detector, with the classes' means as the last layer."""
    last = nn.Linear(train.shape[1], int(labels.max()) + 1).requires_grad_(False)
    last.weight.copy_(torch.stack([train[labels == c].mean(0) for c in range(last.out_features)]))
    last.bias.zero_()
    return fit_and_score(name, Parts(last, last), train, labels, sets, QUIET)


@pytest.fixture
def clusters() -> dict[str, torch.Tensor]:
    """Features [N, 8] of three classes around the first three axes; those of "ood" lie around the fourth."""
    draw = torch.Generator().manual_seed(0)

    def around(axes: list[int], count: int) -> torch.Tensor:
        return 5 * F.one_hot(torch.tensor(axes), 8).repeat_interleave(count, 0) + torch.rand(
            len(axes) * count, 8, generator=draw
        )

    labels = torch.arange(3).repeat_interleave(60)
    return {"train": around([0, 1, 2], 60), "labels": labels, "ind": around([0, 1, 2], 20), "ood": around([3], 50)}


# --- values -------------------------------------------------------------------------------------


def test_scores_of_logits_are_their_closed_forms(classifier, digits):
    train, sets = digits
    found, _ = scores_of(classifier, train, sets, ["MSP", "MaxLogit", "energy", "entropy"])
    with torch.no_grad():
        logits = classifier(to_float(sets[HELD_OUT])).double()
    ind = logits[:, :NUM_IND]
    powers = logits.exp()
    shares = ind.exp() / ind.exp().sum(1, keepdim=True)
    expected = {
        "MSP": -powers.amax(1) / powers.sum(1),
        "MaxLogit": -ind.amax(1),
        "energy": -powers.sum(1).log(),
        "entropy": -(shares * shares.log()).sum(1),
    }
    assert list(found) == list(expected)
    for name, scores in expected.items():
        torch.testing.assert_close(found[name][HELD_OUT], scores, rtol=1e-4, atol=1e-5)


def test_msp_and_energy_are_the_rows_that_are_always_shown(classifier, digits):
    train, sets = digits
    found, _ = scores_of(classifier, train, sets, list(PRETRAINED_SCORES))
    with torch.no_grad():
        logits = {name: classifier(to_float(images)) for name, images in sets.items()}
    for name, of_logits in PRETRAINED_SCORES.items():
        expected = auroc(of_logits(logits[IND_TEST]), of_logits(logits[HELD_OUT]))
        assert auroc(found[name][IND_TEST], found[name][HELD_OUT]) == pytest.approx(expected, abs=1e-3)


def test_odin_steps_along_the_gradient_s_sign(classifier, digits):
    train, sets = digits
    images = to_float(sets[HELD_OUT]).requires_grad_()
    logits = classifier(images)[:, :NUM_IND] / 1000
    (gradient,) = torch.autograd.grad(logits.log_softmax(1).amax(1).sum(), images)
    with torch.no_grad():
        moved = classifier(images + 0.0014 * gradient.sign())[:, :NUM_IND] / 1000
    found = scores_of(classifier, train, {"x": sets[HELD_OUT]}, ["ODIN"])[0]["ODIN"]["x"]
    torch.testing.assert_close(found, -moved.softmax(1).amax(1), rtol=0, atol=1e-6)


def test_knn_is_the_distance_to_the_fiftieth_neighbour(clusters):
    found = score("KNN", clusters["train"], clusters["labels"], ood=clusters["ood"])["ood"]
    train, ood = (F.normalize(clusters[name].double()).tolist() for name in ("train", "ood"))
    distances = torch.tensor([[math.dist(o, t) for t in train] for o in ood])
    torch.testing.assert_close(found, distances.sort(1).values[:, 49], check_dtype=False, rtol=1e-4, atol=1e-5)


def mahalanobis(train: torch.Tensor, labels: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Half the least squared distance to a class mean under the pooled scatter, by loops in fp64."""
    train, features = train.double(), features.double()
    means = [train[labels == c].mean(0) for c in labels.unique()]
    scatter = 1e-6 * torch.eye(train.shape[1], dtype=torch.float64)
    for row, label in zip(train, labels, strict=True):
        scatter += torch.outer(row - means[label], row - means[label])
    inverse = torch.linalg.inv(scatter)
    return torch.stack([min((row - mean) @ inverse @ (row - mean) / 2 for mean in means) for row in features])


def test_mahalanobis_equals_a_plain_loop(clusters):
    train, labels, ood = clusters["train"], clusters["labels"], clusters["ood"]
    torch.testing.assert_close(score("Mahalanobis", train, labels, x=ood)["x"], mahalanobis(train, labels, ood))


def test_rmd_subtracts_the_distance_to_all_and_survives_a_feature_that_is_never_active(clusters):
    train, labels, ood = (clusters[name].clone() for name in ("train", "labels", "ood"))
    train[:, 6:] = 0  # their inverse variance is 1e6: in fp32 the two distances would differ by noise
    expected = 2 * mahalanobis(train, labels, ood) - 2 * mahalanobis(train, torch.zeros_like(labels), ood)
    torch.testing.assert_close(score("RMD", train, labels, x=ood)["x"], expected, rtol=1e-5, atol=1e-8)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", OF_FEATURES)
def test_separable_features_are_separated(clusters, name):
    found = score(name, clusters["train"], clusters["labels"], ind=clusters["ind"], ood=clusters["ood"])
    # The norm of a gradient also grows with the features', which are as long out there.
    assert auroc(found["ind"], found["ood"]) >= (0.98 if name == "GradNorm" else 1.0)


# --- the table ----------------------------------------------------------------------------------


def test_every_detector_scores_every_image_and_leaves_the_classifier_as_it_was(classifier, digits):
    train, sets = digits
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    found, _ = scores_of(classifier, train, sets)
    assert list(found) == list(POST_HOC)
    for name, of_sets in found.items():
        assert [scores.shape for scores in of_sets.values()] == [(60,), (60,)], name
        assert of_sets[IND_TEST].unique().numel() > 30, name
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", OF_FEATURES)
def test_scores_depend_on_no_other_image_that_is_scored(clusters, name):
    train, labels, ind, ood = (clusters[part] for part in ("train", "labels", "ind", "ood"))
    alone = score(name, train, labels, x=ind[:7])["x"]
    torch.testing.assert_close(alone, score(name, train, labels, ood=ood, x=ind)["x"][:7], rtol=1e-5, atol=1e-5)


# --- failures -----------------------------------------------------------------------------------


def test_a_detector_that_cannot_be_fitted_is_left_out_with_its_reason(classifier, digits):
    train, sets = digits
    few = train.at(torch.arange(40))
    found, left_out = scores_of(classifier, few, sets, ["MSP", "KNN", "MaxLogit"])
    assert list(found) == ["MSP", "MaxLogit"]
    assert left_out == {"KNN": "k=50 exceeds the number of ID samples (40)"}


def test_on_two_images_what_can_be_fitted_is(classifier, digits):
    train, sets = digits
    two = train.at(torch.tensor([int((train.labels == label).nonzero()[0]) for label in (0, 1)]))
    found, left_out = scores_of(classifier, two, sets)
    assert sorted([*found, *left_out]) == sorted(POST_HOC) and {"KNN", "NNGuide"} <= left_out.keys()
    assert {"MSP", "MaxLogit", "energy", "entropy", "GEN"} <= found.keys()
    assert all(reason and "\n" not in reason for reason in left_out.values())


def test_an_error_without_a_message_is_named_by_its_kind(classifier, digits):
    train, sets = digits
    gap = Images(train.images, train.labels + (train.labels > 2))  # no image has label 3
    found, left_out = scores_of(classifier, gap, sets, ["Mahalanobis"])
    assert (found, left_out) == ({}, {"Mahalanobis": "AssertionError"})


def test_scores_that_are_no_numbers_are_refused(classifier, digits):
    train, sets = digits
    with torch.no_grad():
        classifier.classifier.fc1.weight.zero_()
        classifier.classifier.fc1.bias.fill_(-1)  # no feature is active: ASH divides 0 by 0
    found, left_out = scores_of(classifier, train, sets, ["MSP", "ASH"])
    assert list(found) == ["MSP"]
    assert left_out == {"ASH": "60 of the 60 images of IND test have a score that is not finite"}


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    """Arguments of `eval` for a classifier that all detectors can be fitted on."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    classifier = fit_last_layer(build_classifier(TASK).eval(), load_ind(DIGITS, tmp_path)[0])
    save_checkpoint("c.pkl", classifier.state_dict())
    save_checkpoint("v.pkl", build_cvae(TASK).state_dict())
    argv = ["--params-dict-name", "c.pkl", "--params-dict-name2", "v.pkl", "--epochs", "1", "--precision", "fp32"]
    return [*argv, "--device", "cpu", "--mode", "CMG-energy", "--output", "r.json"]


@pytest.mark.parametrize(("names", "expected"), [([], list(POST_HOC)), (["KNN", "MSP", "KNN"], ["KNN"])])
def test_eval_shows_the_detectors_and_none_twice(command, tmp_path, capsys, names, expected):
    assert run_command(eval.main, eval.get_parser(), [*command, "--baselines", *names]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["detection"]
    pretrained = [row for row in rows if row["at"] == "pretrained"]
    methods = [row["method"] for row in pretrained]
    assert sorted(methods) == sorted({*expected, "MSP", "energy"})
    assert all(row["seed"] is None and row["ood_dataset"] == HELD_OUT and "fpr95" in row for row in pretrained)
    table = capsys.readouterr().out
    for row in pretrained:
        cells = [HELD_OUT, row["method"], "pretrained", f"{100 * row['auroc']:.2f}"]
        assert sum(line.split()[:4] == cells for line in table.splitlines()) == 1


def test_eval_refuses_a_name_that_is_none(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(eval.main, eval.get_parser(), [*command, "--baselines", "kNN"])
    assert stop.value.code == 2
    assert "argument --baselines: invalid choice: 'kNN' (choose from" in capsys.readouterr().err


def test_eval_goes_on_without_a_detector_that_fails_and_says_why(command, tmp_path, capsys):
    state = torch.load("c.pkl", weights_only=True)
    state["classifier.fc2.bias"][0] = 1000  # every image is of class 0: SHE has no pattern of class 1
    save_checkpoint("c.pkl", state)
    assert run_command(eval.main, eval.get_parser(), [*command, "--baselines", "SHE", "KNN"]) == 0
    assert "\nSHE is left out (No correct predictions for class 1).\n" in capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["left_out"] == {"SHE": "No correct predictions for class 1"}
    untouched = {row["method"] for row in result["detection"] if row["at"] == "pretrained"}
    assert untouched == {"MSP", "energy", "KNN"}
