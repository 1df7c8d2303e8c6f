"""Files of weights as people have them: wrapped, prefixed, with numbers of numpy, not finite, of another kind."""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch

from csi.network import CSINet, load_csi

import eval as evaluate
import train
from cli.errors import UserError, run_command
from cmg.config import FineTuneConfig
from cmg.detector import CMGDetector, DetectorConfig
from cmg.predict import predict_files
from datasets.tasks import TASKS
from training.checkpoints import load_network, read_state, save_network
from training.train_classifier import build_classifier
from training.train_cvae import build_cvae
from utils import load_checkpoint, save_checkpoint

TASK = TASKS["same_dataset_digits"]
CPU = torch.device("cpu")
PARTS = {"classifier": build_classifier, "cvae": build_cvae}


def load(path, model):
    return load_network(path, model, "the classifier", {}, "REMEDY")


def same_weights(one, other) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


# --- looked through -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_are_taken_off_and_named(tmp_path, capsys, prefix):
    model, other = build_classifier(TASK), build_classifier(TASK)
    save_checkpoint(tmp_path / "c.pkl", {f"{prefix}{name}": t for name, t in model.state_dict().items()})
    assert load(tmp_path / "c.pkl", other) == {} and same_weights(model, other)
    count = len(model.state_dict())
    assert capsys.readouterr().out == f"{tmp_path}/c.pkl: removed the prefix {prefix} from its {count} names\n"


def test_an_averaged_model_is_read_without_its_counter(tmp_path, capsys):
    model, other = build_classifier(TASK), build_classifier(TASK)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    save_checkpoint(tmp_path / "c.pkl", averaged.state_dict())
    load(tmp_path / "c.pkl", other)
    assert same_weights(model, other) and "removed the prefix module." in capsys.readouterr().out


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_wrappers_are_looked_through_and_named(tmp_path, capsys, key):
    model, other = build_classifier(TASK), build_classifier(TASK)
    beside = {"epoch": 3, "best": np.float64(math.inf), "step": np.int64(7), "curve": np.zeros(2), "optimizer": {}}
    save_checkpoint(tmp_path / "c.pkl", {key: model.state_dict()} | beside)
    load(tmp_path / "c.pkl", other)
    assert same_weights(model, other)
    assert capsys.readouterr().out == f"{tmp_path}/c.pkl: took the weights that it holds as {key!r}\n"


