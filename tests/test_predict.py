"""Judging image files: decoding in chunks, the command, and every way in which it may fail."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from benchmarks import predict as benchmark
from cli.errors import UserError, run_command
from cmg.config import FineTuneConfig
from cmg.detector import CMGDetector
from cmg.predict import COLUMNS, format_predictions, predict_files, write_csv
from datasets import folders
from datasets.decoding import decode_image, open_file
from datasets.folders import read_chunks
from models.main_model import MainModel
from tests.tiny_data import write_folder
from utils import save_checkpoint

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "fly")


def untrained(model: MainModel, mode: str, classes: tuple[int | str, ...]) -> CMGDetector:
    """A detector whose head is the model's own."""
    config = FineTuneConfig(num_ind=len(classes), sigma=1.0)
    return CMGDetector(model, None, config, mode, classes=classes).adopt(model.classifier.state_dict())


@pytest.fixture
def detector_file(tmp_path) -> Path:
    """A detector of grey 8x8 images, whose threshold parts those of `images` in two."""
    torch.manual_seed(0)
    model = MainModel(8, 1, 11, "mnist")
    with torch.no_grad():
        model.classifier.fc2.weight.mul_(30)  # scores that lie apart
    detector = untrained(model, "CMG-energy", CLASSES)
    draws = [torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(9)]
    scores = sorted(detector.predict(images).item() for images in draws)
    detector.threshold, detector.threshold_from = scores[4], "IND test"
    detector.save(tmp_path / "detector.pt")
    return tmp_path / "detector.pt"


@pytest.fixture
def images(tmp_path) -> Path:
    """Nine images: in two folders, of several sizes, modes and formats, with what is to be left out beside them."""
    folder = tmp_path / "images"
    kinds = [
        ("a.png", "L", (8, 8)), ("b.png", "RGB", (8, 8)), ("c.jpg", "L", (20, 11)), ("d.png", "LA", (8, 8)),
        ("in/a.png", "P", (9, 30)), ("in/b.png", "RGBA", (8, 8)), ("in/c.bmp", "1", (8, 8)), ("in/d.png", "L", (7, 5)),
        ("z.png", "L", (8, 8)),
    ]  # fmt: skip
    draw = np.random.default_rng(3)
    for name, mode, (width, height) in kinds:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode).save(path)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.png").write_bytes(b"no image")
    return folder


NAMES = ["a.png", "b.png", "c.jpg", "d.png", "in/a.png", "in/b.png", "in/c.bmp", "in/d.png", "z.png"]
FITTING = {"a.png", "z.png"}


def plain_rows(detector: CMGDetector, files: list[Path]) -> list[tuple]:
    """The file, class, score and verdict of each, one image after the other."""
    rows = []
    for file in files:
        pixels = torch.from_numpy(decode_image(file, 1, 8, resize=True).copy())
        score, number = detector.judge(detector.features(pixels[None] / 255))
        verdict = "OOD" if score.item() > detector.threshold else "IND"
        rows.append((str(file), CLASSES[number.item()], pytest.approx(score.item(), rel=1e-4), verdict))
    return rows


def run(*argv: object) -> int:
    words = ["--device", "cpu", "--precision", "fp32", *argv]
    return run_command(predict.main, predict.get_parser(), [str(word) for word in words])


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


# --- decoding in chunks -------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 4, 100])
def test_chunks_hold_what_single_images_are(images, channels, count):
    files = [images / name for name in NAMES]
    chunks = list(read_chunks(files, channels, 8, count, ahead=2))
    assert [len(chunk.paths) for chunk in chunks] == {1: [1] * 9, 4: [4, 4, 1], 100: [9]}[count]
    assert [path for chunk in chunks for path in chunk.paths] == files
    expected = np.stack([decode_image(file, channels, 8, resize=True) for file in files])
    assert np.array_equal(np.concatenate([chunk.pixels for chunk in chunks]), expected)
    fitting = {1: FITTING, 3: {"b.png"}}[channels]
    assert [flag for chunk in chunks for flag in chunk.changed] == [name not in fitting for name in NAMES]
    assert not any(complaint for chunk in chunks for complaint in chunk.complaints)


