"""Tasks of the user's own images, from their folders to the commands."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluate
import train
from cli.errors import UserError, run_command
from cmg.data import Stage2Data
from datasets.datasetsHelper import Images, load_ind, load_ood
from datasets.experiments import (
    add_data_arguments,
    add_experiment_arguments,
    custom_task,
    experiment_from_arguments,
    with_ood_folders,
)
from datasets.tasks import CUSTOM, HELD_OUT, MNIST, RESERVED, TASKS, Experiment, Task
from evaluation.report import IND_TEST, NO_OOD, PSEUDO
from reproduction import ablations
from tests.tiny_data import squares, write_folder, write_mnist
from training.networks import train_command
from training.train_classifier import build_classifier
from training.train_cvae import build_cvae

ROOT = Path(__file__).parent.parent
SHADES = {"crow": 30, "duck": 120, "swan": 220}


@pytest.fixture
def birds(tmp_path) -> Path:
    """Three classes of uniform shades, 4 training and 2 test images each, of several sizes and modes."""
    for split, count in (("train", 4), ("test", 2)):
        for name, shade in SHADES.items():
            folder = tmp_path / "birds" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new(("RGB", "L")[i % 2], (40 + i, 50), (shade, shade, shade)[: 3 - 2 * (i % 2)]).save(
                    folder / f"{i}.png"
                )
    return tmp_path / "birds"


@pytest.fixture
def insects(tmp_path) -> Path:
    write_folder(tmp_path, "insects", 5, size=64, nested=True)
    return tmp_path / "insects"


def parse(*argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_experiment_arguments(parser)
    add_data_arguments(parser)
    return parser.parse_args([str(word) for word in argv])


def whole(task: Task) -> Experiment:
    """The only experiment of a task of one's own."""
    return Experiment.of(CUSTOM, task)


# --- the task -----------------------------------------------------------------------------------


def test_classes_follow_the_folders(birds, insects):
    task = custom_task(birds, [insects])
    assert task.folders["birds"].classes == ("crow", "duck", "swan")
    assert task.partitions == {"all": (0, 1, 2)} and task.logits == 4 and task.embedded_classes == 3
    assert task.dataset == "birds" and task.ood_datasets == ("insects",)
    assert (task.networks, task.image_size, task.image_channels, task.augment) == ("cifar10", 32, 3, True)


def test_images_are_resized_and_labelled(birds, insects, tmp_path):
    task = custom_task(birds, [insects])
    train, test = load_ind(whole(task), tmp_path)
    assert train.images.shape == (12, 3, 32, 32) and train.images.dtype == torch.uint8
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for label, shade in enumerate(SHADES.values()):
        assert (train.images[train.labels == label] == shade).all()
    assert load_ood(whole(task), "insects", tmp_path).shape == (5, 3, 32, 32)


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (28, 3), (32, 1), (32, 3)])
def test_networks_take_every_shape(birds, tmp_path, size, channels):
    task = custom_task(birds, [], size, channels)
    train, _ = load_ind(whole(task), tmp_path)
    assert train.images.shape[1:] == (channels, size, size)
    images, labels = train.images[:2] / 255, train.labels[:2]
    with torch.no_grad():
        assert build_classifier(task).eval()(images).shape == (2, 4)
        reconstruction, mean, _ = build_cvae(task).eval()(images, labels, torch.zeros(2, 32))
    assert reconstruction.shape == images.shape and mean.shape == (2, 32)


def test_more_classes_than_ten(tmp_path):
    for split in ("train", "test"):
        for k in range(12):
            write_folder(tmp_path / "many" / split, f"class_{k:02d}", 1)
    task = custom_task(tmp_path / "many")
    assert (task.logits, task.embedded_classes, len(task.partitions["all"])) == (13, 12, 12)
    assert load_ind(whole(task), tmp_path)[1].labels.tolist() == list(range(12))