def test_a_wrapped_and_prefixed_csi_network_of_a_compiled_training(tmp_path, capsys):
    model = CSINet(classes=10, width=2)
    state = {f"module._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path / "csi.model", {"model": {"state_dict": state}, "loss": np.float32(0.5)})
    loaded, _ = load_csi(tmp_path / "csi.model", 10, {}, "")
    assert same_weights(model, loaded)
    assert [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "took the weights that it holds as 'model'",
        "took the weights that it holds as 'state_dict'",
        f"removed the prefix module._orig_mod. from its {len(state)} names",
    ]


def test_what_a_wrapped_checkpoint_of_ours_was_made_for_is_known(tmp_path):
    model = build_classifier(TASK)
    save_network(tmp_path / "c.pkl", model, {"task": "another"})
    save_checkpoint(tmp_path / "w.pkl", {"state_dict": load_checkpoint(tmp_path / "c.pkl")})
    with pytest.raises(UserError, match=r"w\.pkl: was made for task another, expected mine\. REMEDY"):
        load_network(tmp_path / "w.pkl", model, "the classifier", {"task": "mine"}, "REMEDY")


@pytest.mark.parametrize(
    "value", [np.float64(2.5), np.float32(1), np.int64(3), np.bool_(True), np.str_("a"), np.arange(3), np.ones((2, 2))]
)
def test_values_of_numpy_beside_the_weights_run_no_code(tmp_path, value):
    save_checkpoint(tmp_path / "c.pkl", {"weights": torch.ones(1), "more": value})
    assert np.array_equal(load_checkpoint(tmp_path / "c.pkl")["more"], value)


# --- refused ------------------------------------------------------------------------------------


def test_where_the_weights_seem_to_be_is_said(tmp_path):
    weights = {"w": torch.ones(1)}
    save_checkpoint(tmp_path / "c.pkl", {"net": weights, "ema": {"deep": weights}, "epoch": 1})
    with pytest.raises(UserError) as refusal:
        read_state(tmp_path / "c.pkl", "the classifier", "REMEDY")
    assert str(refusal.value) == (
        f"{tmp_path}/c.pkl: holds no weights itself; they seem to be in ['net'], ['ema']['deep']. "
        "Save those of the classifier alone, with torch.save"
    )


def test_an_object_beside_the_weights_is_named_with_the_way_out(tmp_path):
    torch.save(
        {"state_dict": build_classifier(TASK).state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "c.pkl"
    )
    with pytest.raises(UserError) as refusal:
        read_state(tmp_path / "c.pkl", "the classifier", "REMEDY")
    assert str(refusal.value) == (
        f"{tmp_path}/c.pkl: holds argparse.Namespace, which could run code; expected a dict of tensors written by "
        "torch.save. Where you trust it, load it and save its weights alone: torch.save(network.state_dict(), FILE)"
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"detector": {}, "model": {}}, "a detector that eval saved"),
        ({"identity": {}, "model": {}}, "the state of a training that has not come to its end"),
    ],
)
def test_other_files_of_ours_are_not_taken_for_a_network(tmp_path, content, what):
    save_checkpoint(tmp_path / "c.pkl", content)
    with pytest.raises(UserError, match=rf"c\.pkl: is {what}, not the classifier\. REMEDY$"):
        read_state(tmp_path / "c.pkl", "the classifier", "REMEDY")


@pytest.mark.parametrize("share", ["0.1", None, math.nan, 7.0, 1.0, -0.1])
def test_a_damaged_record_of_how_a_network_was_made_is_one_line(tmp_path, share):
    save_network(tmp_path / "c.pkl", build_classifier(TASK), {"val_fraction": share})
    with pytest.raises(UserError, match=r"c\.pkl: what it says of how it was made is damaged\. REMEDY$"):
        load(tmp_path / "c.pkl", build_classifier(TASK))


# --- not finite ---------------------------------------------------------------------------------


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """Untrained networks of the digits, c.pkl and v.pkl; the words of `eval` for them."""
    monkeypatch.chdir(tmp_path)
    for file, build in (("c.pkl", build_classifier), ("v.pkl", build_cvae)):
        torch.manual_seed(0)
        save_checkpoint(file, build(TASK).state_dict())
    argv = ["--params-dict-name", "c.pkl", "--params-dict-name2", "v.pkl", "--epochs", "1", "--precision", "fp32"]
    return [*argv, "--device", "cpu", "--mode", "CMG-energy", "--output", "r.json"]


def spoil(file: str, name: str, value: float) -> None:
    state = dict(load_checkpoint(file))
    state[name].view(-1)[0] = value
    save_checkpoint(file, state)


