"""Bytes to pixels on the host: every kind of file, and a clear reason for what is none."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastmoco.data.decode import decode, eight_bits
from fastmoco.data.undecodable import Undecodable

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)
GRAY = PIXELS[:, :, 0]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_lossless_formats_are_exact(kind: str) -> None:
    found = decode(encoded(Image.fromarray(PIXELS), kind, lossless=True), "x")
    assert found.dtype == np.uint8 and found.flags.writeable
    assert np.array_equal(found, PIXELS)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    found = decode(encoded(image, "TIFF"), "x")
    assert np.array_equal(found, np.asarray(image.convert("RGB")))
    assert found.std() > 10


def test_transparent_pixels_keep_their_colour() -> None:
    rgba = np.dstack([PIXELS, np.zeros((9, 12), dtype=np.uint8)])
    assert np.array_equal(decode(encoded(Image.fromarray(rgba), "PNG"), "x"), PIXELS)


def test_gif_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue")]
    found = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "x.gif")
    assert np.array_equal(found, np.broadcast_to(np.array([255, 0, 0], dtype=np.uint8), (5, 6, 3)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_are_kept(kind: str, order: str) -> None:
    values = RNG.integers(0, 65536, (9, 12), dtype=np.uint16)
    values[0, :2] = 0, 65535
    image = Image.frombytes("I;16" if order == "<" else "I;16B", (12, 9), values.astype(f"{order}u2").tobytes())
    found = decode(encoded(image, kind), "x")
    assert found.dtype == np.uint16
    assert np.array_equal(found, np.repeat(values[:, :, None], 3, axis=2))


def test_sixteen_bits_turn_by_exif_too() -> None:
    values = RNG.integers(0, 65536, (9, 12), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = decode(encoded(Image.fromarray(values), "PNG", exif=exif), "x")
    assert np.array_equal(found[:, :, 1], np.rot90(values, -1))


def test_twelve_bits_reach_white() -> None:
    """A TIFF of 12-bit samples, packed two to three bytes: 4095 is white."""
    values = np.array([[0, 4095, 2048, 1]])
    first, second = values[0, ::2], values[0, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()
    entries = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(packed))]
    directory = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in entries)
    data = struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + struct.pack("<H", len(entries)) + directory
    found = decode(data + struct.pack("<I", 0), "x.tif")
    assert found.dtype == np.uint16
    assert found[0, :, 0].tolist() == [round(v * 65535 / 4095) for v in values[0].tolist()]


@pytest.mark.parametrize(("order", "white"), [("<", 0), ("<", 1), (">", 0), (">", 1)])
def test_white_may_be_zero(order: str, white: int) -> None:
    """A TIFF of 16-bit samples whose PhotometricInterpretation says which end is white."""
    values = np.array([[0, 65535, 1000, 40000]])
    stored = values.astype(f"{order}u2").tobytes()
    entries = [(256, 4), (257, 1), (258, 16), (259, 1), (262, white), (273, 8), (277, 1), (278, 1), (279, len(stored))]
    directory = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    mark = b"II" if order == "<" else b"MM"
    data = struct.pack(f"{order}2sHI", mark, 42, 8 + len(stored)) + stored
    data += struct.pack(f"{order}H", len(entries)) + directory + bytes(4)
    if (order, white) == (">", 0):
        with pytest.raises(Undecodable, match="not an image of a kind that is read"):
            decode(data, "x.tif")
        return
    found = decode(data, "x.tif")
    assert found.dtype == np.uint16
    assert found[0, :, 0].tolist() == (values[0] if white else 65535 - values[0]).tolist()


def test_sixteen_bit_colour_is_not_clipped() -> None:
    """Pillow writes no such file, so this one is made by hand; it is read at 8 bits."""
    values = RNG.integers(0, 65536, (9, 12, 3), dtype=np.uint16)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 12, 9, 16, 2, 0, 0, 0))
    found = decode(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""), "x.png")
    assert np.abs(found / 255 - values / 65535).max() <= 1 / 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_turns_the_image_upright(orientation: int, kind: str) -> None:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as again:
        expected = np.asarray(ImageOps.exif_transpose(again))
    found = decode(data, "x")
    assert found.shape == ((9, 12, 3) if orientation < 5 else (12, 9, 3))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(dtype: type) -> None:
    with pytest.raises(Undecodable, match="rescale them"):
        decode(encoded(Image.fromarray(GRAY.astype(dtype)), "TIFF"), "x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (encoded(Image.fromarray(PIXELS), "PNG")[:60], "truncated|Truncated"),
        (encoded(Image.fromarray(PIXELS), "JPEG")[:400], "truncated|Truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Undecodable, match=reason) as caught:
        decode(data, "x.jpg")
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("1", (20000, 20000)), "PNG")
    assert len(data) < 100_000
    with pytest.raises(Undecodable, match="too large to be read: Image size"):
        decode(data, "x.png")


def test_eight_bits() -> None:
    assert eight_bits(PIXELS) is PIXELS
    wide = np.array([0, 257, 65535, 128 * 257 + 100], dtype=np.uint16)
    assert eight_bits(wide).tolist() == [0, 1, 255, 128]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF"])
def test_damage_anywhere_ends_in_pixels_or_a_reason(kind: str) -> None:
    """Bytes changed and files cut short, 150 ways each: never another exception, never another shape of array."""
    rng = np.random.default_rng(5)
    whole = encoded(Image.fromarray(PIXELS).resize((60, 45)), kind)
    refused = 0
    for _ in range(150):
        data = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(max(len(data), 1), size=rng.integers(1, 5)):
            data[place : place + 1] = bytes([rng.integers(256)])
        try:
            found = decode(bytes(data), "x")
        except Undecodable as error:
            refused += 1
            assert str(error)
        else:
            assert found.shape[2] == 3 and found.dtype in (np.uint8, np.uint16)
    assert 10 < refused <= 150
