"""Image files and folders as people have them: photos on their side, links in circles, closed folders, thin strips."""

from __future__ import annotations

import os
import random
import socket
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cli.errors import UserError
from datasets import decoding, obtain
from datasets.datasetsHelper import load_ind, load_ood
from datasets.decoding import decode_image, square
from datasets.experiments import custom_task
from datasets.folders import read_chunks, read_images
from datasets.search import list_images, search, state_of
from datasets.tasks import Experiment
from tests.tiny_data import write_folder

ORIENTATION = 0x0112
AS_STORED = {  # orientation -> how a camera would have stored an upright image
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
FORMATS = {"a.png": {}, "a.tif": {}, "a.webp": {"lossless": True}, "a.jpg": {"quality": 100, "subsampling": 0}}


def photo(width: int = 24, height: int = 16) -> Image.Image:
    """Squares of 8 pixels of one colour each, which JPEG keeps."""
    colours = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(8, 0).repeat(8, 1))


def store(image: Image.Image, path: Path, orientation: int, **options: object) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turn = AS_STORED[orientation]
    (image if turn is None else image.transpose(turn)).save(path, exif=exif, **options)


# --- orientation --------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", AS_STORED)
@pytest.mark.parametrize(("name", "options"), FORMATS.items())
def test_photos_are_read_upright(tmp_path, name, options, orientation):
    store(photo(), tmp_path / f"turned_{name}", orientation, **options)
    photo().save(tmp_path / name, **options)
    found = decode_image(tmp_path / f"turned_{name}", 3, 16, resize=True)
    expected = decode_image(tmp_path / name, 3, 16, resize=True)
    # Chroma of a JPEG file is rounded otherwise along rows than along columns.
    assert np.abs(found.astype(int) - expected).max() <= (3 if name == "a.jpg" else 0)


@pytest.mark.parametrize("orientation", [3, 6, 7])
@pytest.mark.parametrize(
    ("mode", "ending"),
    [*((mode, "png") for mode in ("L", "P", "1", "RGBA", "I;16"))]
    + [(mode, "tif") for mode in ("L", "P", "1", "RGBA", "I;16", "CMYK", "LA")],
)
def test_every_mode_is_turned(tmp_path, mode, ending, orientation):
    grey = photo(16, 24).convert("L")
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    store(image, tmp_path / f"turned.{ending}", orientation)
    image.save(tmp_path / f"upright.{ending}")
    found, expected = (
        decode_image(tmp_path / f"{name}.{ending}", 1, 16, resize=True) for name in ("turned", "upright")
    )
    assert np.array_equal(found, expected)


def tiff(bits: int, white_is_zero: bool, pixels: bytes) -> bytes:
    """A grey TIFF file of 8x8 pixels."""
    tags = {256: (3, 8), 257: (3, 8), 258: (3, bits), 259: (3, 1), 262: (3, 1 - white_is_zero), 277: (3, 1)}
    tags |= {278: (3, 8), 279: (4, len(pixels))}
    tags[273] = (4, 8 + 2 + 12 * (len(tags) + 1) + 4)  # where the pixels begin
    entries = [struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(tags.items())]
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries) + bytes(4) + pixels


