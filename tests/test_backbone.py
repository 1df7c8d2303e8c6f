"""Pre-trained extractors: preprocessing, weights, features on disk, and the commands with them."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shutil
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

import eval as evaluate
import figure.samples
import predict
import reproduce
import train
from benchmarks import backbone as benchmark
from cli.errors import UserError
from cmg.detector import CMGDetector
from cmg.losses import MODES
from datasets.tasks import BackboneChoice
from evaluation.report import NO_OOD
from models.backbone import Backbone, without_classifier
from models.inference import chunk_size
from models.layers import Standardise
from reproduction import launchers
from reproduction.best import best_detector
from reproduction.jobs import state_of_backbone
from tests import tiny_backbone
from tests.commands import error_of, run
from tests.test_reproduce import run_here
from training import backbone as backbones
from training.backbone import load_backbone
from utils import load_checkpoint, save_checkpoint

TINY = "tests.tiny_backbone:tiny"
CPU = torch.device("cpu")


@pytest.mark.parametrize(("pixels", "images"), [(1, 128), (32 * 32, 128), (128 * 128, 16), (1024 * 1024, 1)])
def test_large_images_go_through_in_small_chunks(pixels, images):
    assert chunk_size(CPU, pixels) == images


def test_the_benchmark_computes_the_features_anew_in_every_round(monkeypatch, capsys):
    computed = []

    class Counting(Backbone):
        def forward(self, images):
            computed.append(len(images))
            return super().forward(images)

    monkeypatch.setattr(tiny_backbone, "counting", lambda: Counting(Means(), 16), raising=False)
    argv = ("--backbone", "tests.tiny_backbone:counting", "--image-size", 16, "--images", 20, "--rounds", 2)
    assert run(benchmark, *argv, "--device", "cpu", "--precision", "fp32") == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert computed == [2, *[20] * 6]  # to know it; twice in each round and the one before them
    share = measured["images_per_second"] / measured["floor_images_per_second"]
    assert measured["floor_share"] == pytest.approx(share, abs=2e-2) and measured["images"] == 20


# --- the network --------------------------------------------------------------------------------


class Means(nn.Module):
    """[B, 3, S, S] -> [B, 3]."""

    def forward(self, images):
        return images.mean((2, 3))


class Calls(nn.Module):
    """A function as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def test_images_are_normalised_and_brought_to_its_size():
    images = torch.rand(4, 3, 8, 8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    found = Backbone(Means(), 8, mean, std)(images)
    expected = (images.mean((2, 3)) - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(found, expected[:, :, None, None])
    sizes = []
    network = nn.Sequential(Means())
    network.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0]))
    Backbone(network, 4)(images)
    smaller = F.interpolate(images, [4, 4], mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(sizes[0], smaller)


def test_grey_images_have_three_channels_alike_and_maps_become_means():
    grey = torch.rand(2, 1, 8, 8)
    found = Backbone(nn.Identity(), 8)(grey)
    torch.testing.assert_close(found, grey.mean((2, 3)).expand(2, 3)[:, :, None, None])


@pytest.mark.parametrize(("name", "features"), [("resnet18", 512), ("mobilenet_v3_small", 1024)])
def test_the_last_linear_layer_is_left_out(name, features):
    network = without_classifier(torchvision.models.get_model(name, weights=None)).eval()
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, features)


def test_standardise_is_of_the_training_images_and_has_an_inverse():
    values = torch.randn(300, 5, 1, 1) * torch.arange(5).view(5, 1, 1) + 7
    layer = Standardise(5)
    layer.fit(values)
    found = layer(values)
    assert found.mean(0).abs().max() < 1e-5 and (found[:, 1:].std(0, correction=0) - 1).abs().max() < 1e-5
    torch.testing.assert_close(layer.inverse(found), values)
    torch.testing.assert_close(layer(values.flatten(1)), found.flatten(1))


# --- by name ------------------------------------------------------------------------------------


