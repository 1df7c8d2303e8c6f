"""CSI's commands, run in their folder: the whole chain on a handful of digits."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csi.before_and_after import before_and_after
from csi.network import CSINet
from csi.optimizers import warmup_cosine
from csi.options import root
from csi.stages import TRAININGS

import train as root_train
from cli.errors import Stopped, run_command
from cmg.config import FineTuneConfig
from cmg.data import Stage2Data
from cmg.stage2 import Stage2
from datasets.datasetsHelper import Images
from datasets.tasks import TASKS
from models.vae import ConditionalVAE
from tests import tiny_data
from training.config import LoopConfig
from training.loop import fit
from training.processes import Processes
from training.run_state import Recorder
from utils import load_checkpoint

FOLDER = Path(__file__).resolve().parents[1] / "CSI+CMG"
FEW = ["--val-fraction", "0.9"]  # so that only a tenth of the 722 digits is trained on


def command(name: str):
    """CSI's module of that name, which the root has too."""
    spec = importlib.util.spec_from_file_location(f"csi_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *argv: object) -> int:
    module = command(name)
    return run_command(module.main, module.get_parser(), [str(a) for a in argv])


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A folder with representation.pkl, csi.pkl and cvae.pkl of a few steps each."""
    folder = tmp_path_factory.mktemp("csi")
    small = ["--dataset", "digits", "--device", "cpu", "--precision", "fp32"]
    representation = ["--width", 2, "--epochs", 2, "--warmup", 1, "--batch_size", 32, *FEW]
    linear = ["--load_path", folder / "representation.pkl", "--epochs", 2, "--batch_size", 32]
    for mode, name, options in (("simclr", "representation", representation), ("linear", "csi", linear)):
        mode = {"simclr": "sup_simclr_CSI", "linear": "sup_CSI_linear"}[mode]
        files = ["--params-dict-name", folder / f"{name}.pkl", "--log", folder / f"{name}.log"]
        assert run("train", "--mode", mode, *small, *options, *files) == 0
    cvae = ["--task", "same_dataset_digits_rgb", "--command", "train_cvae", "--epochs", "1", "--device", "cpu", *FEW]
    argv = [*cvae, "--params-dict-name", str(folder / "cvae.pkl")]
    assert run_command(root_train.main, root_train.get_parser(), argv) == 0
    return folder


def test_training_leaves_checkpoints_and_logs(chain):
    assert {p.name for p in chain.iterdir()} >= {"representation.pkl", "csi.pkl", "cvae.pkl"}
    assert not list(chain.glob("*.resume"))
    representation, csi = (load_checkpoint(chain / f"{name}.pkl") for name in ("representation", "csi"))
    assert representation.origin["command"] == "sup_simclr_CSI" and csi.origin["val_fraction"] == 0.9
    changed = {name for name, tensor in csi.items() if not torch.equal(tensor, representation[name])}
    layers = ("linear", "shift_cls_layer", "joint_distribution_layer")
    assert changed == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    lines = [json.loads(line) for line in (chain / "representation.log").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    # 72 digits in batches of 32 are 3 steps: the last one of each epoch is 2/3 of an epoch in.
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.7, warmup_cosine(5 / 3, 1.0, 1, 2)])


def test_a_finished_training_is_not_repeated(chain, capsys):
    what = ["--dataset", "digits", "--device", "cpu", "--precision", "fp32", "--width", 2, "--epochs", 2, "--warmup", 1]
    again = [*what, "--batch_size", 32, *FEW, "--params-dict-name", chain / "representation.pkl"]
    assert run("train", *again) == 0
    assert "already complete" in capsys.readouterr().out
    assert run("train", *again, "--lr", 0.5) == 2
    assert "learning_rate was 1.0, is 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "option", "value", "other"),
    [
        ("sup_CSI_linear", "--width", 8, "sup_simclr_CSI"),
        ("sup_CSI_linear", "--warmup", 2, "sup_simclr_CSI"),
        ("sup_CSI_linear", "--val-fraction", 0.1, "sup_simclr_CSI"),
        ("sup_simclr_CSI", "--load_path", "x.pkl", "sup_CSI_linear"),
    ],
)
def test_training_refuses_options_of_the_other_mode(tmp_path, capsys, mode, option, value, other):
    files = ["--params-dict-name", tmp_path / "new" / "x.pkl"]
    assert run("train", "--mode", mode, "--dataset", "digits", "--device", "cpu", option, value, *files) == 2
    assert capsys.readouterr().err == f"train: error: {option} goes with --mode {other} only; leave it out\n"
    assert not any(tmp_path.iterdir())


def test_eval_writes_every_metric(chain, tmp_path, capsys):
    output = tmp_path / "eval.json"
    assert (
        run("eval", "--dataset", "digits", "--device", "cpu", "--load_path", chain / "csi.pkl", "--output", output) == 0
    )
    assert "rotation ensemble" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert [row["method"] for row in result["ind"]] == ["CSI, single view", "CSI, rotation ensemble"]
    assert [row["method"] for row in result["detection"]] == ["CSI, single view", "CSI, rotation ensemble"]
    assert all(0 <= row["auroc"] <= 1 for row in result["detection"])
    assert result["images"] == {"IND test": 361, "held-out-classes": 238}


def test_eval_of_one_mode_prints_only_that(chain, tmp_path, capsys):
    options = ["--dataset", "digits", "--load_path", chain / "csi.pkl", "--output", tmp_path / "x.json"]
    assert run("eval", "--mode", "test_acc", *options) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out and "AUROC" not in out and "ensemble" not in out


def test_eval_refuses_a_bare_representation(chain, tmp_path, capsys):
    options = ["--dataset", "digits", "--load_path", chain / "representation.pkl", "--output", tmp_path / "x.json"]
    assert run("eval", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "sup_CSI_linear" in error


def main_options(chain: Path, output: Path) -> list[object]:
    networks = ["--params-dict-name", chain / "csi.pkl", "--params-dict-name2", chain / "cvae.pkl"]
    return ["--dataset", "digits", "--device", "cpu", *networks, "--epochs", 2, "--eval-every", 1, "--output", output]


def test_main_reports_before_and_after(chain, tmp_path, capsys):
    output = tmp_path / "main.json"
    assert run("main", *main_options(chain, output), "--seeds", 1, 2) == 0
    out = capsys.readouterr().out
    assert "CSI, rotation ensemble" in out and "CMG-energy" in out
    result = json.loads(output.read_text())
    rows = {(row["method"], row["at"], row["seed"]) for row in result["detection"]}
    before = {("CSI, single view", "pretrained", None), ("CSI, rotation ensemble", "pretrained", None)}
    after = {("CMG-energy", at, seed) for at in ("last", "validated", "max") for seed in (1, 2)}
    assert rows == before | after | {("energy", "pretrained", None)}
    assert [check["step"] for check in result["runs"][0]["curve"]] == [0, 1, 2]


def test_main_names_what_is_missing(chain, tmp_path, capsys):
    assert (
        run("main", "--dataset", "digits", "--params-dict-name", tmp_path / "none.pkl", "--output", tmp_path / "o") == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no such file" in error and "python -m train --mode sup_CSI_linear" in error
    cvae = tmp_path / "none.pkl"
    options = ["--params-dict-name", chain / "csi.pkl", "--params-dict-name2", cvae, "--output", tmp_path / "o"]
    assert run("main", "--dataset", "digits", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "root, with: python -m train --task same_dataset_digits_rgb --partition" in error


@pytest.mark.parametrize("train_bn1", [False, True])
def test_main_leaves_the_network_bit_equal(train_bn1, monkeypatch):
    found, results = [], Stage2.results
    monkeypatch.setattr(Stage2, "results", lambda *args: found.append(results(*args)) or found[-1])
    torch.manual_seed(0)
    network, cvae = CSINet(classes=2, width=2), ConditionalVAE(4, 3, 32, 10, "narrow")
    for frozen in (network, cvae):
        frozen.eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = Images(torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8), torch.arange(12) % 2)
    data = Stage2Data(images, images.at(torch.arange(0)), images, {"noise": images.images})
    config = FineTuneConfig(num_ind=2, epochs=2, batch_size=6, learning_rate=1e-2, eval_every=4, sigma=5.0)
    before_and_after(network, cvae, data, config, [1, 2], train_bn1)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    tuned = {"linear.weight", "linear.bias", "bn1.weight", "bn1.bias"} if train_bn1 else {"weight", "bias"}
    assert len(found[0].runs) == 2
    for run in found[0].runs:
        assert set(run.last) == tuned
        for name, tensor in run.last.items():
            assert not torch.equal(tensor, before[name if train_bn1 else f"linear.{name}"]), name


def test_an_interrupted_representation_resumes_exactly(tmp_path):
    images = Images(torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8), torch.arange(10) % 2)
    config = LoopConfig(epochs=3, batch_size=4, learning_rate=1.0, seed=1, precision="fp32")
    training = TRAININGS["sup_simclr_CSI"]

    def train(recorder: Recorder) -> CSINet:
        torch.manual_seed(0)
        model = CSINet(classes=2, width=2)
        optimizer = training.prepare(model, 1.0)
        schedule = lambda progress: training.schedule(progress, 1.0, 1, 3)  # noqa: E731
        processes = Processes(torch.device("cpu"))
        fit(model, optimizer, images, training.objective(2), config, processes, recorder, schedule=schedule)
        return model

    def stop(line: dict) -> None:
        if line["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = train(Recorder(name="whole"))
    with pytest.raises(Stopped):
        train(Recorder(name="stopped", resume=tmp_path / "x.resume", watch=stop))
    resumed = train(Recorder(name="resumed", resume=tmp_path / "x.resume"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("name", ["train", "eval", "main"])
def test_help_in_the_folder_is_csis_own(name):
    reply = subprocess.run(
        [sys.executable, "-m", name, "--help"], cwd=FOLDER, capture_output=True, text=True, check=True
    )
    assert "--dataset {cifar10,digits,custom}" in " ".join(reply.stdout.split())


def test_all_six_ood_sets_of_cifar10_in_one_run(tmp_path, monkeypatch):
    from training.checkpoints import save_network
    from training.train_cvae import build_cvae

    tiny_data.write_cifar10(tmp_path, 10)
    tiny_data.write_cifar100(tmp_path, 10)
    tiny_data.write_svhn(tmp_path, 10)
    for folder in ("LSUN_resize", "LSUN_fix", "Imagenet_resize", "Imagenet_fix"):
        tiny_data.write_folder(tmp_path, folder, 10)
    tiny_data.write_folder(tmp_path, "planes", 4, size=50)
    # An authors' checkpoint: a plain dict of tensors, written from several GPUs.
    state = {f"module.{name}": tensor for name, tensor in CSINet(width=2).state_dict().items()}
    torch.save(state, tmp_path / "authors.model")
    save_network(tmp_path / "cvae.pkl", build_cvae(TASKS["different_dataset"]), {})
    output = tmp_path / "main.json"
    networks = ["--params-dict-name", tmp_path / "authors.model", "--params-dict-name2", tmp_path / "cvae.pkl"]
    options = ["--data-dir", tmp_path, "--device", "cpu", "--epochs", 1, "--output", output]
    assert run("main", *networks, *options, "--ood-dir", tmp_path / "planes") == 0
    result = json.loads(output.read_text())
    names = list(dict.fromkeys(row["ood_dataset"] for row in result["detection"]))
    assert names == ["SVHN", "LSUN", "LSUN-FIX", "tinyImageNet", "ImageNet-FIX", "CIFAR100", "planes"]
    assert result["images"]["planes"] == 4 and result["dataset"] == "cifar10"
    assert result["config"]["sigma"] == 5.0 and result["config"]["eval_every"] == 100


# --- the user's own images ----------------------------------------------------------------------


@pytest.fixture
def own_images(tmp_path, monkeypatch) -> list[str]:
    """The options of a task of two classes; the working directory is a CSI+CMG beside which everything is written."""
    for split, count in (("train", 9), ("test", 4)):
        for name in ("crow", "duck"):
            tiny_data.write_folder(tmp_path / "birds" / split, name, count, size=40)
    tiny_data.write_folder(tmp_path, "insects", 5)
    (tmp_path / "CSI+CMG").mkdir()
    monkeypatch.chdir(tmp_path / "CSI+CMG")
    return ["--task", "custom", "--ind-dir", "../birds", "--ood-dir", "../insects", "--device", "cpu"]


def test_own_images_through_the_whole_chain(own_images, tmp_path, capsys):
    small = ["--epochs", 2, "--batch_size", 9, "--precision", "fp32"]
    assert run("train", *own_images, *small, "--mode", "sup_simclr_CSI", "--width", 2, "--warmup", 1) == 0
    assert run("train", *own_images, *small, "--mode", "sup_CSI_linear") == 0
    assert run("eval", *own_images) == run("eval", *own_images, "--precision", "fp32") == 0
    assert run("main", *own_images) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "it should hold the CVAE. Make it, in the repository's root, with: " in error
    advice = shlex.split(error.split("root, with: ")[1])[3:]  # in the root, where ../birds is another folder
    assert run_command(root_train.main, root_train.get_parser(), [*advice, "--epochs", "1", "--device", "cpu"]) == 0
    assert run("main", *own_images, "--epochs", 1, "--precision", "fp32") == 0

    name = "custom_birds_3x32"
    files = [f"{name}_all_cvae.pkl", f"csi_{name}.pkl", f"csi_{name}_representation.pkl"]
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == sorted(files)
    assert len(load_checkpoint(tmp_path / "ckpt" / f"csi_{name}.pkl")["linear.bias"]) == 2
    results = {file: json.loads((tmp_path / "results" / file).read_text()) for file in os.listdir(tmp_path / "results")}
    own = "ood_dir-insects"
    evaluated = {f"csi_{name}_eval_{own}.json", f"csi_{name}_eval_precision-fp32_{own}.json"}
    assert set(results) == evaluated | {f"csi_cmg_{name}_seed123_epochs-1_precision-fp32_{own}.json"}
    for result in results.values():
        assert result["dataset"] == name and (result["images"]["IND test"], result["images"]["insects"]) == (8, 5)
        assert {row["ood_dataset"] for row in result["detection"]} == {"insects"}


def test_own_images_need_an_ood_folder_for_detection_only(own_images, tmp_path, capsys):
    options = [*own_images[:4], "--device", "cpu"]
    for name in ("eval", "main"):
        assert run(name, *options) == 2
        error = capsys.readouterr().err
        assert "custom_birds_3x32 has no OOD images; name a folder of them with --ood-dir DIR" in error
    assert run("eval", *options, "--mode", "test_acc") == 2
    error = capsys.readouterr().err
    assert "../ckpt/csi_custom_birds_3x32.pkl: no such file" in error and error.count("\n") == 1
    advice = shlex.split(error.split("in CSI+CMG, with: ")[1])[3:]
    args = command("train").get_parser().parse_args(advice)
    assert (args.mode, args.dataset, args.ind_dir) == ("sup_CSI_linear", "custom", tmp_path / "birds")


@pytest.mark.parametrize("name", ["train", "eval", "main"])
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "custom"], "--task custom needs --ind-dir DIR"),
        (["--task", "custom", "--ind-dir", "nowhere"], "nowhere/train: No such file or directory; expected a folder"),
        (["--ind-dir", "../birds"], "--ind-dir goes with --task custom only; different_dataset has its own images"),
        (["--ood-dir", "nowhere"], "--ood-dir nowhere: no such folder; expected a folder of images"),
        (
            ["--task", "custom", "--ind-dir", "../birds", "--image-size", "28"],
            "CSI takes images of 3 channels and 32x32 pixels only; leave out --grey and --image-size",
        ),
        (
            ["--task", "custom", "--ind-dir", "../birds", "--grey"],
            "CSI takes images of 3 channels and 32x32 pixels only; leave out --grey and --image-size",
        ),
    ],
)
def test_arguments_that_do_not_go_with_csi(own_images, tmp_path, capsys, name, argv, message):
    assert run(name, *argv, "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CSI+CMG", "birds", "insects"]


def test_the_layers_are_not_written_over_the_representation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.pkl").write_bytes(b"precious")
    options = [
        "--dataset",
        "digits",
        "--mode",
        "sup_CSI_linear",
        "--load_path",
        "r.pkl",
        "--device",
        "cpu",
        "--restart",
    ]
    for more in (["--params-dict-name", "r.pkl"], ["--log", "r.pkl"]):
        assert run("train", *options, *more) == 2
        assert "cannot write r.pkl: it is read by this command" in capsys.readouterr().err
    assert Path("r.pkl").read_bytes() == b"precious"


def test_from_the_root_the_commands_mean_the_same_places(monkeypatch):
    for place in (FOLDER.parent, FOLDER):
        monkeypatch.chdir(place)
        assert root().resolve() == FOLDER.parent.resolve()