def test_resizing_averages(tmp_path):
    rows, columns = np.indices((128, 128))
    board = Image.fromarray(((rows + columns) % 2 * 255).astype(np.uint8))
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "boards" / split / name).mkdir(parents=True)
            board.save(tmp_path / "boards" / split / name / "x.png")
    train, _ = load_ind(whole(custom_task(tmp_path / "boards")), tmp_path)
    assert (train.images.int() - 127).abs().max() <= 16


def test_ood_folders_beside_a_registered_task(insects, tmp_path):
    task = with_ood_folders(MNIST, [insects])
    assert task.ood_datasets == (HELD_OUT, "insects") and TASKS["same_dataset_mnist"].ood_datasets == (HELD_OUT,)
    experiment = Experiment.of("same_dataset_mnist", task)
    assert load_ood(experiment, "insects", tmp_path).shape == (5, 1, 28, 28)
    write_mnist(tmp_path, 1)
    assert len(load_ood(experiment, HELD_OUT, tmp_path)) == 4


def test_further_mnists_are_one_entry_each():
    for name, dataset in (("same_dataset_fashion_mnist", "fashion_mnist"), ("same_dataset_kmnist", "kmnist")):
        task = TASKS[name]
        assert task.dataset == dataset
        assert {key: value for key, value in vars(task).items() if key != "dataset"} == {
            key: value for key, value in vars(MNIST).items() if key != "dataset"
        }


# --- refusals -----------------------------------------------------------------------------------


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_folder_mistakes_are_named(birds, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/train: No such file or directory; expected a folder with one folder"):
        custom_task(tmp_path / "nowhere")
    remove(birds / "test" / "duck")
    with pytest.raises(UserError, match="the class duck is in one of train and test only; expected it in both"):
        custom_task(birds)
    for name in ("duck", "swan"):
        remove(birds / "train" / name)
    with pytest.raises(UserError, match=r"train holds 1 class folder\(s\), expected at least 2 \(train/CLASS/IMAGE\)"):
        custom_task(birds)


def test_image_mistakes_are_named(birds, tmp_path):
    task = custom_task(birds)
    stray = birds / "train" / "stray.png"
    Image.new("RGB", (9, 9)).save(stray)
    with pytest.raises(UserError, match=r"train/stray\.png: belongs to no class; expected .*train/CLASS/IMAGE"):
        load_ind(whole(task), tmp_path)
    stray.unlink()
    for path in (birds / "test" / "duck").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="test/duck: no images there; every class needs some in train and in test"):
        load_ind(whole(task), tmp_path)
    (birds / "test" / "duck" / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"test/duck/bad\.png: cannot be decoded"):
        load_ind(whole(task), tmp_path)


def test_ood_mistakes_are_named(birds, insects, tmp_path):
    with pytest.raises(UserError, match="--ood-dir .*nowhere: no such folder; expected a folder of images"):
        custom_task(birds, [tmp_path / "nowhere"])
    other = tmp_path / "other" / "insects"
    other.mkdir(parents=True)
    with pytest.raises(UserError, match="there is a data set called insects already; rename the folder"):
        custom_task(birds, [insects, other])
    (tmp_path / "x" / "birds").mkdir(parents=True)
    with pytest.raises(UserError, match="there is a data set called birds already"):
        custom_task(birds, [tmp_path / "x" / "birds"])
    (tmp_path / "SVHN").mkdir()
    with pytest.raises(UserError, match="there is a data set called SVHN already"):
        with_ood_folders(TASKS["different_dataset"], [tmp_path / "SVHN"])
    empty = custom_task(birds, [tmp_path / "SVHN"])
    with pytest.raises(UserError, match="SVHN: no images there"):
        load_ood(whole(empty), "SVHN", tmp_path)


