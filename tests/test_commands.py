"""The commands from end to end: on tiny files in the true formats, and every way in which they may fail."""

from __future__ import annotations

import builtins
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import eval
import train
from cli.errors import UserError, run_command
from cli.files import check_outputs
from cli.options import changed_options, options_given
from cmg import losses
from cmg.config import FineTuneConfig, with_recipe
from datasets import obtain
from datasets.archives import FetchError
from datasets.datasetsHelper import READERS, Images, load_ind
from datasets.obtain import files_read
from datasets.sources import SOURCES
from datasets.tasks import TASKS, Experiment
from evaluation.baselines import POST_HOC
from evaluation.plots import tile
from figure import samples
from reproduction import ablations
from tests import tiny_data
from tests.commands import error_of, run
from training.config import LoopConfig, RunOptions, TrainingOptions
from utils import generator, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[1]
DIGITS = Experiment.of("same_dataset_digits", TASKS["same_dataset_digits"])
CLASSIFIER, CVAE = (f"ckpt/same_dataset_digits_partition1_{network}.pkl" for network in ("classifier", "cvae"))


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A folder with every data set in small."""
    root = tmp_path_factory.mktemp("images")
    for name in ("MNIST", "FashionMNIST", "KMNIST"):
        tiny_data.write_mnist(root, 2, name)
    tiny_data.write_cifar10(root, 10)
    tiny_data.write_cifar100(root, 8)
    tiny_data.write_svhn(root, 9)
    for folder in ("LSUN_resize", "LSUN_fix", "Imagenet_resize", "Imagenet_fix"):
        tiny_data.write_folder(root, folder, 7)
    return root


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory, removed at once: checkpoints are large."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    monkeypatch.chdir(ROOT)
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with `ckpt/`: both networks of the digits task after an epoch, with a validation fraction."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in ("train_classifier", "train_cvae"):
            options = ["--command", command, "--epochs", "1", "--val-fraction", "0.1", "--device", "cpu"]
            assert run_command(train.main, train.get_parser(), options) == 0
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def digits(trained, workplace):
    """A working directory with the checkpoints of `trained`, which may be changed."""
    shutil.copytree(trained / "ckpt", "ckpt")
    return workplace


SETS = ("IND test", "held-out-classes", "pseudo-OOD")


# --- end to end ---------------------------------------------------------------------------------


def parse_table(text: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Printed lines of cells: the cells of text -> the cells of figures."""
    lines = {}
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        figures = tuple(cell for cell in cells if re.fullmatch(r"-|[\d.]+( ± [\d.]+)?", cell))
        if len(cells) > 2 and figures:
            lines[tuple(cells[: len(cells) - len(figures)])] = figures
    return lines


def expected_table(rows: list[dict], keys: list[str], figures: list[str]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """What the table must hold, from the rows of the JSON file."""
    table = {}
    for key in {tuple(row[k] for k in keys) for row in rows}:
        members = [row for row in rows if tuple(row[k] for k in keys) == key]
        cells = []
        for figure in figures:
            values = [100 * row[figure] for row in members if figure in row]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}" if values else "-")
        table[key] = tuple(cells)
    return table


@pytest.mark.parametrize("task", TASKS)
def test_every_task_from_images_to_metrics(task, images, workplace, capsys, monkeypatch):
    for name in ("digits", "digits_rgb"):  # as few images as the others have
        monkeypatch.setitem(
            READERS, name, lambda data_dir, split, read=READERS[name]: every_fifth(read(data_dir, split))
        )
    partition = list(TASKS[task].partitions)[-1]
    common = ["--task", task, "--partition", partition, "--data-dir", images, "--epochs", 1, "--device", "cpu"]
    assert run(train, *common, "--command", "train_classifier", "--batch-size", 64) == 0
    assert re.search(r"IND test images: accuracy [01]\.\d{4}\n", capsys.readouterr().out)
    assert run(train, *common, "--command", "train_cvae", "--batch-size", 64) == 0
    assert re.search(r"IND test images: mse 0\.\d{4}, kl_nats \d+\.\d{4}\n", capsys.readouterr().out)
    classifier = load_checkpoint(Path(f"ckpt/{task}_{partition}_classifier.pkl"))
    assert classifier["classifier.fc2.bias"].shape == (TASKS[task].logits,)
    assert not any(path.suffix == ".resume" for path in Path("ckpt").iterdir())

    assert run(eval, *common, "--seeds", 1, 2) == 0
    printed = parse_table(capsys.readouterr().out)
    (file,) = Path("results").iterdir()
    assert file.name == f"{task}_{partition}_CMG-energy+CMG-softmax_seed1-2_epochs-1.json"
    results = json.loads(file.read_text())
    detection = expected_table(
        results["detection"], ["ood_dataset", "method", "at"], ["auroc", "fpr95", "aupr_out", "aupr_in"]
    )
    # Two baselines, two modes after the last step and at their best, for each OOD set.
    assert len(detection) == 6 * len(TASKS[task].ood_datasets)
    assert {key[0] for key in detection} == set(TASKS[task].ood_datasets)
    assert printed == detection | expected_table(results["ind"], ["method", "at"], ["accuracy", "ece"])
    check_results(results, task, partition)