@pytest.mark.parametrize(("bits", "white_is_zero"), [(8, False), (8, True), (16, False), (16, True)])
@pytest.mark.parametrize("white", [False, True])
def test_white_is_white_whatever_a_tiff_file_calls_it(tmp_path, bits, white_is_zero, white):
    number = (2**bits - 1) * (white != white_is_zero)
    (tmp_path / "a.tif").write_bytes(tiff(bits, white_is_zero, number.to_bytes(bits // 8, "little") * 64))
    assert decode_image(tmp_path / "a.tif", 1, 8).tolist() == [[[255 * white] * 8] * 8]


def test_a_tiff_file_with_signs_is_refused_rather_than_wrapped(tmp_path):
    content = tiff(8, False, bytes([136]) * 64)
    signed = content.replace(struct.pack("<HHII", 277, 3, 1, 1), struct.pack("<HHII", 339, 3, 1, 2))
    (tmp_path / "a.tif").write_bytes(signed)
    with pytest.raises(UserError, match="a.tif: has pixels of mode L with signs; expected 8 or 16 bits"):
        decode_image(tmp_path / "a.tif", 1, 8)


def test_links_that_lead_elsewhere_are_seen(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"same")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / "images").mkdir()
    seen = set()
    for name in "ab":
        (tmp_path / "images" / "x.png").unlink(missing_ok=True)
        (tmp_path / "images" / "x.png").symlink_to(tmp_path / name)
        seen.add(state_of(tmp_path / "images"))
    assert len(seen) == 2


def test_a_tiff_file_of_12_bits_is_refused_rather_than_dark(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(12, False, bytes([255]) * 96))
    with pytest.raises(UserError, match="a.tif: has pixels of mode I;16 and 12 bits; expected 8 or 16 bits"):
        decode_image(tmp_path / "a.tif", 1, 8)


def test_a_png_file_without_its_palette_is_refused_rather_than_black(tmp_path):
    Image.new("P", (8, 8), 3).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"PLTE") - 4
    length = struct.unpack(">I", content[start : start + 4])[0] + 12
    (tmp_path / "a.png").write_bytes(content[:start] + content[start + length :])
    with pytest.raises(UserError, match="a.png: its palette is missing. Replace or remove it"):
        decode_image(tmp_path / "a.png", 3, 8)


EXIF_6 = bytes.fromhex("4d4d002a00000008000101120003000000010006000000000000")  # orientation 6, as TIFF has it


@pytest.mark.parametrize(
    "told",
    [
        {"XML:com.adobe.xmp": "<x:xmpmeta tiff:Orientation='6'/>"},
        {"XML:com.adobe.xmp": '<x:xmpmeta tiff:Orientation = "6"/>'},
        {"XML:com.adobe.xmp": "<tiff:Orientation>\n 6</tiff:Orientation>"},
        {"Raw profile type APP1": f"\nexif\n      32\n{(b'Exif' + bytes(2) + EXIF_6).hex()}"},
    ],
)
def test_an_orientation_written_in_other_ways(tmp_path, told):
    about = PngImagePlugin.PngInfo()
    for key, text in told.items():
        about.add_itxt(key, text)
    photo().transpose(AS_STORED[6]).save(tmp_path / "turned.png", pnginfo=about)
    photo().save(tmp_path / "upright.png")
    found, expected = (decode_image(tmp_path / f"{name}.png", 3, 16, resize=True) for name in ("turned", "upright"))
    assert np.array_equal(found, expected)


def test_an_orientation_in_xmp_counts_too(tmp_path):
    about = PngImagePlugin.PngInfo()
    about.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>')
    photo(16, 16).transpose(Image.Transpose.ROTATE_180).save(tmp_path / "a.png", pnginfo=about)
    assert np.array_equal(decode_image(tmp_path / "a.png", 3, 16), np.asarray(photo(16, 16)).transpose(2, 0, 1))


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"no exif", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_damaged_exif_data_say_nothing(tmp_path, exif):
    photo(16, 16).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(decode_image(tmp_path / "a.png", 3, 16), np.asarray(photo(16, 16)).transpose(2, 0, 1))


def test_a_custom_task_and_its_ood_folders_are_upright(tmp_path):
    upright = np.asarray(photo(32, 32)).transpose(2, 0, 1)
    for place in ("birds/train/a", "birds/train/b", "birds/test/a", "birds/test/b", "moths"):
        (tmp_path / place).mkdir(parents=True)
        store(photo(32, 32), tmp_path / place / "x.png", 6)
    task = custom_task(tmp_path / "birds", [tmp_path / "moths"])
    train, test = load_ind(Experiment.of("birds", task), tmp_path)
    for images in (train.images, test.images, load_ood(Experiment.of("birds", task), "moths", tmp_path)):
        assert all(np.array_equal(image, upright) for image in images.numpy())


# --- what cannot be read ------------------------------------------------------------------------


@pytest.fixture
def closed(monkeypatch):
    """A function that closes a folder, as chmod 000 does for whoever is not root."""
    scandir, shut = os.scandir, set()

    def refuse(path):
        if Path(path) in shut:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return shut.add


def test_a_closed_folder_is_named(tmp_path, closed):
    write_folder(tmp_path, "d", 2)
    write_folder(tmp_path, "d/sub", 2)
    closed(tmp_path / "d" / "sub")
    found = search(tmp_path / "d")
    complaint = f"{tmp_path}/d/sub: cannot be read (Permission denied). Make it readable or remove it"
    assert found.names == ["image_00000.png", "image_00001.png"]
    assert found.complaints == {tmp_path / "d" / "sub": complaint}
    with pytest.raises(UserError) as refusal:
        read_images(tmp_path / "d", 3, 32)
    assert str(refusal.value) == complaint


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no such rights")
def test_a_folder_that_can_be_listed_but_not_entered_is_named_as_one():
    nobody = 65534 if os.geteuid() == 0 else os.geteuid()  # for root no folder is closed
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in ("d/a", "d/b"):
            write_folder(root, folder, 2)
        for path in (root, root / "d", root / "d/b"):
            path.chmod(0o755)
        (root / "d/a").chmod(0o644)
        os.seteuid(nobody)
        try:
            found = search(root / "d")
        finally:
            if nobody == 65534:
                os.seteuid(0)
            (root / "d/a").chmod(0o755)
    complaint = f"{root}/d/a: cannot be read (Permission denied). Make it readable or remove it"
    assert found == (["b/image_00000.png", "b/image_00001.png"], {root / "d/a": complaint})


def test_closed_classes_and_ood_folders_are_refused(tmp_path, closed):
    for place in ("train/a", "train/b", "test/a", "test/b"):
        write_folder(tmp_path / "birds", place, 2)
    write_folder(tmp_path, "moths/deep", 2)
    write_folder(tmp_path, "moths", 2)
    task = custom_task(tmp_path / "birds", [tmp_path / "moths"])
    closed(tmp_path / "birds" / "train" / "b")
    closed(tmp_path / "moths" / "deep")
    with pytest.raises(UserError, match=r"train/b: cannot be read \(Permission denied\)\. Make it readable"):
        load_ind(Experiment.of("birds", task), tmp_path)
    with pytest.raises(UserError, match=r"moths/deep: cannot be read \(Permission denied\)\. Make it readable"):
        load_ood(Experiment.of("birds", task), "moths", tmp_path)


def test_a_closed_data_set_is_not_taken_for_a_missing_one(tmp_path, closed):
    write_folder(tmp_path, "LSUN_fix/a", 2)
    closed(tmp_path / "LSUN_fix" / "a")
    with pytest.raises(UserError, match=r"LSUN_fix/a: cannot be read \(Permission denied\)"):
        obtain.is_present("LSUN-FIX", tmp_path, "test")
    assert not obtain.is_present("ImageNet-FIX", tmp_path, "test")


def test_what_is_no_plain_file_is_named_and_not_waited_for(tmp_path):
    write_folder(tmp_path, "d", 1)
    os.mkfifo(tmp_path / "d" / "pipe.png")
    os.mkfifo(tmp_path / "d" / "pipe")  # no image by its name
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "d" / "s.jpg"))
    (tmp_path / "d" / "null.bmp").symlink_to(os.devnull)
    found = search(tmp_path / "d")
    kinds = {"null.bmp": "device", "pipe.png": "pipe", "s.jpg": "socket"}
    assert found.names == ["image_00000.png"]
    assert list(found.complaints.values()) == [
        f"{tmp_path}/d/{name}: is not a plain file but a {kind}. Remove it" for name, kind in kinds.items()
    ]
    with pytest.raises(UserError, match=r"null\.bmp: is not a plain file but a device.*pipe\.png.*s\.jpg: [^;]*$"):
        read_images(tmp_path / "d", 3, 32)
    (chunk,) = read_chunks([tmp_path / "d" / "pipe.png"], 3, 32, 1, ahead=0)
    assert chunk.complaints == [f"{tmp_path}/d/pipe.png: is not a plain file. Remove it"]