@pytest.mark.parametrize(("file", "name"), [("c.pkl", "classifier.fc2.weight"), ("v.pkl", "fcE_mean.bias")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_eval_refuses_weights_that_are_not_finite_by_name(networks, tmp_path, capsys, file, name, value):
    spoil(file, name, value)
    assert run_command(evaluate.main, evaluate.get_parser(), networks) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"eval: error: {file}: 1 of the ") and f" values of {name} are not finite. Make" in error
    assert error.count("\n") == 1 and not (tmp_path / "r.json").exists()


def test_train_does_not_take_weights_that_are_not_finite_for_done(networks, capsys):
    spoil("c.pkl", "classifier.fc2.weight", math.nan)
    assert run_command(train.main, train.get_parser(), ["--params-dict-name", "c.pkl", "--device", "cpu"]) == 2
    assert "values of classifier.fc2.weight are not finite. Replace it with --restart" in capsys.readouterr().err


def test_csi_refuses_weights_that_are_not_finite_by_name(tmp_path):
    state = CSINet(classes=10, width=2).state_dict()
    state["linear.bias"][3] = math.nan
    save_checkpoint(tmp_path / "x.model", state)
    with pytest.raises(UserError, match=r"x\.model: 1 of the 10 values of linear\.bias are not finite\. REMEDY$"):
        load_csi(tmp_path / "x.model", 10, {}, "REMEDY")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bias: bias.to("meta"), "the tensor classifier.fc2.bias is without values; expected an ordinary one of"),
        (
            lambda bias: bias.to_sparse(),
            "the tensor classifier.fc2.bias is sparse_coo of float32; expected an ordinary",
        ),
        (lambda bias: bias.to(torch.complex64), "the tensor classifier.fc2.bias is strided of complex64; expected an"),
        (
            lambda bias: torch.nested.nested_tensor([bias, bias], layout=torch.strided),
            "the tensor classifier.fc2.bias is nested of float32; expected an ordinary",
        ),
        (lambda bias: bias.to(torch.int64), "classifier.fc2.bias holds torch.int64, expected torch.float32"),
        (lambda bias: bias.tolist(), "classifier.fc2.bias is of the kind list, expected a tensor"),
    ],
)
def test_tensors_of_another_kind_are_refused_rather_than_converted(tmp_path, change, message):
    model = build_classifier(TASKS["same_dataset_digits"])
    state = dict(model.state_dict())
    state["classifier.fc2.bias"] = change(state["classifier.fc2.bias"])
    torch.save(state, tmp_path / "c.pkl")
    with pytest.raises(UserError) as refusal:
        load_network(tmp_path / "c.pkl", model, "the classifier", {}, "Remedy")
    assert str(refusal.value).startswith(f"{tmp_path}/c.pkl: {message}") and str(refusal.value).endswith(". Remedy")


@pytest.mark.parametrize("versions", [["x"], {"": 1}, {"": {"version": "two"}}])
def test_what_a_state_dict_says_of_its_modules_is_not_read(tmp_path, versions):
    model, other = build_classifier(TASKS["same_dataset_digits"]), build_classifier(TASKS["same_dataset_digits"])
    state = model.state_dict()
    state._metadata = versions if isinstance(versions, list) else dict.fromkeys(state._metadata, versions[""])
    torch.save(state, tmp_path / "c.pkl")
    load_network(tmp_path / "c.pkl", other, "the classifier", {}, "Remedy")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


def test_half_precision_is_taken_and_variances_below_0_are_not(tmp_path):
    model = build_classifier(TASKS["same_dataset_digits"])
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    torch.save(state, tmp_path / "c.pkl")
    assert load_network(tmp_path / "c.pkl", model, "the classifier", {}, "Remedy") == {}
    state["convE.bn1.running_var"][0] = -1
    torch.save(state, tmp_path / "c.pkl")
    with pytest.raises(UserError, match=r"c\.pkl: convE\.bn1\.running_var holds variances below 0\. Remedy$"):
        load_network(tmp_path / "c.pkl", model, "the classifier", {}, "Remedy")