def test_what_cannot_be_decoded_is_a_complaint(tmp_path):
    paths = write_folder(tmp_path, "a", 5, size=8, mode="L")
    paths[0].write_bytes(paths[0].read_bytes()[:60])
    paths[1].write_bytes(b"no image")
    Image.new("F", (8, 8)).save(paths[2], "TIFF")
    paths[3].unlink()
    (chunk,) = read_chunks(paths, 1, 8, 10, ahead=0)
    reasons = [
        f"{paths[0]}: cannot be decoded (",
        f"{paths[1]}: cannot be decoded (not an image to Pillow). Replace or remove it",
        f"{paths[2]}: has pixels of mode F; expected 8 or 16 bits per channel. Convert or remove it",
        f"{paths[3]}: cannot be decoded (No such file or directory)",
    ]  # fmt: skip
    assert all(found.startswith(reason) for found, reason in zip(chunk.complaints[:4], reasons, strict=True))
    assert chunk.complaints[4] is None and chunk.changed == [False] * 5
    assert np.array_equal(chunk.pixels[4], decode_image(paths[4], 1, 8))


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize(("threads", "most"), [(1, 40), (2, folders.PIECE)])
def test_only_a_few_chunks_are_decoded_ahead(tmp_path, monkeypatch, threads, most, ahead):
    begun = []

    def decode(paths, pixels):
        begun.append(len(paths))
        return [(False, None)] * len(paths)

    monkeypatch.setattr(folders, "_decode_into", decode)
    monkeypatch.setattr(folders, "_threads_for", lambda paths: threads)
    chunks = read_chunks([tmp_path / f"{k}" for k in range(400)], 1, 8, 40, ahead)
    for number, _ in enumerate(chunks, start=1):
        assert sum(begun) <= 40 * (number + ahead)
    assert sum(begun) == 400 and max(begun) == most


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA", "1", "I;16"])
def test_small_png_files_are_opened_directly_and_hold_the_same(tmp_path, mode):
    path, noise = tmp_path / "a.png", np.random.default_rng(0).integers(256, size=(9, 7), dtype=np.uint8)
    image = Image.fromarray(noise.astype(np.uint16) * 200) if mode == "I;16" else Image.fromarray(noise).convert(mode)
    image.save(path)
    with Image.open(path) as expected, open_file(path) as found:
        assert (found.mode, found.size, found.format) == (expected.mode, expected.size, expected.format)
        assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_a_small_file_that_claims_to_be_huge_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (20000, 20000)).save(path)
    assert path.stat().st_size > folders.SMALL  # of bytes that could be decoded; the header is what counts
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="could be decompression bomb DOS attack"):
        decode_image(path, 1, 8, resize=True)


def test_small_files_are_decoded_by_one_thread_and_large_ones_by_several(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "THREADS", 5)
    small, large, missing = tmp_path / "s", tmp_path / "l", tmp_path / "m"
    small.write_bytes(bytes(1000))
    large.write_bytes(bytes(100_000))
    found = [folders._threads_for(paths) for paths in ([small] * 3, [large, small], [missing], [missing, large])]
    assert found == [1, 5, 1, 5]


# --- the command --------------------------------------------------------------------------------


def test_predictions_are_those_of_a_plain_loop(images, detector_file):
    detector = CMGDetector.load(detector_file, CPU)
    files = [images / name for name in NAMES]
    predictions = predict_files(detector, files, 2)
    assert [prediction[:4] for prediction in predictions] == plain_rows(detector, files)
    assert {prediction.verdict for prediction in predictions} == {"IND", "OOD"}
    assert [prediction.changed for prediction in predictions] == [name not in FITTING for name in NAMES]


