"""What a task reads: classes, renumbering, sizes, splits and augmentation."""

from __future__ import annotations

from collections import Counter
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torchvision.transforms import RandomCrop, RandomHorizontalFlip

from cli.errors import UserError
from cmg.config import config_for
from datasets.datasetsHelper import Images, load_ind, load_ood, select, split_validation, to_float
from datasets.tasks import HELD_OUT, PARTITIONS, TASKS, Experiment
from tests import tiny_data
from training.train_classifier import ClassifierObjective, crop_and_flip
from utils import generator


def registered(name: str, partition: str | None = None) -> Experiment:
    return Experiment.of(name, TASKS[name], partition)


# --- tasks and partitions -----------------------------------------------------------------------


def test_partitions_are_those_of_the_method():
    assert PARTITIONS == {
        "partition1": (0, 1, 2, 3, 4, 5),
        "partition2": (1, 2, 3, 4, 5, 6),
        "partition3": (2, 3, 4, 5, 6, 7),
        "partition4": (3, 4, 5, 6, 7, 8),
        "partition5": (4, 5, 6, 7, 8, 9),
    }


@pytest.mark.parametrize(
    ("name", "shape", "logits", "sigma", "epochs", "eval_every", "augment", "ood_sets"),
    [
        ("same_dataset_mnist", (1, 28), 11, 3.0, 100, 20, False, 1),
        ("same_dataset_cifar10", (3, 32), 11, 5.0, 200, 20, True, 1),
        ("different_dataset", (3, 32), 110, 5.0, 200, 100, True, 6),
    ],
)
def test_tasks_hold_the_settings_of_the_method(name, shape, logits, sigma, epochs, eval_every, augment, ood_sets):
    task = TASKS[name]
    config = config_for(registered(name), "fp32")
    assert ((task.image_channels, task.image_size), task.logits, config.sigma) == (shape, logits, sigma)
    assert task.epochs == {"train_classifier": epochs, "train_cvae": epochs}
    assert (config.eval_every, task.augment, len(task.ood_datasets)) == (eval_every, augment, ood_sets)
    assert (task.batch_size, config.epochs, task.kl_weight, task.embedded_classes) == (512, 15, 1.0, 10)
    assert (config.batch_size, config.learning_rate, config.mu, config.margins) == (128, 1e-4, 0.1, (0.2, 0.8))


def test_partition_defaults_to_the_first_and_an_unknown_one_is_refused():
    assert registered("different_dataset").partition == "all"
    assert registered("same_dataset_mnist").partition == "partition1"
    with pytest.raises(UserError, match="--partition partition2: different_dataset has all"):
        registered("different_dataset", "partition2")


@pytest.mark.parametrize("partition", PARTITIONS)
def test_mnist_partition_has_its_classes_renumbered_in_order(tmp_path, partition):
    tiny_data.write_mnist(tmp_path, 4)
    experiment, classes = registered("same_dataset_mnist", partition), PARTITIONS[partition]
    assert (experiment.classes, experiment.num_ind, experiment.class_names) == (classes, 6, classes)
    for seed, part in enumerate(load_ind(experiment, tmp_path)):
        written = tiny_data.labels_in_turn(40)
        images = torch.from_numpy(tiny_data.squares(written, 28, 1, seed))
        rows = [n for n in range(40) if written[n] in classes]
        assert torch.equal(part.images, images[rows]) and part.images.dtype == torch.uint8
        assert part.labels.tolist() == [classes.index(written[n]) for n in rows]
    held_out = load_ood(experiment, HELD_OUT, tmp_path)
    assert torch.equal(held_out, images[[n for n in range(40) if written[n] not in classes]])


def test_sizes_of_the_cifar10_tasks(tmp_path):
    tiny_data.write_cifar10(tmp_path, 20)  # 2 of each class in each of 5 training files and one test file
    train, test = load_ind(registered("same_dataset_cifar10", "partition4"), tmp_path)
    assert (len(train), len(test)) == (60, 12)
    assert len(load_ood(registered("same_dataset_cifar10", "partition4"), HELD_OUT, tmp_path)) == 8
    train, test = load_ind(registered("different_dataset"), tmp_path)
    assert (len(train), len(test)) == (100, 20)
    assert test.labels.tolist() == [*range(10), *range(10)]


@pytest.mark.parametrize("name", TASKS["different_dataset"].ood_datasets)
def test_every_ood_set_of_setting_2_reads_its_test_images(tmp_path, name):
    tiny_data.write_cifar100(tmp_path, 7)
    tiny_data.write_svhn(tmp_path, 7)
    for folder in ("LSUN_resize", "LSUN_fix", "Imagenet_resize", "Imagenet_fix"):
        tiny_data.write_folder(tmp_path, folder, 7)
    images = load_ood(registered("different_dataset"), name, tmp_path)
    assert images.shape == (7, 3, 32, 32) and images.dtype == torch.uint8
    seeds = {"SVHN": 201, "CIFAR100": 101}
    if name in seeds:
        written = tiny_data.squares(tiny_data.labels_in_turn(7, 100), 32, 3, seeds[name])
        assert torch.equal(images, torch.from_numpy(written))


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    classes=st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True),
)
def test_select_equals_a_plain_loop(labels, classes):
    data = Images(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels))
    chosen = select(data, classes)
    rows = [n for n, label in enumerate(labels) if label in classes]
    assert chosen.images.flatten().tolist() == rows
    assert chosen.labels.tolist() == [classes.index(labels[n]) for n in rows]