def detector_content() -> dict:
    config = DetectorConfig(
        task="t", classes=("a", "b"), image_size=8, image_channels=1, logits=3, networks="mnist", score="CMG-energy",
        threshold=0.5, threshold_from="IND test",
    )  # fmt: skip
    from models.main_model import MainModel

    return {"detector": vars(config), "model": dict(MainModel(8, 1, 3, "mnist").state_dict()), "origin": {}}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"threshold": math.nan}, "the threshold is nan, expected a finite number. Make one with"),
        ({"threshold": -math.inf}, "the threshold is -inf, expected a finite number. Make one with"),
        ({"threshold": None}, "its classes, score and threshold do not go with its network. Make one with"),
        ({"score": "another"}, "its classes, score and threshold do not go with its network. Make one with"),
        ({"classes": ("a", "b", "c", "d")}, "its classes, score and threshold do not go with its network. Make one"),
        ({"classes": 3}, "its classes, score and threshold do not go with its network. Make one with"),
        ({"classes": ("a", "a")}, "its classes, score and threshold do not go with its network. Make one with"),
        ({"precision": "int3"}, "its classes, score and threshold do not go with its network. Make one with"),
        ({"threshold_from": 17}, "its classes, score and threshold do not go with its network. Make one with"),
        ({"logits": 4}, "classifier.fc2.weight is [3, 512], expected [4, 512]: it is the network that this detector"),
        ({"networks": "nowhere"}, "is not a detector. Make one with"),
    ],
)
def test_detectors_of_wrong_content_are_refused(tmp_path, changed, message):
    content = detector_content()
    content["detector"] |= changed
    save_checkpoint(tmp_path / "d.pt", content)
    with pytest.raises(UserError) as refusal:
        CMGDetector.load(tmp_path / "d.pt", CPU)
    assert str(refusal.value).startswith(f"{tmp_path}/d.pt: {message}")


def test_a_detector_with_a_weight_that_is_not_finite_is_refused(tmp_path):
    content = detector_content()
    content["model"]["classifier.fc2.bias"][1] = math.nan
    save_checkpoint(tmp_path / "d.pt", content)
    with pytest.raises(
        UserError,
        match=r"d\.pt: 1 of the 3 values of classifier\.fc2\.bias are not finite\. Make one with: python",
    ):
        CMGDetector.load(tmp_path / "d.pt", CPU)


def test_a_score_that_is_not_finite_gets_no_verdict(tmp_path):
    from PIL import Image

    from models.main_model import MainModel

    content = detector_content()
    content["model"]["classifier.fc2.bias"].fill_(3e38)
    content["model"]["classifier.fc2.weight"].fill_(3e38)  # finite, but no logit is
    model = MainModel(8, 1, 3, "mnist")
    model.load_state_dict(content["model"])
    Image.new("L", (8, 8), 200).save(tmp_path / "a.png")
    detector = CMGDetector(model, None, FineTuneConfig(num_ind=2, sigma=1.0)).adopt(model.classifier.state_dict())
    (found,) = predict_files(detector, [tmp_path / "a.png"], 1)
    assert found.verdict is None and found.label is None
    assert found.error.startswith(f"{tmp_path}/a.png: its score is ")
    assert found.error.endswith(", no finite number: there is no verdict")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("step"), "is not a state of a training. Start over with --restart"),
        (lambda saved: saved.update(history=[1]), "is not a state of a training. Start over with --restart"),
        (lambda saved: saved["model"].popitem(), "is not a state of this training ("),
        (lambda saved: saved.update(optimizer={"a": 1}), "is not a state of this training ("),
        (lambda saved: saved["model"]["5.bias"].fill_(math.nan), "11 of the 11 values of 5.bias are not finite. Start"),
    ],
)
def test_a_state_of_wrong_content_is_one_line(tmp_path, capsys, monkeypatch, change, message):
    from dataclasses import replace

    from tests.children import build_tiny
    from training import run_state
    from training.stages import STAGES

    stage = STAGES["train_classifier"]
    monkeypatch.setitem(STAGES, "train_classifier", replace(stage, build=build_tiny))
    argv = ["--params-dict-name", str(tmp_path / "c.pkl"), "--epochs", "2", "--device", "cpu", "--save-every", "1"]
    save = run_state.RunState.save

    def save_and_stop(state):
        save(state)
        raise UserError("stopped after the first epoch")

    with monkeypatch.context() as patch:
        patch.setattr(run_state.RunState, "save", save_and_stop)
        assert run_command(train.main, train.get_parser(), argv) == 2
    saved = load_checkpoint(tmp_path / "c.pkl.resume")
    change(saved)
    save_checkpoint(tmp_path / "c.pkl.resume", saved)
    capsys.readouterr()
    assert run_command(train.main, train.get_parser(), argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train: error: {tmp_path}/c.pkl.resume: {message}") and error.count("\n") == 1


def test_weights_that_end_up_not_finite_are_not_written(tmp_path, monkeypatch, capsys):
    """Though every loss was finite: the last step took them there."""
    from dataclasses import replace

    from tests.children import build_tiny
    from training import run_state
    from training.stages import STAGES

    monkeypatch.setitem(STAGES, "train_classifier", replace(STAGES["train_classifier"], build=build_tiny))
    end_epoch = run_state.RunState.end_epoch

    def spoil_and_end(state, *rest):
        with torch.no_grad():
            state.model[5].bias[0] = math.nan
        end_epoch(state, *rest)

    monkeypatch.setattr(run_state.RunState, "end_epoch", spoil_and_end)
    argv = ["--params-dict-name", str(tmp_path / "c.pkl"), "--epochs", "1", "--device", "cpu"]
    assert run_command(train.main, train.get_parser(), argv) == 2
    message = "5.bias is not finite any more in epoch 1: lower --lr; nothing is saved"
    assert capsys.readouterr().err == f"train: error: {message}\n" and list(tmp_path.iterdir()) == []


# --- damaged on the way, or not what it seems ---------------------------------------------------


def test_a_bit_that_a_disk_has_lost_is_noticed(tmp_path):
    save_checkpoint(tmp_path / "c.pkl", build_classifier(TASK).state_dict())
    content = bytearray((tmp_path / "c.pkl").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "c.pkl").write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"c\.pkl: is not a checkpoint or is damaged"):
        load_checkpoint(tmp_path / "c.pkl")