def test_a_link_that_leads_nowhere_may_have_been_a_class(tmp_path):
    for place in ("train/a", "train/b", "test/a", "test/b"):
        write_folder(tmp_path / "birds", place, 1)
    for split in ("train", "test"):
        (tmp_path / "birds" / split / "owl").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match=r"train/owl: cannot be read \(No such file or directory\)\. Make it readable"):
        custom_task(tmp_path / "birds")
    (tmp_path / "birds" / "train" / "a" / "more").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match=r"a/more: cannot be read \(No such file or directory\)[^;]*; [^;]*train/owl: "):
        list_images(tmp_path / "birds" / "train")


def test_damaged_images_are_all_named_up_to_ten(tmp_path):
    paths = write_folder(tmp_path, "d", 14)
    for path in paths[:12]:
        path.write_bytes(b"no image")
    with pytest.raises(UserError) as refusal:
        read_images(tmp_path / "d", 3, 32)
    complaints = [f"{path}: cannot be decoded (not an image to Pillow). Replace or remove it" for path in paths[:10]]
    assert str(refusal.value) == "; ".join([*complaints, "and 2 more"])


# --- links --------------------------------------------------------------------------------------


def test_a_loop_of_links_multiplies_nothing(tmp_path):
    paths = write_folder(tmp_path, "store/moths", 5)
    (tmp_path / "moths").symlink_to(tmp_path / "store" / "moths")
    (tmp_path / "store" / "moths" / "moths").symlink_to(tmp_path / "store" / "moths")
    expected = [path.name for path in paths]
    assert search(tmp_path / "moths") == search(tmp_path / "store" / "moths") == (expected, {})


