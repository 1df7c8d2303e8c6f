"""Making a fix set: the recipe, and that it is free of the aliases of naive resizing."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cli.errors import UserError, run_command
from datasets import make_fix
from datasets.make_fix import RECIPES, Recipe, choose, find_classes, shrink
from datasets.obtain import read_source, verify
from datasets.sources import SOURCES
from tests.tiny_data import write_folder

SMALL = Recipe(folder="LSUN_fix", classes=("bridge", "church_outdoor"), count=6, even=True)


def make(data_dir, source, seed=0, recipe=SMALL):
    make_fix.make_fix("LSUN-FIX", recipe, source, data_dir, seed)
    return sorted((data_dir / recipe.folder).iterdir())


@pytest.fixture
def source(tmp_path):
    for name in ("bridge", "church_outdoor", "kitchen"):
        write_folder(tmp_path / "source", name, 8, size=40)
    return tmp_path / "source"


# --- resizing -----------------------------------------------------------------------------------


def checkerboard(size: int) -> Image.Image:
    """Single pixels black and white in turn: detail that 32x32 pixels cannot show."""
    rows, columns = np.indices((size, size))
    return Image.fromarray(((rows + columns) % 2 * 255).astype(np.uint8)).convert("RGB")


def spread(image: Image.Image) -> float:
    return float(np.asarray(image, float).std())


@pytest.mark.parametrize("size", [256, 300, 500, 512])
def test_detail_too_fine_becomes_uniform_grey(size):
    board = checkerboard(size)
    shrunk = np.asarray(shrink(board), int)
    assert shrunk.shape == (32, 32, 3)
    assert abs(shrunk - 127.5).max() < 20 and spread(shrink(board)) < 8


def test_naive_resizing_makes_aliases_of_the_same_detail():
    board = checkerboard(300)
    naive = board.resize((32, 32), Image.Resampling.NEAREST)
    strided = Image.fromarray(np.asarray(board)[:288:9, :288:9])
    assert spread(naive) > 120 and spread(strided) > 120  # black and white, where grey is right
    assert spread(shrink(board)) < 2


def test_fine_stripes_leave_no_waves():
    stripes = Image.fromarray(np.tile((np.arange(500) % 5 < 2) * np.uint8(255), (500, 1))).convert("RGB")
    naive, ours = stripes.resize((32, 32), Image.Resampling.NEAREST), shrink(stripes)
    assert spread(naive) > 100 and spread(ours) < 3
    assert abs(np.asarray(ours, float).mean() - 0.4 * 255) < 3


def test_middle_is_taken_and_coarse_structure_kept():
    wide = Image.new("RGB", (768, 256), (255, 0, 0))
    wide.paste((0, 0, 255), (256, 0, 384, 256))
    wide.paste((0, 255, 0), (384, 0, 512, 256))
    shrunk = np.asarray(shrink(wide))
    assert shrunk[5, 3].tolist() == [0, 0, 255] and shrunk[5, 28].tolist() == [0, 255, 0]
    assert shrunk[..., 0].max() == 0  # nothing of the red sides


def test_small_images_are_enlarged_first():
    assert np.asarray(shrink(Image.new("RGB", (40, 30), (1, 2, 3)))).reshape(-1, 3).tolist() == [[1, 2, 3]] * 1024


# --- the recipe ---------------------------------------------------------------------------------


def test_recipes_are_those_of_the_authors():
    lsun, imagenet = RECIPES["LSUN-FIX"], RECIPES["ImageNet-FIX"]
    assert (len(lsun.classes), lsun.count, lsun.even) == (10, 10_000, True)
    assert (len(imagenet.classes), imagenet.count, imagenet.even) == (26, 10_000, False)
    assert set(imagenet.omitted) == {"airliner", "ambulance", "parking_meter", "schooner"}
    assert not set(imagenet.omitted) & set(imagenet.classes)


def test_set_is_png_of_the_right_size_numbered_from_zero(tmp_path, source, capsys):
    files = make(tmp_path, source)
    assert [path.name for path in files] == [f"correct_resize_{i}.png" for i in range(6)]
    for path in files:
        with Image.open(path) as image:
            assert (image.format, image.size, image.mode) == ("PNG", (32, 32), "RGB")
    chosen = choose(SMALL, source, 0)
    assert [path.parent.name for path in chosen] == ["bridge"] * 3 + ["church_outdoor"] * 3
    for path, original in zip(files, chosen, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(shrink(Image.open(original))))
    assert "wrote 6 images to" in capsys.readouterr().out
    assert json.loads((tmp_path / "LSUN-FIX.json").read_text())["files"]["LSUN_fix"] == {"from": str(source), "seed": 0}


def test_seed_alone_decides(tmp_path, source):
    first, again, other = (make(tmp_path / name, source, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again] != [p.read_bytes() for p in other]


def test_even_and_uneven_choice(source):
    assert len(set(choose(SMALL, source, 3))) == 6
    uneven = replace(SMALL, even=False, count=15)
    chosen = choose(uneven, source, 3)
    assert len(set(chosen)) == 15 and {path.parent.name for path in chosen} == {"bridge", "church_outdoor"}


def test_finished_set_reads_and_checks_as_complete(tmp_path, source, monkeypatch):
    make(tmp_path, source)
    monkeypatch.setitem(SOURCES, "LSUN-FIX", replace(SOURCES["LSUN-FIX"], counts={"test": 6}))
    assert verify("LSUN-FIX", tmp_path, "test")["count"] == 6
    assert read_source("LSUN-FIX", tmp_path, "test")[0].shape == (6, 3, 32, 32)


def test_class_folders_may_be_written_otherwise(tmp_path):
    for name in ("Bridge_train", "bridge_val", "church-outdoor", "Airliner", "parking meter"):
        (tmp_path / name).mkdir()
    recipe = replace(SMALL, omitted=("airliner", "parking_meter"))
    assert [path.name for path in find_classes(recipe, tmp_path)] == ["Bridge_train", "church-outdoor"]


# --- refusals -----------------------------------------------------------------------------------


def test_missing_class_is_named(tmp_path, source):
    with pytest.raises(UserError, match="source: no class folder tower; expected one folder of images for each of bri"):
        make(tmp_path, source, recipe=replace(SMALL, classes=("bridge", "tower")))


def test_too_few_images(tmp_path, source):
    with pytest.raises(UserError, match=r"bridge: 8 images of one class, expected at least 9"):
        make(tmp_path, source, recipe=replace(SMALL, count=18))
    with pytest.raises(UserError, match=r"source: 16 images, expected at least 17"):
        make(tmp_path, source, recipe=replace(SMALL, count=17, even=False))


def test_existing_folder_is_not_replaced(tmp_path, source):
    files = make(tmp_path, source)
    before = files[0].read_bytes()
    with pytest.raises(UserError, match="LSUN_fix exists; remove it or name another --data-dir"):
        make(tmp_path, source, seed=5)
    assert files[0].read_bytes() == before


def test_a_second_one_waits_and_finds_the_first_one_s_set(tmp_path, source):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as one does that is at work
    found = []

    def second():
        try:
            make(tmp_path, source)
        except UserError as error:
            found.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive() and not found
    (tmp_path / "LSUN_fix").mkdir()
    os.close(handle)
    thread.join(30)
    assert len(found) == 1 and "LSUN_fix exists; remove it or name another --data-dir" in found[0]


def test_damaged_image_is_named_and_nothing_is_left(tmp_path, source):
    for path in (source / "bridge").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(
        UserError,
        match=r"(image_0000\d\.png: cannot be decoded \(not an image to Pillow\)\. Replace or remove it(; .*)?){3}$",
    ):
        make(tmp_path, source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_command(tmp_path, source, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "LSUN-FIX", SMALL)
    argv = ["--source", str(source), "--name", "LSUN-FIX", "--data-dir", str(tmp_path)]
    assert run_command(make_fix.main, make_fix.get_parser(), argv) == 0
    assert run_command(make_fix.main, make_fix.get_parser(), argv) == 2
    missing = [*argv[2:], "--source", str(tmp_path / "nowhere")]
    assert run_command(make_fix.main, make_fix.get_parser(), [*missing, "--data-dir", str(tmp_path / "other")]) == 2
    assert "nowhere: No such file or directory; expected a folder with one folder" in capsys.readouterr().err
