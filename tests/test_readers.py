"""Every reader on small files in the true format on disk, whole and damaged."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from cli.errors import UserError
from datasets import folders, obtain
from datasets.datasetsHelper import READERS, load_ind, load_ood
from datasets.decoding import decode_image, square
from datasets.folders import read_images
from datasets.formats import read_idx
from datasets.search import list_images
from datasets.tasks import HELD_OUT, TASKS, Experiment
from tests.tiny_data import (
    python2_pickle,
    squares,
    write_cifar10,
    write_cifar100,
    write_cifar_batch,
    write_folder,
    write_idx,
    write_mnist,
    write_svhn,
)

# --- whole files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_sets(tmp_path, name, folder, compressed):
    write_mnist(tmp_path, 2, folder, compressed)
    for seed, split in enumerate(("train", "test")):
        data = READERS[name](tmp_path, split)
        assert data.images.dtype == torch.uint8 and data.labels.dtype == torch.int64
        assert data.labels.tolist() == [*range(10)] * 2
        assert np.array_equal(data.images.numpy(), squares(data.labels.numpy(), 28, 1, seed))


def test_cifar10(tmp_path):
    write_cifar10(tmp_path, 12)
    train, test = READERS["cifar10"](tmp_path, "train"), READERS["cifar10"](tmp_path, "test")
    assert train.labels.tolist() == [*range(10), 0, 1] * 5 and test.labels.tolist() == [*range(10), 0, 1]
    assert np.array_equal(train.images[12:24].numpy(), squares(test.labels.numpy(), 32, 3, 1))
    assert np.array_equal(test.images.numpy(), squares(test.labels.numpy(), 32, 3, 5))


def test_cifar100_reads_the_fine_labels(tmp_path):
    write_cifar100(tmp_path, 103)
    test = READERS["CIFAR100"](tmp_path, "test")
    assert test.labels.tolist() == [*range(100), 0, 1, 2]
    assert np.array_equal(test.images.numpy(), squares(test.labels.numpy(), 32, 3, 101))


def test_cifar_batches_pickled_by_python3_are_read_too(tmp_path):
    write_cifar10(tmp_path, 10)
    images = squares(np.arange(10), 32, 3, 9).reshape(10, -1)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps({b"data": images, b"labels": list(range(10))}))
    assert np.array_equal(READERS["cifar10"](tmp_path, "test").images.numpy().reshape(10, -1), images)


def test_svhn_calls_class_ten_zero(tmp_path):
    write_svhn(tmp_path, 12)
    test = READERS["SVHN"](tmp_path, "test")
    assert test.labels.tolist() == [*range(10), 0, 1]
    assert np.array_equal(test.images.numpy(), squares(test.labels.numpy(), 32, 3, 201))


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("LSUN", "LSUN_resize"),
        ("LSUN-FIX", "LSUN_fix"),
        ("tinyImageNet", "Imagenet_resize"),
        ("ImageNet-FIX", "Imagenet_fix"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_image_folders(tmp_path, name, folder, nested):
    paths = write_folder(tmp_path, folder, 5, nested=nested)
    data = READERS[name](tmp_path, "test")
    expected = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths])
    assert np.array_equal(data.images.numpy(), expected) and data.labels.tolist() == [0] * 5


def test_tasks_read_the_sets(tmp_path):
    write_mnist(tmp_path, 3, "KMNIST")
    experiment = Experiment.of("same_dataset_kmnist", TASKS["same_dataset_kmnist"], "partition2")
    train, test = load_ind(experiment, tmp_path)
    assert train.labels.tolist() == [*range(6)] * 3 and len(test) == 18
    assert len(load_ood(experiment, HELD_OUT, tmp_path)) == 12


def test_other_counts_than_the_published_are_pointed_out(tmp_path, capsys):
    write_mnist(tmp_path, 1)
    READERS["mnist"](tmp_path, "test")
    assert capsys.readouterr().out == f"note: mnist in {tmp_path} has 10 test images; 10,000 are published\n"


# --- damaged files ------------------------------------------------------------------------------


def test_idx_errors(tmp_path):
    path = tmp_path / "a"
    whole = struct.pack(">HBBI", 0, 8, 1, 5) + b"12345"
    path.write_bytes(whole)
    assert read_idx(path).tolist() == [49, 50, 51, 52, 53]
    for damaged in (whole[:-1], whole + b"6", whole[:6], b"", b"\0\0\x0d\x01" + whole[4:], b"\0\0\x08\x00"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="a: is not a complete IDX file of bytes. Delete it and fetch it again"):
            read_idx(path)
    packed = tmp_path / "b.gz"
    for damaged in (gzip.compress(whole)[:-9], b"no gzip", gzip.compress(whole)[:12] + b"\xff" * 12):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=r"b\.gz: cannot be read \(.*\)\. Delete it and fetch it again"):
            read_idx(packed)


def test_idx_header_that_claims_too_much_is_refused_without_the_memory(tmp_path):
    (tmp_path / "a").write_bytes(struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1))
    with pytest.raises(UserError, match="not a complete IDX file"):
        read_idx(tmp_path / "a")


def test_idx_counts_that_differ(tmp_path):
    write_mnist(tmp_path, 1)
    write_idx(tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", np.arange(9))
    with pytest.raises(UserError, match="raw: 10 images and 9 labels; expected as many of each"):
        READERS["mnist"](tmp_path, "test")
    write_idx(tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", np.zeros((10, 1)))
    with pytest.raises(UserError, match="the test images have 3 dimensions and the labels 2; expected 3 and 1"):
        READERS["mnist"](tmp_path, "test")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            pickle.dumps(RunsCode()),
            r"test_batch: is not a CIFAR batch \(holds (posix|nt)\.mkdir, which could run code\)",
        ),
        (b"cbuiltins\neval\n(V1\ntR.", r"holds builtins\.eval, which could run code"),
        (b"", "test_batch: is not a CIFAR batch"),
        (b"\x80\x02junk", "test_batch: is not a CIFAR batch"),
        (python2_pickle({b"labels": [1]}), "test_batch: is not a CIFAR batch"),
        (python2_pickle([1, 2]), "test_batch: is not a CIFAR batch"),
        (
            python2_pickle({b"data": np.zeros((2, 3000), np.uint8), b"labels": [1, 2]}),
            "test_batch: is not a CIFAR batch",
        ),
        (python2_pickle({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "2 images and 1 labels"),
    ],
    ids=["runs code", "calls eval", "empty", "junk", "no images", "a list", "other width", "other counts"],
)
def test_cifar_errors(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path, 2)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match=message):
        READERS["cifar10"](tmp_path, "test")
    assert not (tmp_path / "ran").exists()
    assert len(READERS["cifar10"](tmp_path, "train")) == 10


def test_cifar_batch_that_is_cut_short(tmp_path):
    write_cifar10(tmp_path, 2)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="data_batch_3: is not a CIFAR batch"):
        READERS["cifar10"](tmp_path, "train")


def test_svhn_errors(tmp_path):
    path = tmp_path / "test_32x32.mat"
    for content in (b"", b"no mat file" * 50):
        path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"test_32x32\.mat: is not an SVHN file \(.*\)\. Delete it and fetch it again"
        ):
            READERS["SVHN"](tmp_path, "test")
    for content, message in (
        ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, "is not an SVHN file"),
        ({"X": np.zeros((32, 32), np.uint8), "y": [[1]]}, "is not an SVHN file"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": [[1], [2]]}, "its images are float64, expected uint8"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1]]}, "2 images and 1 labels"),
    ):
        savemat(path, content)
        with pytest.raises(UserError, match=message):
            READERS["SVHN"](tmp_path, "test")
    write_svhn(tmp_path, 10)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match="is not an SVHN file"):
        READERS["SVHN"](tmp_path, "test")


def test_labels_that_do_not_fit_the_classes_are_refused(tmp_path):
    write_mnist(tmp_path, 1)
    write_idx(tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte", np.arange(1, 11))
    with pytest.raises(
        UserError, match=r"mnist in .*: labels 1 to 10, expected 0 to 9\. Remove its files and fetch it"
    ):
        READERS["mnist"](tmp_path, "test")
    write_svhn(tmp_path, 2)
    images = np.zeros((32, 32, 3, 2), np.uint8)
    savemat(tmp_path / "test_32x32.mat", {"X": images, "y": np.uint8([[37], [10]])})
    with pytest.raises(UserError, match=r"SVHN in .*: labels 0 to 37, expected 0 to 9"):
        READERS["SVHN"](tmp_path, "test")
    write_cifar10(tmp_path, 2)
    for labels, complaint in (([0, -1], "labels -1 to 0, expected 0 to 9"), ([b"a", b"b"], "is not a CIFAR batch")):
        batch = tmp_path / "cifar-10-batches-py" / "test_batch"
        write_cifar_batch(batch, squares(np.arange(2), 32, 3, 0), {b"labels": labels})
        with pytest.raises(UserError, match=complaint):
            READERS["cifar10"](tmp_path, "test")
    savemat(tmp_path / "test_32x32.mat", {"X": images, "y": [[1.5], [2]]})
    with pytest.raises(UserError, match=r"is not an SVHN file \(its labels are no whole numbers\)"):
        READERS["SVHN"](tmp_path, "test")


def test_batch_sizes_may_differ(tmp_path):
    write_cifar10(tmp_path, 2)
    write_cifar_batch(
        tmp_path / "cifar-10-batches-py" / "data_batch_5", squares(np.arange(3), 32, 3, 0), {b"labels": [0, 1, 2]}
    )
    assert len(READERS["cifar10"](tmp_path, "train")) == 11


# --- folders ------------------------------------------------------------------------------------


def test_order_is_that_of_the_names(tmp_path):
    images = ["B.bmp", "a.png", "b/10.PNG", "b/2.png", "c.jpeg", "p.HEIC", "q.jfif"]
    for name in (*reversed(images), ".hidden.png", ".git/x.png", "b/@eaDir/2.png", "__MACOSX/a.png", "note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list_images(tmp_path) == images


def test_folder_errors_name_the_file(tmp_path):
    with pytest.raises(
        UserError, match=r"nowhere: cannot be read \(No such file or directory\)\. Make it readable or remove it$"
    ):
        read_images(tmp_path / "nowhere", 3, 32)
    paths = write_folder(tmp_path, "a", 5)
    content = paths[2].read_bytes()
    paths[2].write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"image_00002\.png: cannot be decoded \(.*\)\. Replace or remove it$"):
        read_images(tmp_path / "a", 3, 32)
    paths[3].write_bytes(b"no image")
    with pytest.raises(
        UserError,
        match=r"image_00002\.png: .*; [^;]*image_00003\.png: cannot be decoded \(not an image to Pillow\)[^;]*$",
    ):
        read_images(tmp_path / "a", 3, 32)
    paths[2].write_bytes(content)
    with pytest.raises(UserError, match=r"image_00003\.png: cannot be decoded \(not an image to Pillow\)"):
        read_images(tmp_path / "a", 3, 32)
    Image.new("RGB", (32, 31)).save(paths[3])
    with pytest.raises(UserError, match=r"image_00003\.png: is 32x31 pixels; expected 32x32\. Replace or remove it"):
        read_images(tmp_path / "a", 3, 32)
    for deep in (Image.new("F", (32, 32)), Image.new("I", (32, 32), 1 << 16), Image.new("I", (32, 32), -1)):
        deep.save(paths[3], "TIFF")
        expected = rf"image_00003\.png: has pixels of mode {deep.mode}; expected 8 or 16 bits per channel"
        with pytest.raises(UserError, match=expected):
            read_images(tmp_path / "a", 3, 32)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    write_folder(tmp_path, "a", 2)
    (tmp_path / "a" / "lost.png").symlink_to(tmp_path / "gone.png")
    expected = r"a/lost\.png: cannot be read \(No such file or directory\)\. Make it readable or remove it$"
    with pytest.raises(UserError, match=expected):
        read_images(tmp_path / "a", 3, 32)


def test_huge_images_are_refused_by_name(tmp_path, monkeypatch):
    (path,) = write_folder(tmp_path, "a", 1, size=64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        UserError, match=r"image_00000\.png: cannot be decoded \(Image size \(4096 pixels\) exceeds limit"
    ):
        decode_image(path, 3, 32, resize=True)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_modes_of_eight_bits_become_colour(tmp_path, mode):
    (path,) = write_folder(tmp_path, "a", 1, mode=mode)
    expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode_image(path, 3, 32), expected)


@pytest.mark.parametrize("name", ["a.png", "a.pgm", "a.tif"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    values = np.uint16([[0, 128, 129, 257], [32768, 65278, 65407, 65535]]).repeat(2, axis=0)
    Image.fromarray(values).save(tmp_path / name)
    nearest = np.uint8([[0, 0, 1, 1], [128, 254, 255, 255]]).repeat(2, axis=0)  # of value * 255 / 65535
    assert np.array_equal(decode_image(tmp_path / name, 1, 4), nearest[None])
    assert np.array_equal(decode_image(tmp_path / name, 3, 4), np.stack([nearest] * 3))


def test_grey(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    assert np.array_equal(decode_image(tmp_path / "red.png", 1, 8), np.full((1, 8, 8), 76, np.uint8))  # 0.299 * 255


def test_square_takes_the_middle():
    wide = Image.fromarray(np.repeat(np.uint8([[0, 100, 100, 200]]), 2, axis=0))
    assert np.array_equal(np.asarray(square(wide, 2)), np.full((2, 2), 100))
    tall = Image.new("L", (50, 101), 7)
    assert square(tall, 32).size == (32, 32) and np.asarray(square(tall, 32)).tolist() == [[7] * 32] * 32
    assert square(Image.new("L", (3, 4000)), 32).size == (32, 32)


# --- the packed file ----------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the files that are decoded."""
    seen, decode = [], folders.decode_image

    def watch(path, *rest):
        seen.append(path.name)
        return decode(path, *rest)

    monkeypatch.setattr(folders, "decode_image", watch)
    return seen