# --- digits -------------------------------------------------------------------------------------


def test_digits_split_is_fixed_disjoint_and_stratified(tmp_path):
    experiment = registered("same_dataset_digits")
    train, test = load_ind(experiment, tmp_path)
    held_out = load_ood(experiment, HELD_OUT, tmp_path)
    again, _ = load_ind(experiment, tmp_path)
    assert torch.equal(train.images, again.images)
    assert (len(train), len(test), len(held_out)) == (722, 361, 238)
    digits = load_digits()
    expected = np.rint(digits.images[digits.target < 6] * 255 / 16).astype(np.uint8)
    in_file = Counter(image.tobytes() for image in expected)
    in_splits = Counter(image.numpy().tobytes() for image in torch.cat([train.images, test.images]))
    assert in_splits == in_file  # every image of the six classes, each as often as it is there
    per_class = torch.bincount(train.labels) / (torch.bincount(train.labels) + torch.bincount(test.labels))
    assert (per_class - 2 / 3).abs().max() < 0.005


# --- validation split ---------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=200), fraction=st.sampled_from([0.0, 0.1, 0.25, 0.5]))
def test_validation_split_is_stratified_disjoint_and_without_seed(labels, fraction):
    data = Images(torch.arange(len(labels)).view(-1, 1, 1, 1), torch.tensor(labels))
    kept = {c: round(fraction * n) for c, n in Counter(labels).items()}
    if fraction and not all(0 < kept[c] < n for c, n in Counter(labels).items()):
        with pytest.raises(UserError, match=f"--val-fraction {fraction}: keeps [0-9]+ of the [0-9]+ training images"):
            split_validation(data, fraction)
        return
    torch.manual_seed(len(labels))
    rest, held = split_validation(data, fraction)
    torch.manual_seed(len(labels) + 1)
    assert torch.equal(split_validation(data, fraction)[1].images, held.images)
    assert sorted([*rest.images.flatten().tolist(), *held.images.flatten().tolist()]) == list(range(len(labels)))
    assert Counter(held.labels.tolist()) == +Counter(kept)


def test_validation_split_is_no_prefix_of_the_classes():
    data = Images(torch.arange(400).view(-1, 1, 1, 1), torch.zeros(400, dtype=torch.int64))
    held = split_validation(data, 0.25)[1].images.flatten()
    assert abs(held.double().mean() - 199.5) < 5 * 115.5 / 100**0.5


# --- images -------------------------------------------------------------------------------------


def test_images_can_be_changed_only_into_new_ones():
    data = Images(torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([4, 5, 6]))
    assert len(data) == 3 and len(data.at(torch.tensor([2]))) == 1
    assert replace(data, labels=data.labels + 1).labels.tolist() == [5, 6, 7] and data.labels.tolist() == [4, 5, 6]
    with pytest.raises(FrozenInstanceError):
        data.labels = data.labels + 1


# --- pixels and augmentation --------------------------------------------------------------------


def test_pixels_become_their_value_over_255():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_float(images), torch.arange(256.0).view(1, 1, 16, 16) / 255)


def test_crop_and_flip_equals_slicing_at_every_offset():
    draw = torch.Generator().manual_seed(0)
    choices = [(row, column, flip) for row in range(9) for column in range(9) for flip in (False, True)]
    images = torch.randint(1, 256, (len(choices), 3, 32, 32), generator=draw, dtype=torch.uint8)
    cropped = crop_and_flip(images, torch.tensor([c[:2] for c in choices]), torch.tensor([c[2] for c in choices]))
    for image, (row, column, flip), result in zip(images, choices, cropped, strict=True):
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = image
        expected = padded[:, row : row + 32, column : column + 32]
        assert torch.equal(result, expected.flip(-1) if flip else expected)


def test_augmentation_has_the_distribution_of_random_crop_and_flip():
    """Both give each of the 162 outcomes of one image equally often, and no other."""
    count = 16_200  # 100 of each expected, sd 10
    image = torch.arange(1024, dtype=torch.int32).view(1, 1, 32, 32)
    offsets, flips = ClassifierObjective(augment=True).draw(count, generator(0, "draws", 0))
    ours = Counter(zip(*offsets.T.tolist(), flips.tolist(), strict=True))
    torch.manual_seed(0)
    theirs, outcomes = Counter(), {}
    for key in [(row, column, flip) for row in range(9) for column in range(9) for flip in (False, True)]:
        result = crop_and_flip(image, torch.tensor([key[:2]]), torch.tensor([key[2]]))
        outcomes[result.numpy().tobytes()] = key
    crop, mirror = RandomCrop(32, padding=4), RandomHorizontalFlip()
    for _ in range(1_620):  # 10 of each expected
        theirs[outcomes[mirror(crop(image)).numpy().tobytes()]] += 1
    assert len(ours) == 162 and min(ours.values()) > 55 and max(ours.values()) < 145
    assert len(theirs) >= 158 and max(theirs.values()) < 26


def test_draws_of_an_epoch_differ_from_another_and_repeat():
    objective = ClassifierObjective(augment=True)
    first, again, other = (objective.draw(50, generator(7, "draws", epoch)) for epoch in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert ClassifierObjective(augment=False).draw(50, generator(7, "draws", 0)) == ()