@pytest.mark.parametrize("name", RESERVED)
def test_an_ood_folder_cannot_be_called_as_something_else(birds, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for take in (lambda: custom_task(birds, [folder]), lambda: with_ood_folders(MNIST, [folder])):
        with pytest.raises(UserError) as refusal:
            take()
        expected = f"the name {name} is reserved by results or options; rename the folder"
        assert str(refusal.value) == f"--ood-dir {folder}: {expected}"


def test_images_counted_beside_the_ood_sets_have_reserved_names():
    none = Images(torch.empty(0, 1, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.long))
    assert set(Stage2Data(none, none, none, {}).counts()) | {IND_TEST, PSEUDO, HELD_OUT} < set(RESERVED)


# --- arguments ----------------------------------------------------------------------------------


def test_experiment_from_arguments(birds, insects):
    found = experiment_from_arguments(parse("--task", "custom", "--ind-dir", birds, "--ood-dir", insects))
    assert found == Experiment("custom_birds_3x32", custom_task(birds, [insects]), "all")
    found = experiment_from_arguments(parse("--task", "custom", "--ind-dir", birds, "--image-size", 28, "--grey"))
    assert found.name == "custom_birds_1x28" and found.task == custom_task(birds, [], 28, 1)
    found = experiment_from_arguments(parse("--task", "same_dataset_kmnist", "--partition", "partition3"))
    assert found == Experiment("same_dataset_kmnist", TASKS["same_dataset_kmnist"], "partition3")
    found = experiment_from_arguments(parse("--task", "different_dataset", "--ood-dir", insects))
    assert found.task.ood_datasets == (*TASKS["different_dataset"].ood_datasets, "insects")


@pytest.mark.parametrize(
    ("task", "width", "name", "networks"),
    [
        ("same_dataset_cifar10", "narrow", "same_dataset_cifar10_narrow", "narrow"),
        ("same_dataset_cifar10", "full", "same_dataset_cifar10", "cifar10"),
        ("same_dataset_digits_rgb", "narrow", "same_dataset_digits_rgb", "narrow"),
        ("same_dataset_digits_rgb", "full", "same_dataset_digits_rgb_full", "cifar10"),
    ],
)
def test_networks_of_another_width_than_the_tasks_own_have_another_name(task, width, name, networks):
    argv = ("--task", task, "--networks", width, "--partition", "partition2")
    found = experiment_from_arguments(parse(*argv))
    assert (found.name, found.task.networks, found.partition) == (name, networks, "partition2")
    assert found.checkpoint("train_cvae") == Path(f"ckpt/{name}_partition2_cvae.pkl")
    assert experiment_from_arguments(parse(*found.options)) == found  # what commands in messages are made of


def test_ind_images_are_no_ood_images_and_training_images_no_test_images(birds, tmp_path):
    for folder in (birds / "test", birds / "train" / next((birds / "train").iterdir()).name, birds, birds.parent):
        with pytest.raises(UserError, match="holds IND images of .*; name a folder of other images"):
            custom_task(birds, [folder])
    (birds / "ood").mkdir()  # beside train and test is as good a place as any
    assert custom_task(birds, [birds / "ood"]).ood_datasets == ("ood",)
    shutil.rmtree(birds / "test")
    (birds / "test").symlink_to("train")
    with pytest.raises(UserError, match="train and test are the same folder; expected other images in each"):
        custom_task(birds)


def test_own_images_have_narrow_networks_too(birds):
    found = experiment_from_arguments(parse("--task", "custom", "--ind-dir", birds, "--networks", "narrow"))
    assert (found.name, found.task.networks) == ("custom_birds_3x32_narrow", "narrow")
    assert experiment_from_arguments(parse(*found.options)) == found


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "custom"], "--task custom needs --ind-dir DIR"),
        (["--ind-dir", "x"], "--ind-dir goes with --task custom only; same_dataset_digits has its own images"),
        (["--grey"], "--grey goes with --task custom only"),
        (["--image-size", "28"], "--image-size goes with --task custom only"),
        (["--networks", "narrow"], "--networks narrow: same_dataset_digits has images of 8x8 pixels, .* take 32x32"),
        (
            ["--task", "different_dataset", "--partition", "partition2"],
            "--partition partition2: different_dataset has all",
        ),
    ],
)
def test_arguments_that_do_not_go_together(argv, message):
    with pytest.raises(UserError, match=message):
        experiment_from_arguments(parse(*argv))