def test_weights_of_a_file_are_those_of_the_network(tmp_path):
    torch.manual_seed(1)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "w.pt")
    backbone = load_backbone(BackboneChoice("resnet18", tmp_path / "w.pt", 64))
    assert (backbone.size, backbone.interpolation) == (64, "bilinear") and not backbone.training
    assert backbone.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    images = torch.rand(2, 3, 64, 64)
    expected = without_classifier(network.eval())((images - backbone.mean) / backbone.std)
    torch.testing.assert_close(backbone(images).flatten(1), expected)
    assert load_backbone(BackboneChoice("resnet18", tmp_path / "w.pt")).size == 224


def test_weights_that_cannot_be_fetched_are_named(monkeypatch):
    def fail(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models, "get_model", fail)
    message = (
        r"resnet18: its weights cannot be fetched \(Name or .*\). Fetch https://.*pth elsewhere and name the file with"
    )
    with pytest.raises(UserError, match=message):
        load_backbone(BackboneChoice("resnet18"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "--backbone resnet81: no such model of torchvision.*; the nearest are resnet18"),
        ("x:y", "--backbone x:y: x is not installed or not found; install it"),
        ("tests.tiny_backbone:none", "tests.tiny_backbone has no none; expected MODULE:FUNCTION"),
        ("tests.tiny_backbone:number", "gives a int, expected a torch.nn.Module"),
        (":f", "--backbone :f: expected MODULE:FUNCTION, or the name of a model"),
        ("..a:b", "expected MODULE:FUNCTION, or the name of a model"),
        ("os.path:join", r"cannot be made \(TypeError: join\(\) missing 1 required positional argument"),
        ("tests.tiny_backbone:NUMBER", r"cannot be made \(TypeError: 'int' object is not callable\)"),
        ("tests.tiny_backbone:leaves", r"cannot be made \(SystemExit: 3\)"),
    ],
)
def test_names_that_name_nothing(name, message):
    with pytest.raises(UserError, match=message):
        load_backbone(BackboneChoice(name))


@pytest.mark.parametrize("text", ["def f(:", "raise RuntimeError('not today')"])
def test_a_module_that_cannot_be_loaded_is_one_line(tmp_path, monkeypatch, text):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"of_the_user_{len(text)}"
    (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(
        UserError, match=rf"--backbone {name}:f: cannot be made \((SyntaxError|RuntimeError): [^\n]*\)$"
    ):
        load_backbone(BackboneChoice(f"{name}:f"))


def test_damaged_weights_that_were_fetched_before_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = Path(torchvision.models.get_model_weights("resnet18").DEFAULT.url).name
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / name).write_bytes(bytes([200]) * 1000)
    with pytest.raises(
        UserError, match=rf"--backbone resnet18: .*{name} is damaged \(.*\). Remove it, and it is fetched"
    ):
        load_backbone(BackboneChoice("resnet18"))