def test_the_csv_holds_every_file_in_order(images, detector_file, tmp_path, capsys):
    broken = images / "in" / "broken.png"
    broken.write_bytes(b"no image")
    out = tmp_path / "new" / "out.csv"
    assert run("--detector", detector_file, images, "--csv", out, "--batch-size", 4) == 1
    rows = read_csv(out)
    assert list(rows[0]) == list(COLUMNS) == ["file", "class", "score", "verdict", "error"]
    failed = [row for row in rows if row["error"]]
    error = f"{broken}: cannot be decoded (not an image to Pillow). Replace or remove it"
    assert failed == [{"file": str(broken), "class": "", "score": "", "verdict": "", "error": error}]
    assert rows.index(failed[0]) == NAMES.index("in/b.png") + 1
    detector = CMGDetector.load(detector_file, CPU)
    expected = plain_rows(detector, [images / name for name in NAMES])
    scored = [(r["file"], r["class"], float(r["score"]), r["verdict"]) for r in rows if r is not failed[0]]
    assert scored == expected
    printed = capsys.readouterr()
    assert printed.err == f"predict: {error}\n"
    ood = sum(row[3] == "OOD" for row in expected)
    assert printed.out.splitlines() == [
        f"wrote {out}",
        "converted to 8x8 pixels in 8-bit grey: 7 of 9",
        f"10 images: {9 - ood} IND, {ood} OOD, 1 unreadable; OOD above {detector.threshold:.6g}, "
        "which 95 % of the IND test images do not exceed",
    ]


def test_without_csv_a_table_is_printed(images, detector_file, capsys):
    chosen = [images / "z.png", images / "in"]
    assert run("--detector", detector_file, *chosen, images / "z.png") == 0
    lines = capsys.readouterr().out.splitlines()
    files = [images / name for name in ("z.png", "in/a.png", "in/b.png", "in/c.bmp", "in/d.png")]
    assert lines[0].split() == ["file", "class", "score", "verdict"]
    found = [(file, label, float(score), verdict) for file, label, score, verdict in map(str.split, lines[1:6])]
    assert found == plain_rows(CMGDetector.load(detector_file, CPU), files)
    assert {line[lines[0].index("class") - 2 :][:2] for line in lines[1:6]} == {"  "}
    assert {line[lines[0].index("class") :].split()[0] for line in lines[1:6]} <= set(CLASSES)
    assert lines[6:8] == ["", "converted to 8x8 pixels in 8-bit grey: 4 of 5"] and lines[8].startswith("5 images: ")


def test_one_fitting_image_of_any_suffix(images, detector_file, capsys):
    (images / "z.png").rename(images / "z.scan")
    assert run("--detector", detector_file, images / "z.scan") == 0
    table, _, summary = capsys.readouterr().out.rpartition("\n\n")
    assert "z.scan" in table and summary.startswith("1 image: ") and "converted to" not in summary


def test_colour_detectors_take_grey_images(images, tmp_path, capsys):
    detector = untrained(MainModel(32, 3, 3, "narrow"), "CMG-softmax", (4, 7))
    detector.threshold, detector.threshold_from = 0.5, "IND validation"
    detector.save(tmp_path / "colour.pt")
    assert run("--detector", tmp_path / "colour.pt", images) == 0
    printed = capsys.readouterr().out
    assert "converted to 32x32 pixels in 8-bit colour: 9 of 9\n" in printed
    assert printed.endswith("OOD above 0.5, which 95 % of the IND validation images do not exceed\n")


def test_files_that_are_all_unreadable_are_all_named(tmp_path, detector_file, capsys):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    assert run("--detector", detector_file, tmp_path / "a.png", tmp_path / "b.png") == 1
    printed = capsys.readouterr()
    assert printed.err.count("cannot be decoded (not an image to Pillow)") == 2
    assert [line.split()[1:] for line in printed.out.splitlines()[1:3]] == [["-", "-", "unreadable"]] * 2
    assert "2 images: 0 IND, 0 OOD, 2 unreadable; " in printed.out


