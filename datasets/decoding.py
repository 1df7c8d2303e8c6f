"""Image files as arrays, one by one: opened, turned upright, brought to a mode and a size."""

from __future__ import annotations

import io
import math
import os
import re
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from cli.errors import UserError

PILLOW_MODES = {1: "L", 3: "RGB"}  # what Pillow calls images of that many channels
EIGHT_BIT = {"1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr"}
SIXTEEN_BIT = {"I", "I;16", "I;16B", "I;16L", "I;16N"}  # grey, which Pillow would clip to 8 bits instead of scaling it
# Where Pillow keeps EXIF and XMP data of the formats that have them; TIFF files it turns upright itself.
XMP, APP1 = ("xmp", "XML:com.adobe.xmp"), "Raw profile type APP1"
TOLD_IN = {"exif", *XMP, APP1, "Raw profile type exif"}
IN_XMP = re.compile(r"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])")
KNOWN_MODES = EIGHT_BIT | SIXTEEN_BIT
PHOTOMETRIC = ExifTags.Base.PhotometricInterpretation  # 0: zero is white
MOST_PIXELS = 178_956_970  # of an image: beyond it Pillow takes a file for an attack
MANY_PIXELS = 1 << 24  # decoded one image at a time: threads together would take gigabytes
SMALL = 1 << 15  # bytes: decoding smaller files, threads wait for the interpreter rather than for the decoder

_one_at_a_time = threading.Lock()


def decode_image(path: Path, channels: int, size: int, resize: bool = False) -> np.ndarray:
    """One image, uint8 [channels, size, size]. Raises `UserError` naming the file."""
    with decoded(path, None if resize else size) as image:
        return to_array(image, channels, size)


def to_array(image, channels: int, size: int) -> np.ndarray:
    """A PIL image of any size in grey or colour, uint8 [channels, size, size]."""
    array = np.asarray(square(in_mode(image, channels), size))
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def in_mode(image, channels: int):
    """A PIL image in grey or colour of 8 bits; itself where it is that already."""
    if image.mode in SIXTEEN_BIT:
        image = Image.fromarray(((np.asarray(image, np.int32) + 128) // 257).astype(np.uint8))
    return image if image.mode == PILLOW_MODES[channels] else image.convert(PILLOW_MODES[channels])


@contextmanager
def decoded(path: Path, size: int | None = None) -> Iterator:
    """Within the block there is the image in a file, as a PIL image, upright. Large ones are decoded one at a time.

    Raises:
        UserError: naming the file: whatever fails, also within the block; the image has another `size` or more pixels
            than `MOST_PIXELS`, or its mode cannot be brought to 8 bits.
    """
    remedy = "Replace or remove it"
    try:
        with open_file(path) as image, _one_at_a_time if math.prod(image.size) > MANY_PIXELS else nullcontext():
            wanted = None
            if not 0 < math.prod(image.size) <= MOST_PIXELS:
                wanted = f"1 to {MOST_PIXELS:,} in all"
            if size is not None and image.size != (size, size):
                wanted = f"{size}x{size}"
            if wanted:
                raise UserError(f"{path}: is {image.width}x{image.height} pixels; expected {wanted}. {remedy}")
            if image.format == "TIFF":
                image.filename = ""  # Pillow maps a plain one that is to be turned into memory with the wrong width
            image.load()
            low, high = image.getextrema() if image.mode == "I" else (0, 0)
            mode, inverted = image.mode, False
            if image.format == "TIFF" and mode in SIXTEEN_BIT:  # of which Pillow tells neither depth nor what is white
                tags = image.tag_v2
                depth, inverted = tags.get(ExifTags.Base.BitsPerSample, (16,))[0], tags.get(PHOTOMETRIC) == 0
                mode = f"{mode} and {depth} bits" if mode != "I" and depth != 16 or mode == "I" and inverted else mode
            if image.format == "TIFF" and image.mode != "I" and 2 in image.tag_v2.get(ExifTags.Base.SampleFormat, ()):
                mode = f"{mode} with signs"
            if mode not in KNOWN_MODES or low < 0 or high >> 16:
                raise UserError(
                    f"{path}: has pixels of mode {mode}; expected 8 or 16 bits per channel. Convert or remove it"
                )
            if mode == "P" and not (image.palette and image.palette.palette):
                raise UserError(f"{path}: its palette is missing. {remedy}")
            if inverted:
                image = Image.fromarray(65535 - np.asarray(image, np.int32))
            yield upright(image)
    except UserError:
        raise
    except Exception as error:  # Pillow lets through whatever a damaged file makes its decoders stumble over
        reason = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        if isinstance(error, MemoryError):
            reason = "not enough memory for it"
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image to Pillow"
        raise UserError(f"{path}: cannot be decoded ({reason}). {remedy}") from None


def upright(image):
    """A decoded PIL image turned as its EXIF or XMP data say that it is to be looked at."""
    if not TOLD_IN & image.info.keys():  # most images; asking Pillow takes as long as decoding a small one
        return image
    turns = Image.Transpose
    turn = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    try:
        orientation = orientation_of(image)
    except Exception:  # damaged data beside the pixels, which say nothing then
        return image
    return image.transpose(turn[orientation]) if orientation in turn else image


def orientation_of(image) -> int | None:
    """The number under which EXIF, or else XMP data have it."""
    if APP1 in image.info:  # EXIF data as older programs put them into PNG files: three lines, then hexadecimal
        exif = Image.Exif()
        exif.load(bytes.fromhex("".join(image.info[APP1].split("\n")[3:])))
    else:
        exif = image.getexif()
    if orientation := exif.get(ExifTags.Base.Orientation):
        return orientation
    for key in XMP:
        text = image.info.get(key, "")
        if found := IN_XMP.search(text.decode("utf-8", "replace") if isinstance(text, bytes) else text):
            return int(found[1])
    return None


def open_file(path: Path):
    """What `Image.open` gives. Of a small image that takes longer than to decode it: a small PNG file, whose format is
    plain from its first bytes, is opened directly."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would be waited for
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise UserError(f"{path}: is not a plain file. Remove it")
        content = os.read(file, SMALL)
    finally:
        os.close(file)
    is_png = content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR" and 24 <= len(content) < SMALL
    # A small file may claim to be a huge image, which `Image.open` refuses.
    if is_png and math.prod(struct.unpack(">II", content[16:24])) <= (Image.MAX_IMAGE_PIXELS or math.inf):
        return PngImagePlugin.PngImageFile(io.BytesIO(content))
    return Image.open(path)


def square(image, size: int):
    """A PIL image with its short side brought to `size` and its middle cut out: size x size.

    Pillow's resizing averages over the pixels that fall together, so shrinking makes no aliases. Only what is cut out
    is computed: of a strip of an image, the whole at that size would have no end.
    """
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    box = []
    for side in image.size:
        scaled = max(size, round(side * scale))
        first = (scaled - size) // 2
        box.append((first * side / scaled, (first + size) * side / scaled))
    (left, right), (top, bottom) = box
    return image.resize((size, size), Image.Resampling.BILINEAR, (left, top, right, bottom))