def test_links_upwards_bring_no_foreign_images_into_a_class(tmp_path):
    for split in ("train", "test"):
        for name in ("crow", "duck"):
            write_folder(tmp_path / "birds" / split, name, 3)
    task = custom_task(tmp_path / "birds")
    links = {"up": "..", "above": "../..", "beside": "../duck", "down": "deep"}
    crow = tmp_path / "birds" / "train" / "crow"
    write_folder(crow, "deep", 2)
    for name, target in links.items():
        (crow / name).symlink_to(target)
    train, _ = load_ind(Experiment.of("birds", task), tmp_path)
    assert train.labels.tolist() == [0] * 5 + [1] * 3


def test_linked_classes_and_images_stay_allowed(tmp_path):
    stored = write_folder(tmp_path, "store/crows", 3)
    for split in ("train", "test"):
        write_folder(tmp_path / "birds" / split, "duck", 2)
        (tmp_path / "birds" / split / "crow").symlink_to(tmp_path / "store" / "crows")
        (tmp_path / "birds" / split / "duck" / "linked.png").symlink_to(stored[0])
    train, test = load_ind(Experiment.of("birds", custom_task(tmp_path / "birds")), tmp_path)
    assert train.labels.tolist() == test.labels.tolist() == [0] * 3 + [1] * 3


def test_two_classes_that_are_one_folder_are_refused(tmp_path):
    write_folder(tmp_path, "store/crows", 3)
    for split in ("train", "test"):
        (tmp_path / "birds" / split).mkdir(parents=True)
        for name in ("crow", "raven"):
            (tmp_path / "birds" / split / name).symlink_to(tmp_path / "store" / "crows")
    with pytest.raises(UserError, match=r"train/crow and .*train/raven are the same folder: a class needs one of its"):
        custom_task(tmp_path / "birds")


# --- the packed file ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_another_image_under_the_old_size_and_time_is_seen(tmp_path, suffix):
    path = tmp_path / "st" / f"x.{suffix}"
    path.parent.mkdir()
    first = np.full((32, 32), 3, np.uint8)
    for pixels in (first, 255 - first):
        Image.fromarray(pixels).save(path)
        os.utime(path, (0, 0))
        assert np.array_equal(read_images(path.parent, 1, 32)[0][0, 0], pixels)