def test_second_reading_decodes_nothing(tmp_path, decoded):
    write_folder(tmp_path, "a", 5)
    first, names = read_images(tmp_path / "a", 3, 32)
    assert len(decoded) == 5 and (tmp_path / ".a.3x32x32.npz").is_file()
    again, names_again = read_images(tmp_path / "a", 3, 32)
    assert len(decoded) == 5 and np.array_equal(first, again) and names == names_again


@pytest.mark.parametrize(("start", "root"), [("a", "."), ("a/deep", ".."), ("a/deep", "../../a"), (".", "a/deep/..")])
def test_the_packed_file_is_beside_the_folder_however_it_is_named(tmp_path, decoded, monkeypatch, start, root):
    write_folder(tmp_path, "a", 2)
    (tmp_path / "a" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / start)
    images, names = read_images(Path(root), 3, 32)
    assert images.shape == (2, 3, 32, 32) and names == ["image_00000.png", "image_00001.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.3x32x32.npz", "a"]
    assert np.array_equal(read_images(tmp_path / "a", 3, 32)[0], images) and len(decoded) == 2


def rewrite(folder):
    Image.new("RGB", (32, 32), 9).save(folder / "image_00001.png")


def touch(folder):
    os.utime(folder / "image_00001.png", ns=(0, 0))