OUTPUTS = {
    "a pair": (lambda images: (images.mean((2, 3)), 0), "gives tuple, expected real features"),
    "one number an image": (lambda images: images.mean((1, 2, 3)), r"gives torch.float32 \[2\], expected"),
    "complex": (lambda images: images.mean((2, 3)) * 1j, r"gives torch.complex64 \[2, 3\], expected"),
    "nothing": (lambda images: images.mean((2, 3))[:, :0], r"gives \[2, 0\] features for 2 images"),
    "of one image": (lambda images: images.mean((2, 3))[:1], r"gives \[1, 3\] features for 2 images"),
    "its own error": (lambda images: {}["pooled"], r"does not take images of 8x8 pixels \('pooled'\)"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_that_are_no_features_are_one_line(kind, tmp_path):
    forward, message = OUTPUTS[kind]
    backbone = Backbone(Calls(forward), 8)
    with pytest.raises(UserError, match=message):
        backbones.encoder(backbone, tmp_path)


def test_features_whose_number_varies_are_one_line(tmp_path):
    backbone = Backbone(Calls(lambda images: images.mean((2, 3))[:, : len(images)]), 8)
    _, encode = backbones.encoder(backbone, tmp_path)
    with pytest.raises(UserError, match=r"gives \[3, 3\] features for 3 images, not 2 each"):
        encode(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "fp32", CPU)


def test_another_function_of_the_same_weights_is_another_backbone(tmp_path):
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    for function, expected in {
        lambda x: x.mean((2, 3)): lambda x: x.mean((2, 3)),
        lambda x: x.amax((2, 3)): lambda x: x.amax((2, 3)),
    }.items():
        _, encode = backbones.encoder(Backbone(Calls(function), 8), tmp_path)
        torch.testing.assert_close(encode(images, "fp32", CPU).flatten(1), expected(images / 255))
    means, also, maxima = (
        backbones.identity(Backbone(Calls(function), 8))
        for function in (lambda x: x.mean((2, 3)), lambda x: x.sum((2, 3)) / 64, lambda x: x.amax((2, 3)))
    )
    sums = backbones.identity(Backbone(Calls(lambda x: x.sum((2, 3))), 8))
    assert means == also and means["backbone"] == maxima["backbone"] == sums["backbone"]
    assert len({str(one["backbone_answers"]) for one in (means, maxima, sums)}) == 3


def test_weights_of_another_network_are_refused_with_their_keys(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt: is not a resnet34 \(lacks layer1\.2\.bn1\.bias, .*… 96 names\)"):
        load_backbone(BackboneChoice("resnet34", tmp_path / "w.pt"))


def test_a_model_of_timm_has_its_own_preprocessing(tmp_path):
    network = timm.create_model("test_vit", pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "w.pt")
    backbone = load_backbone(BackboneChoice("test_vit", tmp_path / "w.pt"))
    config = network.pretrained_cfg
    assert (backbone.size, backbone.interpolation) == (160, "bicubic") == (config["input_size"][1], "bicubic")
    images = torch.rand(2, 3, 160, 160)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features((images - mean) / std), pre_logits=True)
    torch.testing.assert_close(backbone(images).flatten(1), expected)
    other = load_backbone(BackboneChoice("test_vit", tmp_path / "w.pt", size=64))
    assert other(images).shape == (2, 64, 1, 1)


def test_weights_of_timm_that_cannot_be_fetched_are_named(monkeypatch):
    def create_model(name: str, pretrained: bool) -> nn.Module:
        assert (name, pretrained) == ("test_vit", True)
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(
        UserError, match="cannot be fetched .no network.*Fetch pytorch_model.bin of timm/test_vit.r160_"
    ):
        load_backbone(BackboneChoice("test_vit"))
    with pytest.raises(UserError, match="no such model of torchvision and timm; the nearest are test_vit"):
        load_backbone(BackboneChoice("test_vitt"))


def test_without_timm_its_models_are_not_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="no such model of torchvision .timm is not installed."):
        load_backbone(BackboneChoice("test_vit"))


def test_real_weights_tell_an_image_from_another():
    backbone = load_backbone(BackboneChoice("examples.efficientnet_lite0:backbone", size=64))
    random = torch.Generator().manual_seed(0)
    noise, plain = torch.rand(3, 3, 64, 64, generator=random), torch.full((3, 3, 64, 64), 0.5)
    features = backbone(torch.cat([noise, plain])).flatten(1)
    assert features.shape == (6, 1280) and features.isfinite().all()
    distances = torch.cdist(features, features)
    assert distances[:3, :3].max() < distances[:3, 3:].min() and distances[3:, 3:].max() < 1e-3


# --- commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """birds with two classes, 20 + 8 images each, and 7 insects, all of 20x24 pixels."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)

    def write(place: Path, count: int, colour: tuple[int, ...]) -> None:
        place.mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(random.normal(colour, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")

    for split, count in (("train", 20), ("test", 8)):
        write(folder / "birds" / split / "crow", count, (30, 30, 30))
        write(folder / "birds" / split / "gull", count, (220, 220, 220))
    write(folder / "insects", 7, (60, 200, 60))
    return folder


def options(photos: Path, name: str = TINY) -> list[object]:
    task = ["--task", "custom", "--ind-dir", photos / "birds", "--backbone", name]
    return [*task, "--data-dir", "data", "--device", "cpu", "--precision", "fp32"]


def test_from_photos_to_verdicts(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    of = options(photos)
    assert run(train, *of, "--epochs", 30) == 0
    assert run(train, *of, "--command", "train_cvae", "--epochs", 30) == 0
    assert "custom_birds_tests-tiny_backbone-tiny all, 40 images, 30 epochs" in capsys.readouterr().out
    kept = set(Path("data/features").iterdir())
    assert len(kept) == 2  # of the training and of the test images

    tested = [*of, "--ood-dir", photos / "insects", "--mode", "CMG-energy", "--epochs", 2, "--baselines", "ViM", "MSP"]
    files = ["--output", "r.json", "--save-scores", "s.npz", "--save-detector", "d.pt"]
    assert run(evaluate, *tested, *files) == 0
    assert kept < set(Path("data/features").iterdir())
    results = json.loads(Path("r.json").read_text())
    assert results["task"] == "custom_birds_tests-tiny_backbone-tiny" and results["generator"]["explained"] <= 1
    assert results["images"] == {"IND training": 40, "IND validation": 0, "IND test": 16, "insects": 7}

    assert run(predict, "--detector", "d.pt", photos / "birds" / "test", photos / "insects", "--csv", "p.csv") == 0
    with open("p.csv") as file, np.load("s.npz") as scores:
        rows = list(csv.DictReader(file))
        expected = np.concatenate([scores[f"CMG-energy/123/last/{name}"] for name in ("IND test", "insects")])
    found = {row["file"]: float(row["score"]) for row in rows}
    assert sorted(found.values()) == pytest.approx(sorted(expected.tolist()), abs=1e-4)
    assert all(Path(name).parent.name == row["class"] for name, row in zip(found, rows, strict=True) if "birds" in name)


def test_features_are_computed_once_and_follow_the_images(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen, features_of = [], backbones.features_of
    monkeypatch.setattr(backbones, "features_of", lambda *args: seen.append(len(args[1])) or features_of(*args))
    of = [*options(photos), "--epochs", 1]
    assert run(train, *of) == 0
    assert sum(seen) == 4 + 40 + 16  # the first to find out how many features there are, and which backbone it is
    seen.clear()
    assert run(train, *of, "--restart") == 0
    assert sum(seen) == 4
    for path in Path("data/features").iterdir():  # damaged: made anew
        path.write_bytes(path.read_bytes()[:-40])
    seen.clear()
    assert run(train, *of, "--restart") == 0
    assert sum(seen) == 4 + 40 + 16
    seen.clear()
    assert run(train, *of, "--restart", "--image-size", 20) == 0  # another preprocessing
    assert sum(seen) == 4 + 40 + 16


def test_reproduce_does_it_all(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launchers, "run_local", run_here)
    argv = [*options(photos), "--ood-dir", photos / "insects", "--seeds", 1, "--eval-args=--epochs 1"]
    assert run(reproduce, *argv, "--classifier-args=--epochs 2", "--cvae-args=--epochs 2") == 0
    table = json.loads(Path("results/custom_birds_tests-tiny_backbone-tiny_features/table.json").read_text())
    assert {row["method"] for row in table["detection"]} == {"CMG-energy", "CMG-softmax", "MSP", "energy"}
    best = max((row for row in table["detection"] if row["at"] != "max"), key=lambda row: row["auroc"]["mean"])
    detector = CMGDetector.load(Path("results/custom_birds_tests-tiny_backbone-tiny_features/detector.pt"), CPU)
    modes = {name: mode.score for name, mode in MODES.items()}
    assert detector.config().score == modes.get(best["method"], best["method"]) and detector.backbone is not None


def test_reproduce_finds_code_in_the_current_folder_and_begins_anew_when_it_changes(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # a copy, and without the current folder
    monkeypatch.setattr(launchers, "run_local", run_here)
    argv = [*options(photos, "of_here:make"), "--seeds", 1, "--modes", "CMG-energy", "--output", "r"]
    argv += ["--image-size", 16, "--classifier-args=--epochs 2", "--cvae-args=--epochs 2", "--eval-args=--epochs 1"]
    seen = []
    for seed in (1, 2, 2):
        code = "def make():\n    torch.manual_seed({})\n    return nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten())\n"
        Path("of_here.py").write_text("import torch\nfrom torch import nn\n" + code.format(seed))
        sys.modules.pop("of_here", None)
        importlib.invalidate_caches()
        shutil.rmtree("__pycache__", ignore_errors=True)
        state_of_backbone.cache_clear()
        assert run(reproduce, *argv) == 0
        seen.append([Path("r/all_seed1", name).stat().st_mtime_ns for name in ("classifier.pkl", "cvae.pkl")])
        seen[-1].append(CMGDetector.load(Path("r/detector.pt"), CPU).threshold)
    assert len({str(one) for one in seen[:2]}) == 2 and seen[0][0] < seen[1][0] and seen[0][1] < seen[1][1]
    assert seen[1] == seen[2]
    said = Path("r/all_seed1/log.txt").read_text()
    assert said.count("what it was trained on has changed: it is trained again") >= 1


def test_own_images_without_ood_images(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launchers, "run_local", run_here)
    argv = [*options(photos), "--seeds", 1, "--modes", "CMG-energy", "--baselines", "NNGuide", "ODIN", "MaxLogit"]
    argv += ["--eval-args=--epochs 1", "--classifier-args=--epochs 2", "--cvae-args=--epochs 2", "--output", "r"]
    assert run(reproduce, *argv) == 0
    table = json.loads(Path("r/table.json").read_text())
    rows = {row["method"]: row for row in table["detection"]}
    assert set(rows) == {"CMG-energy", "MSP", "energy", "NNGuide", "MaxLogit"}
    assert {row["ood_dataset"] for row in rows.values()} == {"pseudo-OOD"}
    reason = "it reads images, and of pseudo-OOD there are features only"
    assert table["left_out"] == {"ODIN": f"(since {reason})"}
    best = CMGDetector.load(Path("r/detector.pt"), CPU).config().score
    others = {method: row["auroc"]["mean"] for method, row in rows.items() if method != "CMG-energy"}
    assert others[best] == max(others.values())
    sentence = f"Of the detectors that were not trained against them, {best} is the best on them."
    first = Path("r/table.md").read_text().splitlines()[2]
    assert first == f"{NO_OOD} {sentence}" and first in capsys.readouterr().out
    detector = CMGDetector.load(Path("r/detector.pt"), CPU)
    assert detector.classes == ("crow", "gull")
    # The scores of the table are those of the detector: it rejects 5 % of what they say of IND test images.
    scores = np.load("r/all_seed1/scores.npz")
    assert scores[f"{best}/-/pretrained/pseudo-OOD"].shape == scores[f"{best}/-/pretrained/IND test"].shape
    highest = scores[f"{best}/-/pretrained/IND test"].max() - (
        best == "MSP"
    )  # pytorch-ood has -max where ours is 1 - max
    assert detector.threshold == pytest.approx(highest, rel=1e-4)
    # The same command again trains and fits nothing.
    made = Path("r/detector.pt").stat().st_mtime_ns
    assert run(reproduce, *argv) == 0 and Path("r/detector.pt").stat().st_mtime_ns == made
    Path("r/detector.pt").write_bytes(b"half")
    assert run(reproduce, *argv) == 0
    assert CMGDetector.load(Path("r/detector.pt"), CPU).threshold == detector.threshold


def test_the_best_detector_is_the_best_that_can_be_saved():
    def row(method: str, at: str, mean: float, ood: str = "a", n: int = 2) -> dict:
        return {"method": method, "at": at, "ood_dataset": ood, "auroc": {"mean": mean, "n": n}}

    rows = [row("MSP", "pretrained", 0.5), row("KNN", "pretrained", 0.7), row("CMG-energy", "last", 0.6)]
    best = best_detector([*rows, row("CMG-energy", "max", 0.9), row("ViM", "pretrained", 0.99, n=1)])
    assert best == ("KNN", "Best on these OOD images: KNN, with a mean AUROC of 70.00, 20.00 points above MSP.")
    best = best_detector([*rows, row("ODIN", "pretrained", 0.8), row("CMG-softmax", "last", 0.75)])
    assert best.method == "CMG-softmax" and "(only ODIN, which cannot be saved, has more: 80.00)." in best.sentence
    two = [row(one["method"], one["at"], 1 - one["auroc"]["mean"], "b") for one in rows]
    assert best_detector([*rows, *two, row("GEN", "pretrained", 0.9)]).sentence.endswith(
        "with a mean AUROC of 50.00 over the 2 OOD sets."
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--backbone", "tests.tiny_backbone:broken"],
            "the features of 40 images are not finite; try --precision",
        ),
        (["--backbone", "tests.tiny_backbone:particular", "--image-size", 20], "does not take images of 20x20 pixels"),
        (["--grey"], "--grey does not go with --backbone; leave it out"),
        (["--networks", "narrow"], "--networks does not go with --backbone; leave it out"),
        (["--backbone-weights", "none.pt"], "--backbone-weights none.pt: no such file; expected a state dict"),
    ],
)
def test_what_does_not_go_together_is_one_line(photos, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, train, *options(photos), *more)
    assert not Path("ckpt").exists()


def test_options_of_backbones_without_one(photos, capsys):
    custom = ["--task", "custom", "--ind-dir", photos / "birds"]
    assert "another size goes with --backbone NAME" in error_of(capsys, train, *custom, "--image-size", 64)
    assert "--backbone-weights goes with --backbone NAME" in error_of(capsys, train, *custom, "--backbone-weights", "x")
    assert "there are no images to draw" in error_of(capsys, figure.samples, *options(photos))


def test_networks_on_other_weights_are_refused(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    of = options(photos)
    assert run(train, *of, "--epochs", 1) == run(train, *of, "--command", "train_cvae", "--epochs", 1) == 0
    other = tiny_backbone.tiny().network
    torch.save({name: t + 1 for name, t in other.state_dict().items()}, "w.pt")
    of += ["--backbone-weights", "w.pt"]
    assert "made with other options (backbone was" in error_of(capsys, train, *of, "--epochs", 1)
    error = error_of(capsys, evaluate, *of, "--ood-dir", photos / "insects")
    assert "the classifier was trained on the features of another backbone, or of other weights of it" in error


def test_a_detector_whose_package_is_missing(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    of = options(photos)
    assert run(train, *of, "--epochs", 1) == run(train, *of, "--command", "train_cvae", "--epochs", 1) == 0
    argv = [*of, "--ood-dir", photos / "insects", "--mode", "CMG-energy", "--epochs", 1, "--save-detector", "d.pt"]
    assert run(evaluate, *argv) == 0
    content = load_checkpoint(Path("d.pt"))
    save_checkpoint(Path("e.pt"), content | {"detector": content["detector"] | {"backbone": "no_such_package:f"}})
    assert "no_such_package is not installed or not found" in error_of(
        capsys, predict, "--detector", "e.pt", photos / "insects"
    )
    save_checkpoint(Path("g.pt"), content | {"detector": content["detector"] | {"backbone": 5}})
    error = error_of(capsys, predict, "--detector", "g.pt", photos / "insects")
    assert "g.pt: its classes, score and threshold do not go with its network" in error
    content["backbone"]["network.0.bias"][0] = torch.nan
    save_checkpoint(Path("h.pt"), content)
    error = error_of(capsys, predict, "--detector", "h.pt", photos / "insects")
    assert "h.pt: 1 of the 8 values of network.0.bias are not finite" in error
    save_checkpoint(Path("f.pt"), content | {"backbone": {}})
    error = error_of(capsys, predict, "--detector", "f.pt", photos / "insects")
    assert re.search(r"f\.pt: is not the backbone tests\.tiny_backbone:tiny \(lacks mean", error)