def test_a_packed_file_that_is_damaged_anywhere_is_made_anew(tmp_path):
    write_folder(tmp_path, "a", 2, size=8)
    expected, _ = read_images(tmp_path / "a", 3, 8)
    packed = tmp_path / ".a.3x8x8.npz"
    whole, draw = packed.read_bytes(), random.Random(0)
    for place in [*range(0, 140), *range(len(whole) - 160, len(whole)), *draw.sample(range(len(whole)), 60)]:
        broken = bytearray(whole)
        broken[place] ^= draw.randrange(1, 256)
        packed.write_bytes(broken)
        assert np.array_equal(read_images(tmp_path / "a", 3, 8)[0], expected), place
    for content in (b"", whole[:-30], b"\x93NUMPY" + whole, whole[50:], bytes(len(whole))):
        packed.write_bytes(content)
        assert np.array_equal(read_images(tmp_path / "a", 3, 8)[0], expected)
        assert packed.read_bytes() == whole


def test_a_pipe_in_the_place_of_the_packed_file_is_not_waited_for(tmp_path):
    write_folder(tmp_path, "a", 2, size=8)
    os.mkfifo(tmp_path / ".a.3x8x8.npz")
    assert read_images(tmp_path / "a", 3, 8)[0].shape == (2, 3, 8, 8)


# --- thin and huge images -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 2_000_000), (2_000_000, 1)])
def test_a_thin_image_takes_no_more_than_its_pixels(tmp_path, size, monkeypatch):
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *rest: made.append(size) or resize(image, size, *rest)
    )
    Image.new("L", size, 7).save(tmp_path / "thin.png")
    assert decode_image(tmp_path / "thin.png", 3, 32, resize=True).tolist() == [[[7] * 32] * 32] * 3
    assert made == [(32, 32)]


@pytest.mark.parametrize("size", [(40, 50), (50, 40), (33, 32), (31, 97), (7, 5), (64, 500), (101, 100)])
@pytest.mark.parametrize("side", [8, 32])
def test_cutting_first_gives_what_cutting_last_gave(size, side):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    scale = side / min(size)
    width, height = (max(side, round(length * scale)) for length in size)
    left, top = (width - side) // 2, (height - side) // 2
    whole = image.resize((width, height), Image.Resampling.BILINEAR)
    expected = np.asarray(whole.crop((left, top, left + side, top + side))).astype(int)
    assert np.abs(np.asarray(square(image, side)) - expected).max() <= 1


def test_what_is_too_large_is_a_complaint_and_the_others_are_decoded(tmp_path, monkeypatch):
    paths = write_folder(tmp_path, "a", 4)
    Image.new("L", (100, 300)).save(paths[1])
    monkeypatch.setattr(decoding, "MOST_PIXELS", 20_000)
    (chunk,) = read_chunks(paths[1:], 3, 32, 4, ahead=0)
    assert [complaint is None for complaint in chunk.complaints] == [False, True, True]

    def fail(image):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    (chunk,) = read_chunks(paths[:2], 3, 32, 4, ahead=0)
    assert chunk.complaints == [
        f"{paths[0]}: cannot be decoded (not enough memory for it). Replace or remove it",
        f"{paths[1]}: is 100x300 pixels; expected 1 to 20,000 in all. Replace or remove it",
    ]


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("division"), KeyError("x"), NotImplementedError(), AttributeError("a")]
)
def test_whatever_a_decoder_stumbles_over_is_a_complaint(tmp_path, monkeypatch, error):
    (path,) = write_folder(tmp_path, "a", 1)

    def stumble(image):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", stumble)
    (chunk,) = read_chunks([path], 3, 32, 1, ahead=0)
    reason = str(error) or "NotImplementedError"
    assert chunk.complaints == [f"{path}: cannot be decoded ({reason}). Replace or remove it"]


def test_a_folder_with_a_name_of_full_length_is_read_without_a_packed_file(tmp_path):
    write_folder(tmp_path, "x" * 250, 2, size=8)
    assert read_images(tmp_path / ("x" * 250), 3, 8)[0].shape == (2, 3, 8, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 250]
