"""CMG as a detector of pytorch-ood: the scores of stage 2, inside that library's own Benchmark."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorch_ood.api import RequiresFittingException
from pytorch_ood.benchmark import Benchmark
from torch.utils.data import DataLoader, TensorDataset

from cli.errors import UserError, run_command
from cmg.config import FineTuneConfig
from cmg.data import Stage2Data
from cmg.detector import CMGDetector, Encoder
from cmg.engine import head_logits
from cmg.losses import MODES
from cmg.scores import SCORES
from cmg.stage2 import Stage2Inputs, run_stage2, split_model
from datasets.datasetsHelper import Images, to_float
from datasets.tasks import TASKS, Experiment
from evaluation.report import detection_row
from examples import pytorch_ood_benchmark as example
from models.inference import for_inference
from utils import save_checkpoint

ROOT = Path(__file__).parents[1]
CONFIG = FineTuneConfig(num_ind=6, sigma=3.0, epochs=2, batch_size=16, learning_rate=1e-3)
SEED = 5


@pytest.fixture
def data() -> Stage2Data:
    """60 training images, 24 test images and two OOD sets of noise, one brighter than the other."""
    draw = torch.Generator().manual_seed(8)

    def images(count, brightest=256):
        return torch.randint(brightest, (count, 1, 8, 8), generator=draw, dtype=torch.uint8)

    train, test = (Images(images(count), torch.arange(count) % 6) for count in (60, 24))
    return Stage2Data(train, train.at(torch.arange(0)), test, {"bright": images(20), "dark": images(15, 90)})


def inputs(classifier, cvae, data: Stage2Data) -> Stage2Inputs:
    name = "same_dataset_digits"
    return Stage2Inputs(Experiment.of(name, TASKS[name]), classifier, cvae, {}, data)


class TinyBenchmark(Benchmark):
    """A benchmark of tensors, as the library would have it."""

    def __init__(self, data: Stage2Data):
        self.data, self.ood_names = data, list(data.ood)

    def train_set(self):
        return labelled(self.data.train.images, self.data.train.labels)

    def test_sets(self, known=True, unknown=True):
        test = labelled(self.data.test.images, self.data.test.labels)
        return [test + labelled(ood, torch.full((len(ood),), -1)) for ood in self.data.ood.values()]


def labelled(images, labels) -> TensorDataset:
    return TensorDataset(to_float(images), labels)


def train_loader(data: Stage2Data) -> DataLoader:
    return DataLoader(TinyBenchmark(data).train_set(), batch_size=25)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("tune", ["head", "last-layer"])
def test_scores_are_those_of_stage_2(digits_classifier, digits_cvae, data, mode, tune):
    before = deepcopy(digits_classifier.state_dict())
    config = replace(CONFIG, tune=tune)
    detector = CMGDetector(digits_classifier, digits_cvae, config, mode, SEED)
    assert detector.fit(train_loader(data)) is detector
    (run,) = run_stage2(inputs(digits_classifier, digits_cvae, data), config, [mode], [SEED]).runs
    features, head, *_ = split_model(digits_classifier, tune)
    for images in (data.test.images, *data.ood.values()):
        with torch.no_grad():
            logits = head_logits(head, run.last, features(to_float(images)))
            pretrained = head(features(to_float(images)))
        scores = detector.predict(to_float(images))
        torch.testing.assert_close(scores, SCORES[CONFIG.score_of(mode)](logits, 6), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(scores, SCORES[CONFIG.score_of(mode)](pretrained, 6), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(detector(to_float(images)), scores, rtol=0, atol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in digits_classifier.state_dict().items())


def test_images_with_negative_labels_are_ignored(digits_classifier, digits_cvae, data):
    plain = CMGDetector(digits_classifier, digits_cvae, CONFIG).fit(train_loader(data))
    bright = data.ood["bright"]
    mixed = labelled(bright, torch.full((len(bright),), -1)) + TinyBenchmark(data).train_set()
    found = CMGDetector(digits_classifier, digits_cvae, CONFIG).fit(DataLoader(mixed, batch_size=25))
    images = to_float(data.test.images)
    torch.testing.assert_close(found.predict(images), plain.predict(images), rtol=1e-4, atol=1e-5)
    features, labels = torch.randn(4, 128), torch.tensor([-1, -2, -1, -1])
    with pytest.raises(ValueError, match="no IND samples: every label is negative"):
        found.fit_features(features, labels)
    with pytest.raises(ValueError, match="a label is 6, expected less than config.num_ind, 6"):
        found.fit_features(features, torch.tensor([0, 6, 1, 2]))


def test_predicting_before_fitting_raises(digits_classifier, digits_cvae):
    detector = CMGDetector(digits_classifier, digits_cvae, CONFIG)
    with pytest.raises(RequiresFittingException):
        detector.predict(torch.zeros(1, 1, 8, 8))
    with pytest.raises(RequiresFittingException):
        detector.predict_features(torch.zeros(1, 128))


def test_it_has_networks_in_eval_mode_and_leaves_those_given_as_they_are(digits_classifier, digits_cvae, data):
    detector = CMGDetector(digits_classifier.train(), digits_cvae.train(), CONFIG).fit(train_loader(data))
    assert detector.requires_fit and digits_classifier.training and digits_cvae.training
    assert not any(module.training for module in (*detector.model.modules(), *detector.encoder.network.modules()))


def test_a_fitted_detector_has_a_threshold_and_is_saved(digits_classifier, digits_cvae, data, tmp_path):
    detector = CMGDetector(digits_classifier, digits_cvae, CONFIG, "CMG-softmax").fit(train_loader(data))
    images = to_float(data.train.images)
    assert detector.threshold_from == "IND training"
    assert (detector.predict(images) <= detector.threshold + 1e-6).double().mean() >= 0.95
    detector.save(tmp_path / "d.pt")
    loaded = CMGDetector.load(tmp_path / "d.pt", torch.device("cpu"))
    assert loaded.threshold == detector.threshold and loaded.classes == (0, 1, 2, 3, 4, 5)
    torch.testing.assert_close(loaded.predict(images), detector.predict(images))


def test_in_bf16_features_are_those_of_stage_2(digits_classifier, digits_cvae, data):
    detector = CMGDetector(digits_classifier, digits_cvae, FineTuneConfig(num_ind=6, sigma=3.0, precision="bf16"))
    images = to_float(data.test.images)
    with torch.no_grad():
        exact, found = digits_classifier.features(images), detector.encoder(images)
    expected = data.encode(for_inference(digits_classifier).features, "bf16").test
    assert found.dtype == torch.float32 and torch.equal(found, expected) and not torch.equal(found, exact)


# --- the example --------------------------------------------------------------------------------


def test_the_example_runs_in_the_library_benchmark(digits_classifier, digits_cvae, data):
    rows = example.compare(TinyBenchmark(data), digits_classifier, digits_cvae, CONFIG, SEED, batch_size=25)
    methods = ["MSP", "energy", "KNN", *MODES]
    assert [(row["ood_dataset"], row["method"]) for row in rows] == [(n, m) for n in data.ood for m in methods]
    found = {(row["ood_dataset"], row["method"]): row for row in rows}
    ours = run_stage2(inputs(digits_classifier, digits_cvae, data), CONFIG, list(MODES), [SEED]).detection()
    compared = [row for row in ours if row["at"] == "last" or row["method"] == "energy"]
    assert len(compared) == 2 * 3
    for row in compared:
        theirs = found[row["ood_dataset"], row["method"]]
        # The library's areas under precision and recall are by the trapezoidal rule, ours are average precisions.
        figures = {key: row[key] for key in ("auroc", "fpr95")}
        assert {key: theirs[key] for key in figures} == pytest.approx(figures, abs=1e-6)
    knn = [found[name, "KNN"] for name in data.ood]
    assert [row["auroc"] for row in knn] == pytest.approx(plain_knn(digits_classifier, data), abs=1e-6)
    lines = example.format_rows(rows).splitlines()
    assert lines[0].split("  ")[0] == "OOD set" and len(lines) == 13
    assert lines[1].split() == ["bright", "MSP"] + [
        f"{100 * found['bright', 'MSP'][key]:.2f}" for key in ("auroc", "fpr95", "aupr_out", "aupr_in")
    ]


def plain_knn(classifier, data: Stage2Data) -> list[float]:
    """AUROC of the distance to the 50th nearest training image, among features of length 1."""

    def directions(images):
        with torch.no_grad():
            return torch.nn.functional.normalize(classifier.features(to_float(images)).double())

    train = directions(data.train.images)
    ind, *oods = (
        torch.cdist(directions(images), train).kthvalue(50).values for images in (data.test.images, *data.ood.values())
    )
    return [detection_row("KNN", "", None, "", ind, ood)["auroc"] for ood in oods]


def test_the_example_encodes_each_image_once(digits_classifier, digits_cvae, data, monkeypatch):
    counted = []
    digits_classifier.register_forward_hook(lambda module, inputs, output: counted.append(len(output)))
    encode = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, images: (counted.append(len(images)), encode(self, images))[1])
    config = FineTuneConfig(num_ind=6, sigma=3.0, epochs=1, pseudo_pool=1)
    example.compare(TinyBenchmark(data), digits_classifier, digits_cvae, config, SEED, batch_size=25)
    test = 2 * 24 + 20 + 15
    assert sum(counted) == 60 + test + test  # once for features, once for logits


def test_the_example_as_a_command(digits_classifier, digits_cvae, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "TASK", "same_dataset_digits")
    monkeypatch.setattr(example, "PARTITION", "partition1")
    monkeypatch.setattr(example, "make_benchmark", lambda name, root, size: TinyBenchmark(data))
    save_checkpoint("c.pkl", digits_classifier.state_dict())
    save_checkpoint("v.pkl", digits_cvae.state_dict())
    argv = ["--params-dict-name", "c.pkl", "--params-dict-name2", "v.pkl", "--epochs", "1", "--seed", str(SEED)]
    argv += ["--device", "cpu", "--precision", "fp32"]
    assert run_command(example.main, example.get_parser(), argv) == 0
    config = FineTuneConfig(num_ind=6, sigma=3.0, epochs=1)
    rows = example.compare(TinyBenchmark(data), digits_classifier, digits_cvae, config, SEED, batch_size=128)
    assert capsys.readouterr().out.endswith(f"\n{example.format_rows(rows)}\n")


def test_missing_networks_and_data_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(example.main, example.get_parser(), ["--device", "cpu"]) == 2
    printed = capsys.readouterr().err
    assert "different_dataset_all_classifier.pkl: no such file" in printed and printed.count("\n") == 1

    def fail(*arguments):
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr("pytorch_ood.benchmark.CIFAR10_ODIN", fail)
    with pytest.raises(UserError, match=r"--benchmark odin: its data sets are not all in .*\(no route to host\)\. Fix"):
        example.make_benchmark("odin", tmp_path / "data", 32)


def test_the_benchmark_is_given_colour_images_of_the_right_size(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr("pytorch_ood.benchmark.CIFAR10_OpenOOD", lambda root, transform: (root, transform))
    root, transform = example.make_benchmark("openood", tmp_path / "data", 32)
    assert root == str(tmp_path / "data") and Path(root).is_dir()
    image = transform(Image.new("L", (36, 50), 51))
    assert image.shape == (3, 32, 32) and torch.equal(image, torch.full((3, 32, 32), 0.2))
