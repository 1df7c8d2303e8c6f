"""Detectors as ONNX graphs: onnxruntime gives what torch gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import predict
from cli.errors import UserError, run_command
from cmg import export
from cmg.config import FineTuneConfig
from cmg.detector import CMGDetector
from datasets.tasks import BackboneChoice
from models.main_model import MainModel
from training.backbone import load_backbone

TINY = "tests.tiny_backbone:tiny"


def detector_of(family: str, size: int, channels: int, score: str, tune: str = "head") -> CMGDetector:
    """An untrained one, with a threshold between the scores of noise."""
    torch.manual_seed(0)
    model = MainModel(size, channels, 5, family).eval()
    config = FineTuneConfig(num_ind=3, sigma=1.0, score=score, tune=tune)
    backbone = load_backbone(BackboneChoice(TINY)) if family == "features" else None
    detector = CMGDetector(model, None, config, classes=["a", "b", "c"], backbone=backbone)
    tuned = model.classifier if tune == "head" else model.classifier.fc2
    detector.adopt({name: p.detach().clone() for name, p in tuned.named_parameters()})
    images = noise(64, detector) / 255
    return detector.calibrate(detector.features(images)[:32], "noise")


def noise(count: int, detector: CMGDetector) -> torch.Tensor:
    channels, size = detector.read_shape
    bright = torch.linspace(0.1, 1, count)[:, None, None, None]
    return (torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1)) * 255 * bright).round()


@pytest.mark.parametrize(
    ("family", "size", "channels", "score"),
    [
        ("mnist", 8, 1, "energy-ind"),
        ("mnist", 28, 3, "ood-slot"),
        ("narrow", 32, 3, "energy-ind"),
        ("features", 1, 8, "ood-slot"),
    ],
)
def test_scores_and_verdicts_are_those_of_torch(tmp_path, family, size, channels, score):
    detector, path = detector_of(family, size, channels, score), tmp_path / "d.onnx"
    export.export_onnx(detector, path)
    images = noise(50, detector)
    session = onnxruntime.InferenceSession(path)
    scores, classes, is_ood = session.run(None, {"images": images.to(torch.uint8).numpy()})
    expected, numbers = detector.judge(detector.features(images / 255))
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert (classes == numbers.numpy()).all()
    assert (is_ood == (expected > detector.threshold).numpy()).all() and 0 < is_ood.sum() < 50
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(about["classes"]) == ["a", "b", "c"] and about["rule"] == detector.rule()


def test_a_head_whose_last_layer_was_tuned(tmp_path):
    detector = detector_of("mnist", 8, 1, "energy-ind", tune="last-layer")
    export.export_onnx(detector, tmp_path / "d.onnx")
    images = noise(9, detector)
    scores, _, _ = onnxruntime.InferenceSession(tmp_path / "d.onnx").run(
        None, {"images": images.to(torch.uint8).numpy()}
    )
    np.testing.assert_allclose(scores, detector.predict(images / 255).numpy(), rtol=1e-4, atol=1e-4)


def run(*argv: object) -> int:
    return run_command(predict.main, predict.get_parser(), [str(word) for word in argv])


def test_the_command(tmp_path, capsys):
    detector = detector_of("mnist", 8, 1, "energy-ind")
    detector.save(tmp_path / "d.pt")
    assert run("--detector", tmp_path / "d.pt", "--export", tmp_path / "d.onnx") == 0
    expected = f"wrote {tmp_path}/d.onnx: uint8 [N, 1, 8, 8] -> score, class, is_ood; {detector.rule()}\n"
    assert capsys.readouterr().out.endswith(expected) and (tmp_path / "d.onnx").is_file()
    assert run("--detector", tmp_path / "d.pt", "--export", tmp_path / "e.onnx", tmp_path) == 2
    assert "--export writes the detector and judges no images; leave one of them out" in capsys.readouterr().err
    before = (tmp_path / "d.pt").read_bytes()
    assert run("--detector", tmp_path / "d.pt", "--export", tmp_path / "d.pt") == 2
    assert "d.pt: it is read by this command; name another file" in capsys.readouterr().err
    assert (tmp_path / "d.pt").read_bytes() == before
    assert run("--detector", tmp_path / "d.pt", "--export", tmp_path / "e.onnx", "--csv", tmp_path / "e.csv") == 2
    assert "--export writes the detector and no predictions; leave --csv out" in capsys.readouterr().err
    assert run("--detector", tmp_path / "d.pt") == 2
    assert "name images or folders to judge, or --export FILE.onnx" in capsys.readouterr().err
    assert run("--detector", tmp_path / "d.pt", "--export", tmp_path) == 2
    assert "it is a folder; name a file" in capsys.readouterr().err


def test_packages_that_lack_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed; pip install onnx onnxscript onnxruntime"):
        export.export_onnx(detector_of("mnist", 8, 1, "energy-ind"), tmp_path / "d.onnx")


def test_what_computes_something_else_is_not_written(tmp_path, monkeypatch):
    class Session:
        def __init__(self, content: bytes):
            pass

        def run(self, names, inputs):
            count = len(inputs["images"])
            return [np.zeros(count, np.float32), np.zeros(count, np.int64), np.zeros(count, bool)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(UserError, match="onnxruntime gives the scores .*; nothing is written"):
        export.export_onnx(detector_of("mnist", 8, 1, "energy-ind"), tmp_path / "d.onnx")
    assert not list(Path(tmp_path).iterdir())