def every_fifth(data: Images) -> Images:
    return data.at(torch.arange(0, len(data), 5))


def check_results(results: dict, task: str, partition: str) -> None:
    """What a results file must hold to be judged and repeated."""
    assert (results["task"], results["partition"], results["positive_class"]) == (task, partition, "OOD")
    assert results["command"].startswith(f"python -m eval --task {task} --partition {partition} ")
    assert results["seeds"] == [1, 2]
    assert results["config"] | {"epochs": 1, "batch_size": 128, "learning_rate": 1e-4, "mu": 0.1} == results["config"]
    assert results["config"]["sigma"] == TASKS[task].fine_tuning["sigma"] and results["config"]["num_ind"] in (6, 10)
    assert results["environment"]["torch"] == torch.__version__ and results["environment"]["device"] == "cpu"
    for command, checkpoint in results["checkpoints"].items():
        assert checkpoint["origin"]["command"] == command and checkpoint["origin"]["seed"] == 123
    assert [(run["mode"], run["seed"]) for run in results["runs"]] == [
        (mode, seed) for mode in ("CMG-energy", "CMG-softmax") for seed in (1, 2)
    ]
    steps = -(-results["images"]["IND training"] // 128)
    for run_ in results["runs"]:
        assert [check["step"] for check in run_["curve"]] == [0, steps]
        for name in TASKS[task].ood_datasets:
            rows = [r for r in results["detection"] if (r["method"], r["seed"]) == (run_["mode"], run_["seed"])]
            aurocs = {r["at"]: r["auroc"] for r in rows if r["ood_dataset"] == name}
            curve = [check["auroc"][name] for check in run_["curve"]]
            assert aurocs == {"last": curve[-1], "max": max(curve)}


def test_validation_images_give_a_validated_row(digits, capsys):
    options = ["--mode", "CMG-energy", "--epochs", 2, "--seeds", 3, 3, "--output", "out/file.json", "--check-every", 2]
    assert run(eval, *options, "--precision", "fp32") == 0
    assert "650 IND training, 72 IND validation, 361 IND test, 238 held-out-classes" in capsys.readouterr().out
    results = json.loads(Path("out/file.json").read_text())
    assert [row["at"] for row in results["detection"] if row["method"] == "CMG-energy"] == ["last", "validated", "max"]
    (tuned,) = results["runs"]
    assert [check["step"] for check in tuned["curve"]] == [0, 2, 4, 6, 8, 10, 12]
    figures = [check["validation_auroc"] for check in tuned["curve"]]
    assert tuned["validated_step"] == 2 * figures.index(max(figures))
    assert not Path("results").exists()


def test_options_of_the_method_reach_the_run(digits):
    options = {"--lr": 0.002, "--sigma": 1.5, "--batch-size": 100, "--anchor": 0.25, "--pseudo-pool": 40}
    argv = [word for option in options.items() for word in option]
    assert run(eval, *argv, "--margins", 0.1, 0.7, "--tune", "last-layer", "--epochs", 1, "--output", "a.json") == 0
    config = json.loads(Path("a.json").read_text())["config"]
    assert config["tune"] == "last-layer" and config["margins"] == [0.1, 0.7]
    names = ("learning_rate", "sigma", "batch_size", "anchor", "pseudo_pool")
    assert [config[name] for name in names] == list(options.values())
    given = ["--mixing-probability", 0.7, "--pseudo-batch-size", 9]
    assert run(eval, *given, "--loss-energy", "ind", "--score", "energy-all", "--epochs", 1, "--output", "b.json") == 0
    config = json.loads(Path("b.json").read_text())["config"]
    assert (config["mixing"], config["mixing_probability"]) == ("bernoulli", 0.7) and config["pseudo_batch_size"] == 9
    assert (config["loss_energy"], config["score"]) == ("ind", "energy-all")
    assert run(eval, "--mixing", "none", "--mode", "CMG-softmax", "--epochs", 1, "--output", "c.json") == 0
    assert json.loads(Path("c.json").read_text())["config"]["mixing"] == "none"


def test_former_spellings_of_options_are_taken(digits):
    former = ["--check-every", 3, "--mixing", "coin", "--mode", "CMG-energy", "--epochs", 1]
    todays = ["--eval-every", 3, "--mixing", "bernoulli", "--mode", "CMG-energy", "--epochs", 1]
    for file, options in (("a.json", former), ("b.json", todays)):
        assert run(eval, *options, "--output", file) == 0
    a, b = (json.loads(Path(file).read_text()) for file in ("a.json", "b.json"))
    assert a["config"] == b["config"] and a["runs"] == b["runs"]


def test_an_option_of_the_other_network_is_pointed_out(workplace, capsys):
    remark = "--kl-weight goes with --command train_cvae only: it changes nothing here\n"
    short = ["--kl-weight", 0.5, "--epochs", 1, "--device", "cpu"]
    for command, remarks in (("train_classifier", 1), ("train_cvae", 0)):
        assert run(train, "--command", command, *short) == 0
        assert capsys.readouterr().out.count(remark) == remarks


def test_joint_training_has_the_classifiers_settings(digits):
    assert run(eval, "--tune", "joint", "--mode", "CMG-energy", "--epochs", 1, "--output", "a.json") == 0
    results = json.loads(Path("a.json").read_text())
    config = results["config"]
    assert (config["tune"], config["batch_size"], config["learning_rate"]) == ("joint", 64, 1e-3)
    assert [row["at"] for row in results["detection"]] == ["pretrained", "pretrained", "last"]


def test_scores_of_all_images_can_be_kept(digits, capsys):
    argv = ["--mode", "CMG-energy", "--seeds", 1, 2, "--epochs", 1, "--output", "a.json", "--save-scores", "a.npz"]
    assert run(eval, *argv) == 0
    assert "wrote a.npz" in capsys.readouterr().out
    scores = np.load("a.npz")
    expected = {f"CMG-energy/{s}/{at}/{name}" for s in (1, 2) for at in ("last", "validated") for name in SETS}
    expected |= {f"{method}/-/pretrained/{name}" for method in ("MSP", "energy") for name in SETS[:2]}
    assert set(scores) == expected
    rows = {(row["method"], row["seed"], row["at"]): row for row in json.loads(Path("a.json").read_text())["detection"]}
    for (method, seed, at), row in rows.items():
        if at != "max":
            ind, ood = (scores[f"{method}/{seed or '-'}/{at}/{name}"] for name in SETS[:2])
            labels = [0] * len(ind) + [1] * len(ood)
            assert roc_auc_score(labels, np.concatenate([ind, ood])) == pytest.approx(row["auroc"], abs=1e-6)
    assert len(scores["CMG-energy/1/last/pseudo-OOD"]) == len(scores["CMG-energy/1/last/IND test"]) == 361


def test_the_same_command_gives_the_same_figures(digits):
    for file, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert run(eval, "--device", "cpu", "--epochs", 1, "--seed", seed, "--output", file) == 0
    a, b, c = (json.loads(Path(file).read_text()) for file in "abc")
    assert a["detection"] == b["detection"] and a["runs"] == b["runs"]
    assert a["runs"][0]["margins"] != c["runs"][0]["margins"]


def test_a_checkpoint_is_a_plain_state_dict(digits):
    """As the first public code reads and writes it: torch alone loads it, and our record of origin may be missing."""
    state = torch.load(CLASSIFIER, weights_only=True)
    assert isinstance(state, OrderedDict) and all(isinstance(value, torch.Tensor) for value in state.values())
    torch.save(dict(state), CLASSIFIER)
    torch.save(dict(torch.load(CVAE, weights_only=True)), CVAE)
    assert run(eval, "--epochs", 1, "--mode", "CMG-softmax") == 0


def test_a_picture_shows_what_the_networks_make(digits, capsys):
    assert run(samples, "--output", "new/picture.png", "--precision", "fp32") == 0
    remark = "--precision changes nothing here: the images are made in fp32\n"
    assert capsys.readouterr().out == f"{remark}wrote new/picture.png\n"
    picture = np.asarray(Image.open("new/picture.png").convert("RGB"))
    height = 2 * 96 + 4  # two lines of images of 8 pixels, enlarged 12 times
    assert picture.shape == (3 * (56 + height) + 8, 8 + 12 * 100 - 4 + 8, 3)
    _, test = load_ind(DIGITS, Path("datasets"))
    rows = torch.randperm(len(test), generator=generator(123, "samples"))[:24]
    assert (picture[56 : 56 + height, 8:1204] == tile(test.images[rows])).all()


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(digits, capsys):
    Path("folder").mkdir()
    assert "cannot write folder: it is a folder; name a file" in error_of(capsys, samples, "--output", "folder")


def test_defaults_are_the_embedded_task_and_the_paper(workplace):
    train_args, eval_args = train.get_parser().parse_args([]), eval.get_parser().parse_args([])
    for args in (train_args, eval_args):
        assert (args.task, args.partition, args.device) == ("same_dataset_digits", None, None)
        assert (args.data_dir, args.precision) == (Path("datasets"), "auto")
    assert train_args.command == "train_classifier"
    assert (eval_args.recipe, eval_args.ood_dataset, eval_args.seeds) == (None, ["all"], [123])
    assert (with_recipe(eval_args).mode, with_recipe(eval_args).space) == (["all"], "images")
    configs = LoopConfig, TrainingOptions, RunOptions
    assert all(options_given(train_args, config) == {} for config in configs)
    assert options_given(eval_args, FineTuneConfig) == {}
    loop = LoopConfig(epochs=1, batch_size=512, precision="fp32")
    assert (loop.seed, loop.learning_rate, loop.warmup_steps) == (123, 1e-3, 0)
    assert (TrainingOptions().val_fraction, TrainingOptions().kl_weight) == (0.0, None)
    config = FineTuneConfig(num_ind=6, sigma=3.0)
    assert (config.epochs, config.batch_size, config.learning_rate, config.mu) == (15, 128, 1e-4, 0.1)
    assert (config.margins, config.mixing, config.mixing_probability) == ((0.2, 0.8), "bernoulli", 0.5)
    assert (config.anchor, config.pseudo_pool, config.tune, config.loss_energy) == (0.0, 0, "head", "all")


def test_help_names_the_default_of_every_option():
    text = " ".join(eval.get_parser().format_help().split())
    for words in ("m_in and m_out (default: 0.2 0.8)", "Adam (default: 0.0001; with --tune joint 0.001)"):
        assert words in text
    for words in ("pseudo-OOD images (default: the task's)", "fine-tuned head (default: the mode's own)"):
        assert words in text


@pytest.mark.parametrize(
    "module", ["train", "eval", "predict", "reproduce", "figure.samples", "reproduction.ablations"]
)
def test_help_and_bad_arguments_do_not_import_torch(module):
    for option, status in (("--help", 0), ("--task=nonsense", 2)):
        command = [sys.executable, "-X", "importtime", "-m", module, option]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        imported = {
            line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")
        }
        assert done.returncode == status and "argparse" in imported
        assert not imported & {"torch", "numpy", "sklearn", "scipy", "torchvision", "matplotlib"}


def test_a_failing_process_under_torchrun_ends_all_with_its_message(workplace):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "train"]
    # 722 images are a batch of 719 and one of 3: one image for the second process, which it cannot normalise.
    options = ["--device", "cpu", "--epochs", "1", "--batch-size", "719", "--precision", "fp32"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*launcher, *options], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode != 0 and "train: error: a batch of 1 image cannot be normalised: " in done.stderr
    assert "[rank" not in done.stderr  # torch's mark on the lines of a traceback
    assert done.stdout.count("722 images, 1 epoch on cpu") == 1 and not any(Path("ckpt").iterdir())