def test_the_partition_is_the_one_asked_for_or_the_first():
    assert Experiment.of("different_dataset", TASKS["different_dataset"]).partition == "all"
    assert Experiment.of("same_dataset_mnist", MNIST, "partition5").partition == "partition5"


# --- the commands -------------------------------------------------------------------------------


def run(module, *argv: object) -> int:
    return run_command(module.main, module.get_parser(), [str(word) for word in argv])


def test_own_images_through_training_and_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, split in enumerate(("train", "test")):
        for label, name in enumerate(("left", "right")):
            folder = tmp_path / "sides" / split / name
            folder.mkdir(parents=True)
            for i, image in enumerate(squares(np.full(4, label), 28, 1, 10 * seed + label)):
                Image.fromarray(image[0]).save(folder / f"{i}.png")
    write_folder(tmp_path, "noise", 6)
    data = ["--task", "custom", "--ind-dir", "sides", "--image-size", 28, "--grey", "--device", "cpu"]
    for command in ("train_classifier", "train_cvae"):
        assert run(train, *data, "--command", command, "--epochs", 1, "--precision", "fp32") == 0
    made = ["custom_sides_1x28_all_classifier.pkl", "custom_sides_1x28_all_cvae.pkl"]
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == made
    assert run(evaluate, *data, "--tune", "joint") == 2
    no_images = "custom_sides_1x28 has no OOD images; name a folder of them with --ood-dir DIR"
    assert f"--tune joint: {no_images}" in capsys.readouterr().err
    assert run(evaluate, *data, "--ood-dataset", "nose") == 2
    assert no_images in capsys.readouterr().err
    features = [*data, "--space", "features"]
    assert run(train, *features, "--command", "train_cvae", "--epochs", 1, "--precision", "fp32") == 0
    for argv in ([*data, "--tune", "last-layer"], [*features, "--residuals", 1, "--mode", "CMG-energy"]):
        assert run(evaluate, *argv, "--max-confidence", 0.5, "--epochs", 1, "--output", "none.json") == 0
        assert f"\n{NO_OOD}\n" in capsys.readouterr().out
        assert {row["ood_dataset"] for row in json.loads((tmp_path / "none.json").read_text())["detection"]} == {PSEUDO}
    assert run(ablations, *data, "--epochs", 1, "--variant=--tune joint") == 2
    assert f"--tune joint: {no_images}" in capsys.readouterr().err
    argv = ["--epochs", 1, "--variant=", "--variant=--sigma 1", "--output", "a.json"]
    assert run(ablations, *data, *argv) == 0 and f"\n{NO_OOD}\n" in capsys.readouterr().out
    args = ablations.get_parser().parse_args(list(map(str, data)))
    args.argv = list(map(str, data))
    assert "--tune joint" not in ablations.read_arguments(args)[1]
    assert run(evaluate, *data, "--ood-dir", "noise", "--ood-dataset", "nose") == 2
    assert "--ood-dataset nose: custom_sides_1x28 has noise" in capsys.readouterr().err
    assert run(evaluate, *data, "--ood-dir", "noise", "--epochs", 1, "--output", "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text())["images"]["noise"] == 6


@pytest.mark.parametrize("module", ["train", "eval", "datasets.download", "datasets.make_fix"])
def test_help_needs_no_torch(module):
    code = f"import sys, {module}; {module}.get_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_the_command_that_a_missing_checkpoint_advises_makes_the_task_again(tmp_path):
    ind_dir = tmp_path / "two words"
    for split in ("train", "test"):
        for name in ("a", "b"):
            write_folder(ind_dir, f"{split}/{name}", 2)
    task = custom_task(ind_dir, image_size=28, image_channels=1)
    experiment = Experiment("custom_two words_1x28", task, "all")
    words = shlex.split(train_command(experiment, "train_cvae", Path("v.pkl")))
    args = train.get_parser().parse_args(words[3:])
    assert experiment_from_arguments(args) == experiment
    assert args.command == "train_cvae" and experiment.class_names == ("a", "b")