def lengthen(folder):
    """Another content under the old time, as when a copy keeps it."""
    path = folder / "image_00001.png"
    times = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(times, times))


def add(folder):
    Image.new("RGB", (32, 32), 9).save(folder / "image_00009.png")


def remove(folder):
    (folder / "image_00001.png").unlink()


def rename(folder):
    (folder / "image_00001.png").rename(folder / "zzz.png")


@pytest.mark.parametrize("change", [rewrite, touch, lengthen, add, remove, rename])
def test_changed_folder_is_decoded_anew(tmp_path, decoded, change):
    write_folder(tmp_path, "a", 5)
    read_images(tmp_path / "a", 3, 32)
    change(tmp_path / "a")
    images, names = read_images(tmp_path / "a", 3, 32)
    assert len(decoded) == 5 + len(names)
    fresh, _ = read_images(tmp_path / "a", 3, 32, packed=False)
    assert np.array_equal(images, fresh)


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps(RunsCode())], ids=["empty", "junk", "runs code"])
def test_damaged_packed_file_is_made_anew(tmp_path, monkeypatch, decoded, content):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, "a", 3)
    (tmp_path / ".a.3x32x32.npz").write_bytes(content)
    images, _ = read_images(tmp_path / "a", 3, 32)
    assert len(decoded) == 3 and not (tmp_path / "ran").exists()
    again, _ = read_images(tmp_path / "a", 3, 32)
    assert len(decoded) == 3 and np.array_equal(images, again)