def test_a_closed_folder_is_left_out_by_name(images, detector_file, tmp_path, monkeypatch, capsys):
    """And what is not a plain file, likewise."""
    scandir = os.scandir

    def refuse(path):
        if Path(path) == images / "in":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    os.mkfifo(images / "pipe.png")
    assert run("--detector", detector_file, images, "--csv", tmp_path / "out.csv") == 1
    printed = capsys.readouterr()
    complaints = [
        f"{images}/in: cannot be read (Permission denied). Make it readable or remove it",
        f"{images}/pipe.png: is not a plain file but a pipe. Remove it",
    ]
    assert printed.err.splitlines() == [f"predict: {complaint}" for complaint in complaints]
    assert "7 images: " in printed.out and ", 2 unreadable; " in printed.out
    rows = read_csv(tmp_path / "out.csv")
    assert [row["file"] for row in rows if not row["error"]] == [
        str(images / name) for name in NAMES if "/" not in name
    ]
    assert [(row["file"], row["error"]) for row in rows[5:]] == [
        (str(images / "in"), complaints[0]),
        (str(images / "pipe.png"), complaints[1]),
    ]
    assert run("--detector", detector_file, images / "in") == 1
    assert "1 image: 0 IND, 0 OOD, 1 unreadable; " in capsys.readouterr().out


def test_photos_are_judged_upright(detector_file, tmp_path):
    upright = Image.fromarray(np.random.default_rng(5).integers(0, 256, (8, 8), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    detector = CMGDetector.load(detector_file, CPU)
    first, second = predict_files(detector, [tmp_path / "a.png", tmp_path / "b.png"], 2)
    assert first[1:4] == second[1:4]


def test_names_that_are_no_text_are_written_as_they_are_and_printed_escaped(images, detector_file, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    os.rename(images / "z.png", images / name)
    predictions = predict_files(CMGDetector.load(detector_file, CPU), [images / name], 2)
    assert "caf\\xe9.png" in format_predictions(predictions)
    write_csv(tmp_path / "out.csv", predictions)
    assert read_csv(tmp_path / "out.csv")[0]["file"] == str(images / name)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder; expected an image or a folder of images"),
        (["images", "nowhere"], "nowhere: no such file or folder"),
        (["images", "pipe"], "pipe: is a pipe; expected an image or a folder of images"),
        (["empty"], "empty: no images there; expected a folder of images, in subfolders or not (.avif .bmp .gif"),
        (["images", "--csv", "empty"], "cannot write empty: it is a folder; name a file"),
        (["images", "--detector", "nowhere.pt"], "nowhere.pt: no such file"),
        (["images", "--detector", "cut.pt"], "cut.pt: is not a checkpoint or is damaged"),
        (
            ["images", "--detector", "other.pt"],
            "other.pt: is not a detector. Make one with: python -m eval --mode MODE",
        ),
        (["images", "--device", "tpu9"], "--device tpu9: not a device; expected cpu, cuda or cuda:N"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(images, detector_file, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    save_checkpoint(tmp_path / "other.pt", {"weight": torch.zeros(2)})
    (tmp_path / "cut.pt").write_bytes(detector_file.read_bytes()[:5000])
    assert run("--csv", "out.csv", "--detector", detector_file, *argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"predict: error: {message}") and printed.err.count("\n") == 1
    assert printed.out == "" and not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a.png"], "the following arguments are required: --detector"),
        (["a.png", "--detector", "d.pt", "--batch-size", "0"], "argument --batch-size: 0 is out of range"),
        (["a.png", "--detector", "d.pt", "--precision", "fp8"], "argument --precision: invalid choice: 'fp8'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be_are_named(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        predict.get_parser().parse_args(argv)
    assert stopped.value.code == 2 and f"predict: error: {message}" in capsys.readouterr().err


def test_a_failing_write_leaves_nothing(images, detector_file, tmp_path, monkeypatch, capsys):
    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    (tmp_path / "out").mkdir()
    assert run("--detector", detector_file, images, "--csv", tmp_path / "out" / "o.csv") == 2
    assert "o.csv: No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_help_needs_no_torch():
    code = "import sys, predict; predict.get_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# --- the benchmark ------------------------------------------------------------------------------


def test_benchmark_measures_both(capsys):
    argv = ["--images", "40", "--rounds", "1", "--device", "cpu", "--precision", "fp32"]
    assert run_command(benchmark.main, benchmark.get_parser(), argv) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["images"] == 40 and measured["precision"] == "fp32"
    share = measured["images_per_second"] / measured["floor_images_per_second"]
    assert measured["floor_share"] == pytest.approx(share, abs=2e-3) and measured["floor_share"] > 0