# --- errors: checkpoints ------------------------------------------------------------------------


def test_missing_checkpoints_name_the_commands_that_make_them(workplace, capsys):
    line = error_of(capsys, eval)
    for file, command in ((CLASSIFIER, "train_classifier"), (CVAE, "train_cvae")):
        assert f"{file}: no such file" in line
        expected = f"python -m train --task same_dataset_digits --partition partition1 --command {command}"
        assert f"{expected} --params-dict-name {file}" in line


def test_one_missing_checkpoint_is_named_alone(digits, capsys):
    Path(CVAE).unlink()
    line = error_of(capsys, eval)
    assert f"{CVAE}: no such file" in line and CLASSIFIER not in line and "train_classifier" not in line


@pytest.mark.parametrize("with_origin", [True, False])
def test_a_cvae_given_as_classifier_is_refused(digits, capsys, with_origin):
    if not with_origin:
        torch.save(dict(load_checkpoint(Path(CVAE))), CVAE)
    line = error_of(capsys, eval, "--params-dict-name", CVAE)
    reason = "was made for command train_cvae, expected train_classifier" if with_origin else "is not the classifier of"
    assert f"{CVAE}: {reason}" in line and "--command train_classifier" in line


@pytest.mark.parametrize(("key", "value"), [("task", "same_dataset_mnist"), ("partition", "partition3")])
def test_a_checkpoint_of_another_task_or_partition_is_refused(digits, capsys, key, value):
    state = load_checkpoint(Path(CLASSIFIER))
    state.origin[key] = value
    save_checkpoint(Path(CLASSIFIER), state)
    line = error_of(capsys, eval)
    assert f"{CLASSIFIER}: was made for {key} {value}, expected" in line and "python -m train" in line