def test_packed_file_with_a_flipped_byte_is_not_believed(tmp_path, decoded):
    write_folder(tmp_path, "a", 3)
    images, _ = read_images(tmp_path / "a", 3, 32)
    cache = tmp_path / ".a.3x32x32.npz"
    content = bytearray(cache.read_bytes())
    content[len(content) // 2] ^= 1
    cache.write_bytes(content)
    again, _ = read_images(tmp_path / "a", 3, 32)
    assert len(decoded) == 6 and np.array_equal(images, again)


def test_other_shapes_have_packed_files_of_their_own(tmp_path, decoded):
    write_folder(tmp_path, "a", 3)
    read_images(tmp_path / "a", 3, 32)
    read_images(tmp_path / "a", 1, 28, resize=True)
    assert len(decoded) == 6
    assert read_images(tmp_path / "a", 1, 28, resize=True)[0].shape == (3, 1, 28, 28) and len(decoded) == 6
    assert read_images(tmp_path / "a", 3, 32)[0].shape == (3, 3, 32, 32) and len(decoded) == 6


def test_place_that_cannot_be_written_is_read_all_the_same(tmp_path, decoded, monkeypatch):
    write_folder(tmp_path, "a", 3)

    def refuse(path):
        raise UserError("read-only")

    monkeypatch.setattr(folders, "replacing", refuse)
    assert len(read_images(tmp_path / "a", 3, 32)[0]) == 3
    assert len(read_images(tmp_path / "a", 3, 32)[0]) == 3 and len(decoded) == 6


def test_several_threads_decode(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "THREADS", 4)
    write_folder(tmp_path, "a", 40)
    seen, decode = set(), folders.decode_image

    def watch(path, *rest):
        seen.add(threading.get_ident())
        time.sleep(0.001)
        return decode(path, *rest)

    monkeypatch.setattr(folders, "decode_image", watch)
    images, names = read_images(tmp_path / "a", 3, 32)
    assert len(seen) > 1
    assert np.array_equal(images[17], np.asarray(Image.open(tmp_path / "a" / names[17])).transpose(2, 0, 1))


def test_second_start_with_ten_thousand_images_takes_well_under_a_second(tmp_path):
    write_folder(tmp_path, "a", 1)
    content = (tmp_path / "a" / "image_00000.png").read_bytes()
    for i in range(1, 10_000):
        (tmp_path / "a" / f"image_{i:05d}.png").write_bytes(content)
    first, _ = read_images(tmp_path / "a", 3, 32)
    start = time.process_time()  # whatever else the machine is doing
    again, _ = read_images(tmp_path / "a", 3, 32)
    assert time.process_time() - start < 0.8
    assert again.shape == (10_000, 3, 32, 32) and np.array_equal(first, again)


def test_verifying_reads_the_images_and_not_the_packed_file(tmp_path, decoded):
    write_folder(tmp_path, "LSUN_fix", 3)
    READERS["LSUN-FIX"](tmp_path, "test")
    with pytest.raises(UserError, match="3 test images, expected 10,000"):
        obtain.verify("LSUN-FIX", tmp_path, "test")
    assert len(decoded) == 6