def repeated(state: dict) -> dict:
    return state | {"classifier.fc2.bias": torch.zeros(1).expand(10**12)}


def too_large(state: dict) -> dict:
    return state | {"classifier.fc2.bias": torch.full((11,), 1e300, dtype=torch.float64)}


def of_itself(state: dict) -> dict:
    whole = {"epoch": 3}
    whole["state_dict"] = whole
    return whole


def not_plain(state: dict) -> dict:
    state = OrderedDict(state)
    state.origin = {"val_fraction": 0.1, "loss": math.nan}
    return state


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (repeated, "the tensor classifier.fc2.bias shows more values than it holds"),
        (too_large, "classifier.fc2.bias holds numbers too large for torch.float32"),
        (of_itself, "is not the classifier"),
        (not_plain, "what it says of how it was made is damaged"),
        (lambda state: {"convE.std": torch.zeros(3)}, "convE.std holds deviations that are not above 0"),
    ],
)
def test_checkpoints_that_are_not_what_they_seem(tmp_path, spoiled, message):
    torch.save(spoiled(build_classifier(TASK).state_dict()), tmp_path / "c.pkl")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "c.pkl", build_classifier(TASK))


def test_numbers_of_8_bits_are_taken(tmp_path):
    state = build_classifier(TASK).state_dict()
    eight = {k: v.to(torch.float8_e4m3fn) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(eight, tmp_path / "c.pkl")
    network = build_classifier(TASK)
    load(tmp_path / "c.pkl", network)
    expected = state["classifier.fc2.bias"].to(torch.float8_e4m3fn).float()
    assert torch.equal(network.state_dict()["classifier.fc2.bias"], expected)


def test_of_two_wrappers_the_one_with_weights_is_taken(tmp_path, capsys):
    torch.save({"state_dict": {"epoch": 3}, "model": build_classifier(TASK).state_dict()}, tmp_path / "c.pkl")
    load(tmp_path / "c.pkl", build_classifier(TASK))
    assert "took the weights that it holds as 'model'" in capsys.readouterr().out


def test_a_torchscript_program_is_called_so(tmp_path, recwarn):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "c.pkl")
    recwarn.clear()
    with pytest.raises(UserError, match=r"holds a TorchScript program; .*: save its state_dict\(\)"):
        load_checkpoint(tmp_path / "c.pkl")
    assert not recwarn.list