def test_the_wrong_number_of_classes_is_refused(digits, capsys):
    state = dict(load_checkpoint(Path(CLASSIFIER)))
    state["classifier.fc2.weight"], state["classifier.fc2.bias"] = torch.zeros(110, 512), torch.zeros(110)
    torch.save(state, CLASSIFIER)
    line = error_of(capsys, eval)
    assert f"{CLASSIFIER}: classifier.fc2.weight is [110, 512], expected [11, 512]" in line


def test_a_value_that_is_no_tensor_is_refused(digits, capsys):
    torch.save(dict(load_checkpoint(Path(CVAE))) | {"fcE.bias": 3}, CVAE)
    assert f"{CVAE}: fcE.bias is of the kind int, expected a tensor" in error_of(capsys, eval)


def test_a_damaged_checkpoint_is_refused(digits, capsys):
    content = Path(CVAE).read_bytes()
    Path(CVAE).write_bytes(content[: len(content) // 2])
    assert f"{CVAE}: is not a checkpoint or is damaged" in error_of(capsys, eval)


def test_a_malicious_checkpoint_does_not_run(digits, capsys):
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    state = load_checkpoint(Path(CLASSIFIER))
    state["classifier.fc2.bias"] = Payload()
    torch.save(state, CLASSIFIER)
    assert f"{CLASSIFIER}: holds posix.mkdir, which could run code; expected" in error_of(capsys, eval)
    assert not Path("ran").exists()


def test_networks_that_kept_different_images_from_training_are_refused(digits, capsys):
    state = load_checkpoint(Path(CVAE))
    state.origin["val_fraction"] = 0.0
    save_checkpoint(Path(CVAE), state)
    line = error_of(capsys, eval)
    assert "classifier was trained with --val-fraction 0.1 and the CVAE with 0.0: train both with the same" in line


def test_networks_trained_on_other_images_are_refused(workplace, capsys):
    for command in ("train_classifier", "train_cvae"):
        assert run(train, "--command", command, "--epochs", 1, "--device", "cpu") == 0
    state = load_checkpoint(CVAE)
    state.origin["data"] += 1
    save_checkpoint(CVAE, state)
    capsys.readouterr()
    assert "the CVAE was trained on other images than those now in datasets: put them back" in error_of(capsys, eval)


def test_a_head_that_diverges_is_one_line(workplace, capsys):
    for command in ("train_classifier", "train_cvae"):
        assert run(train, "--command", command, "--epochs", 1, "--device", "cpu") == 0
    capsys.readouterr()
    line = error_of(capsys, eval, "--lr", "1e30", "--epochs", 30, "--device", "cpu")
    assert re.search(r"CMG-(energy|softmax), seed 123: the logits are not finite after step \d+: lower --lr", line)
    line = error_of(capsys, eval, "--anchor", "1e300", "--mode", "CMG-energy", "--epochs", 30, "--device", "cpu")
    assert line.endswith(": lower --lr or --sigma or --anchor")


def test_a_last_batch_that_cannot_be_normalised_is_one_line(workplace, capsys):
    line = error_of(capsys, train, "--batch-size", 103, "--epochs", 1, "--device", "cpu")
    assert "a batch of 1 image cannot be normalised: choose a --batch-size with a larger last batch" in line


def default_name(experiment: Experiment, seeds: list[int], *options: object) -> str:
    """Of the results of one mode, with these options of eval."""
    parser = eval.get_parser()
    changed = changed_options(parser.parse_args(list(map(str, options))), parser, eval.NAMED, FineTuneConfig)
    return eval.default_output(SimpleNamespace(experiment=experiment, modes=["CMG-energy"], seeds=seeds), changed).name


def test_names_of_results_say_what_was_changed():
    def name(*options):
        return default_name(DIGITS, [1, 2], *options).replace("same_dataset_digits_partition1_CMG-energy", "t_p_m")

    assert name() == "t_p_m_seed1-2.json"
    assert name("--mixing", "coin", "--margins", 0.2, 0.8, "--tune", "head") == "t_p_m_seed1-2.json"
    assert name("--anchor", 0.1, "--margins", 0.3, 0.7) == "t_p_m_seed1-2_margins-0.3-0.7_anchor-0.1.json"
    assert name("--precision", "fp32", "--lr", 0.1) == "t_p_m_seed1-2_learning_rate-0.1_precision-fp32.json"
    assert name("--ood-dataset", "SVHN", "LSUN") == "t_p_m_seed1-2_ood_dataset-SVHN-LSUN.json"
    assert name("--ood-dir", "/birds", "--ood-dir", "../fish") == "t_p_m_seed1-2_ood_dir-birds-fish.json"
    assert name("--ood-dir", "a/birds", "--ood-dir", "b/fish") == "t_p_m_seed1-2_ood_dir-a-birds-b-fish.json"
    assert name("--baselines") == "t_p_m_seed1-2_baselines.json"
    assert name("--baselines", "KNN", "ViM") == "t_p_m_seed1-2_baselines-KNN-ViM.json"


def test_a_name_that_is_too_long_is_found_before_the_work(workplace, capsys):
    line = error_of(capsys, eval, "--output", f"results/{'x' * 250}.json")
    assert re.search(r"cannot write results/x+\.json: the name is too long; give a shorter one$", line)


def test_default_names_stay_short_whatever_the_options():
    assert default_name(DIGITS, [123]) == "same_dataset_digits_partition1_CMG-energy_seed123.json"
    given = ["--baselines", *list(POST_HOC)[1:], "--ood-dir", "x/" + "y" * 250]
    found = [default_name(DIGITS, list(range(200)), *given, "--sigma", sigma) for sigma in (1, 2)]
    long = Experiment(f"{'custom_' + 'z' * 300}_3x32", DIGITS.task, "all")
    found += [long.checkpoint(command).name for command in ("train_classifier", "train_cvae")]
    assert len(set(found)) == 4 and all(len(name) <= 125 for name in found)


# --- errors: data -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["birds/train/a/0.png", "link/test/b/0.png", "stored.png", "insects/0.png"])
def test_nothing_is_written_over_an_image(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for folder in ("birds/train/a", "birds/train/b", "birds/test/a", "birds/test/b", "insects"):
        Path(folder).mkdir(parents=True)
        Image.fromarray(np.full((28, 28), len(folder), np.uint8)).save(f"{folder}/0.png")
    Path("link").symlink_to("birds")
    Path("birds/test/a/0.png").rename("stored.png")
    Path("birds/test/a/0.png").symlink_to(tmp_path / "stored.png")
    before = Path(name).read_bytes()
    task = ["--task", "custom", "--ind-dir", "birds", "--image-size", "28", "--grey", "--device", "cpu"]
    with_ood = [*task, "--ood-dir", "insects"]
    message = f"cannot write {name}: it is an image that this command reads; name another file"
    commands = [(eval, [*with_ood, "--output", name]), (eval, [*with_ood, "--save-scores", name])]
    commands += [(ablations, [*with_ood, "--output", name])]
    if name != "insects/0.png":
        commands += [(train, [*task, "--log", name]), (samples, [*task, "--output", name])]
        commands += [(train, [*task, "--restart", "--params-dict-name", name])]
    for command, argv in commands:
        assert message in error_of(capsys, command, *argv)
    assert Path(name).read_bytes() == before


def test_nothing_is_written_over_a_published_data_set(tmp_path):
    experiment = Experiment.of("same_dataset_mnist", TASKS["same_dataset_mnist"])
    files = [tmp_path / "MNIST" / "raw" / name for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte.gz")]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.touch()
        with pytest.raises(UserError, match="it is an image that this command reads"):
            check_outputs(file, images=lambda: files_read(experiment, tmp_path))
    check_outputs(tmp_path / "MNIST" / "raw" / "other", images=lambda: files_read(experiment, tmp_path))


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (eval, ["--output", CVAE]),
        (eval, ["--save-scores", CLASSIFIER]),
        (eval, ["--mode", "CMG-energy", "--save-detector", f"ckpt/../{CLASSIFIER}"]),
        (samples, ["--output", CVAE]),
        (ablations, ["--output", CLASSIFIER]),
    ],
)
def test_nothing_is_written_over_what_a_command_reads(digits, capsys, command, argv):
    before = {path: path.read_bytes() for path in Path("ckpt").iterdir()}
    assert f"cannot write {argv[-1]}: it is read by this command; name another file" in error_of(capsys, command, *argv)
    assert {path: path.read_bytes() for path in Path("ckpt").iterdir()} == before


def test_no_two_outputs_are_one_file(digits, capsys):
    message = "cannot write a.json: it is another output already; name another file"
    assert message in error_of(capsys, eval, "--output", "a.json", "--save-scores", "ckpt/../a.json").replace(
        "ckpt/../", ""
    )
    assert message.replace("a.json", CVAE) in error_of(
        capsys, train, "--command", "train_cvae", "--restart", "--log", CVAE
    )
    assert not Path("a.json").exists()
    resume = Path(f"{CVAE}.resume")
    resume.touch()
    assert error_of(capsys, train, "--command", "train_cvae", "--restart", "--log", CVAE) and resume.exists()


def test_a_picture_is_a_png_file(digits, capsys):
    message = "--output a.jpg: is written as PNG; give it a name that ends in .png"
    assert message in error_of(capsys, samples, "--output", "a.jpg") and not Path("a.jpg").exists()


def test_results_of_other_networks_have_another_name(digits, capsys):
    Path("ckpt/mine.pkl").write_bytes(Path(CLASSIFIER).read_bytes())
    options = ["--mode", "CMG-energy", "--epochs", 1, "--device", "cpu", "--precision", "fp32"]
    assert run(eval, *options, "--params-dict-name", "ckpt/mine.pkl") == 0
    name = (
        "same_dataset_digits_partition1_CMG-energy_seed123_epochs-1_precision-fp32_params_dict_name-ckpt-mine.pkl.json"
    )
    assert [path.name for path in Path("results").iterdir()] == [name]


def test_a_training_that_is_not_finished_is_said_to_be_so(digits, capsys):
    Path(CLASSIFIER).rename(f"{CLASSIFIER}.resume")
    line = error_of(capsys, eval)
    assert line == f"eval: error: {CLASSIFIER}: the training was interrupted; run its command again to finish it"


def test_the_way_to_a_checkpoint_never_leads_over_another(digits, capsys):
    line = error_of(capsys, eval, "--params-dict-name", CVAE)
    assert line.endswith("--partition partition1 --command train_classifier")
    shutil.copy(CVAE, CLASSIFIER)
    assert error_of(capsys, eval).endswith("--partition partition1 --command train_classifier --restart")


@pytest.mark.parametrize(
    ("task", "name"),
    [("same_dataset_mnist", "mnist"), ("same_dataset_cifar10", "cifar10"), ("different_dataset", "cifar10")],
)
def test_missing_images_without_network_are_named(workplace, capsys, monkeypatch, task, name):
    def fetch(address, *args):
        raise FetchError(f"{address}: no route to host")

    monkeypatch.setattr(obtain, "fetch", fetch)
    line = error_of(capsys, train, "--task", task, "--data-dir", "nowhere")
    assert f"{name} cannot be downloaded ({SOURCES[name].downloads[0].addresses[0]}: no route to host" in line
    assert f"python -m datasets.download {name} --data-dir {Path('nowhere').resolve()} --from" in line
    assert "the digits need no download" in line and not Path("ckpt").exists()


@pytest.mark.parametrize("file", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_file_of_images_cut_short_is_named(workplace, capsys, file):
    tiny_data.write_mnist(workplace, 1)
    path = workplace / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[:-1])
    line = error_of(capsys, train, "--task", "same_dataset_mnist", "--data-dir", workplace)
    assert f"{path}: is not a complete IDX file" in line


def test_images_of_another_size_are_refused(workplace, capsys):
    tiny_data.write_mnist(workplace, 1)
    for prefix in ("train", "t10k"):
        tiny_data.write_idx(workplace / f"MNIST/raw/{prefix}-images-idx3-ubyte", np.zeros((10, 27, 28), np.uint8))
    line = error_of(capsys, train, "--task", "same_dataset_mnist", "--data-dir", workplace)
    assert "images are [1, 27, 28], expected [1, 28, 28]" in line


# --- errors: arguments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        (train, ["--epochs", "0"], "argument --epochs: 0 is out of range: expected above 0"),
        (train, ["--epochs", "1.5"], "argument --epochs: '1.5' is not a whole number"),
        (train, ["--epochs", f"1{'0' * 400}"], f"argument --epochs: 1{'0' * 29}… is out of range: expected above 0"),
        (train, ["--batch-size", "-3"], "argument --batch-size/--batch_size: -3 is out of range"),
        (train, ["--lr", "nan"], "argument --lr: nan is out of range"),
        (train, ["--lr", "inf"], "argument --lr: inf is out of range"),
        (train, ["--lr", "fast"], "argument --lr: 'fast' is not a number"),
        (train, ["--seed", "-1"], "argument --seed: -1 is out of range: expected at least 0"),
        (train, ["--val-fraction", "1"], "argument --val-fraction: 1 is out of range: expected at least 0 and below 1"),
        (train, ["--save-every", "0"], "argument --save-every: 0 is out of range"),
        (train, ["--command", "train_all"], "argument --command: invalid choice: 'train_all'"),
        (train, ["--task", "mnist"], "argument --task: invalid choice: 'mnist'"),
        (train, ["--partition", "partition9"], "argument --partition: invalid choice: 'partition9'"),
        (train, ["--device", "tpu9"], "--device tpu9: not a device; expected cpu, cuda or cuda:N"),
        (train, ["--device", "cuda:99"], "--device cuda:99: no such GPU; this machine has"),
        (train, ["--device", "meta"], "--device meta: not supported; expected cpu, cuda or cuda:N"),
        (eval, ["--device", "cuda:99"], "--device cuda:99: no such GPU; this machine has"),
        (train, ["--task", "different_dataset", "--partition", "partition1"], "partition1: different_dataset has all"),
        (eval, ["--task", "same_dataset_digits", "--partition", "all"], "all: same_dataset_digits has partition1, "),
        (eval, ["--ood-dataset", "SVHN"], "--ood-dataset SVHN: same_dataset_digits has held-out-classes"),
        (eval, ["--ood-dataset", "Places"], "--ood-dataset Places: same_dataset_digits has held-out-classes"),
        (eval, ["--mode", "CMG"], "argument --mode: invalid choice: 'CMG'"),
        (eval, ["--sigma", "0"], "argument --sigma: 0 is out of range"),
        (eval, ["--margins", "0.2", "1.0"], "argument --margins: 1.0 is out of range"),
        (eval, ["--margins", "0.2"], "argument --margins: expected 2 arguments"),
        (eval, ["--anchor", "-1"], "argument --anchor: -1 is out of range"),
        (eval, ["--max-confidence", "0"], "--max-confidence: 0 is out of range: expected above 0 and at most 1"),
        (eval, ["--residuals", "-1"], "argument --residuals: -1 is out of range"),
        (eval, ["--least-explained", "2"], "--least-explained: 2 is out of range: expected at least 0 and at most 1"),
        (eval, ["--half-life", "-1"], "--half-life: -1 is out of range: expected at least 0"),
        (eval, ["--pseudo-pool", "-1"], "argument --pseudo-pool: -1 is out of range"),
        (eval, ["--mixing", "half"], "argument --mixing: invalid choice: 'half'"),
        (eval, ["--mixing-probability", "1.5"], "1.5 is out of range: expected at least 0 and at most 1"),
        (eval, ["--pseudo-batch-size", "0"], "argument --pseudo-batch-size: 0 is out of range: expected above 0"),
        (eval, ["--mixing", "none", "--pairs", "distinct"], "--pairs goes with --mixing bernoulli or mixup only"),
        (eval, ["--tune", "joint", "--anchor", "1"], "--anchor goes with --tune head or last-layer only; leave it out"),
        (
            eval,
            ["--tune", "joint", "--check-every", "1"],
            "--eval-every goes with --tune head or last-layer only; leave it out",
        ),
        (
            eval,
            ["--tune", "joint", "--pseudo-pool", "1"],
            "--pseudo-pool goes with --tune head or last-layer only; leave it out",
        ),
        (
            eval,
            ["--tune", "joint", "--pseudo-batch-size", "1"],
            "--pseudo-batch-size goes with --tune head or last-layer only; leave it out",
        ),
        (
            eval,
            ["--tune", "joint", "--save-detector", "d"],
            "--save-detector goes with --tune head or last-layer only; leave it out",
        ),
        (
            eval,
            ["--mixing", "none", "--mixing-probability", "0.7"],
            "--mixing-probability goes with --mixing bernoulli only; leave it out",
        ),
        (
            eval,
            ["--mixing", "weight", "--mixing-probability", "0"],
            "--mixing-probability goes with --mixing bernoulli only; leave it out",
        ),
        (
            eval,
            ["--mode", "CMG-softmax", "--margins", "0.1", "0.9"],
            "--margins goes with --mode CMG-energy or all only; leave it out",
        ),
        (
            eval,
            ["--mode", "CMG-softmax", "--loss-energy", "ind"],
            "--loss-energy goes with --mode CMG-energy or all only; leave it out",
        ),
        (eval, ["--score", "best"], "argument --score: invalid choice: 'best'"),
        (eval, ["--mode", "CMG-softmax", "--mu", "0.2"], "--mu goes with --mode CMG-energy or all only; leave it out"),
        (eval, ["--save-scores", "."], "cannot write .: it is a folder; name a file"),
        (eval, ["--seeds", "x"], "argument --seeds/--seed: 'x' is not a whole number"),
        (eval, ["--output", "."], "cannot write .: it is a folder; name a file"),
        (train, ["--params-dict-name", "."], "cannot write .: it is a folder; name a file"),
        (train, ["--log", "."], "cannot write .: it is a folder; name a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_argument_that_cannot_be_is_named(workplace, capsys, command, argv, message):
    assert message in error_of(capsys, command, *argv)
    assert not any(path.is_file() for path in workplace.rglob("*"))


# --- what the documents show ----------------------------------------------------------------------

TEXT = "".join((ROOT / name).read_text() for name in ("docs/running.md", "docs/architecture.md"))
PYTHON = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)]


def test_the_documented_detectors_agree(digits):
    """A saved detector and one that was fitted in Python."""
    options = ["--mode", "CMG-energy", "--epochs", 1, "--device", "cpu", "--precision", "fp32"]
    assert run(eval, *options, "--save-detector", "detector.pt") == 0
    (code,) = [block for block in PYTHON if "CMGDetector.load" in block]
    code = code.replace('config_for(experiment, "fp32")', 'config_for(experiment, "fp32", epochs=1)')
    names = {}
    exec(code.replace("detector = CMGDetector", "saved = scores\ndetector = CMGDetector"), names)
    images = len(load_ind(DIGITS, Path("datasets"))[1])
    assert names["saved"].shape == names["scores"].shape == names["classes"].shape == (images,)
    # The networks kept a tenth of the images from training, which the fit in Python sees.
    assert np.corrcoef(names["saved"], names["scores"])[0, 1] > 0.99
    assert names["is_ood"].float().mean() < 0.2


def test_the_documented_mode_is_one():
    (entry,) = [block for block in PYTHON if "Mode(" in block]
    (mode,) = builtins.eval(f"{{{entry}}}", vars(losses)).values()
    assert isinstance(mode, losses.Mode)
    config = FineTuneConfig(num_ind=6, sigma=3.0)
    labels = torch.zeros(2, 5, dtype=torch.long)
    loss = mode.loss(torch.zeros(2, 5, 11), labels, torch.zeros(2, 7, 11), None, config)
    expected = torch.full((2,), math.log(11) + 0.5 * math.log(6))
    torch.testing.assert_close(loss, expected)
