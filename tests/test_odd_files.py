"""Files with every odd encoding: each is decoded right, whoever decodes it, or reported."""

from __future__ import annotations

import csv
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmoco.data.dali import dali_installed
from fastmoco.data.manifest import Manifest, load_manifest

# 8-bit files that the host decodes and DALI does not.
ODD_HOST_ONLY = {"pillow/hopper.gif", "pillow/photoshop-200dpi-broken.jpg"}


def raw_gray16(path: Path) -> np.ndarray:
    """The stored values of a 16-bit PNG without interlace or TIFF without compression, read by nothing of ours."""
    data = path.read_bytes()
    if data.startswith(b"\x89PNG"):
        width, height = struct.unpack(">II", data[16:24])
        at, packed = 8, b""
        while at < len(data):
            (length,) = struct.unpack(">I", data[at : at + 4])
            packed += data[at + 8 : at + 8 + length] if data[at + 4 : at + 8] == b"IDAT" else b""
            at += 12 + length
        lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 2 * width)
        return unfiltered(lines, 2).view(">u2").astype(np.uint16)
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack(order + "I", data[4:8])
    (count,) = struct.unpack(order + "H", data[at : at + 2])
    tags: dict[int, list[int]] = {}
    for i in range(count):
        tag, kind, number = struct.unpack(order + "HHI", data[at + 2 + 12 * i : at + 10 + 12 * i])
        if kind in (3, 4):
            size = 2 * kind - 4
            where = at + 10 + 12 * i
            if size * number > 4:
                (where,) = struct.unpack(order + "I", data[where : where + 4])
            values = struct.unpack(order + "?HI"[kind - 2] * number, data[where : where + size * number])
            tags[tag] = list(values)
    assert tags.get(259, [1]) == [1] and tags[258] == [16]
    strips = b"".join(data[o : o + n] for o, n in zip(tags[273], tags[279], strict=True))
    return np.frombuffer(strips, order + "u2").reshape(tags[257][0], tags[256][0]).astype(np.uint16)


def unfiltered(lines: np.ndarray, step: int) -> np.ndarray:
    """PNG's five filters undone; `lines` are (H, 1 + bytes), `step` the bytes of a pixel."""
    rows = np.zeros((len(lines) + 1, lines.shape[1] - 1 + step), dtype=np.int64)
    for y, line in enumerate(lines, start=1):
        for x, value in enumerate(line[1:].tolist(), start=step):
            left, up, corner = int(rows[y, x - step]), int(rows[y - 1, x]), int(rows[y - 1, x - step])
            guess = left + up - corner
            paeth = min((left, up, corner), key=lambda other: abs(guess - other))
            rows[y, x] = (value + (0, left, up, (left + up) // 2, paeth)[line[0]]) % 256
    return np.ascontiguousarray(rows[1:, step:].astype(np.uint8))


def expected_of(path: Path) -> np.ndarray:
    """What Pillow's own careful decode of an 8-bit file is."""
    from PIL import ImageOps

    with Image.open(path) as image:
        image.load()
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def test_every_odd_file_is_decoded_right_or_reported(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = real_data("odd_encodings")
    with (folder / "index.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 94
    # By name, not by suffix, so that every one of them is looked at.
    table = tmp_path / "all.csv"
    table.write_text("file\n" + "".join(f"{row['file']}\n" for row in rows))
    found = load_manifest(folder, table, decoder="dali" if dali_installed() else "pillow", progress=False)
    reasons = {item.file: item.reason for item in found.skipped}
    places = {name: i for i, name in enumerate(found.files)}
    assert set(reasons) | set(places) == {row["file"] for row in rows} and not set(reasons) & set(places)
    deep = 0
    for row in rows:
        name = row["file"]
        if row["format"] == "DICOM":
            continue
        if row["pillow_13.0.0"] != "ok":
            assert 4 < len(reasons[name]) < 200, name
            continue
        image = found.decode(places[name])
        if row["mode"].startswith("I;16"):
            deep += 1
            assert image.dtype == np.uint16 and not found.dali[places[name]], name
            values = raw_gray16(folder / name) if deep_is_plain(name) else None
            if values is not None:
                assert np.array_equal(image, np.repeat(values[:, :, None], 3, axis=2)), name
        else:
            assert np.array_equal(image, expected_of(folder / name)), name
    assert deep == 7
    if dali_installed():
        check_dali(folder, found)


def deep_is_plain(name: str) -> bool:
    """Whether `raw_gray16` reads the file: these two are compressed as TIFF."""
    return name not in ("pillow/16_bit_noise.tif", "pillow/12in16bit.tif")


def check_dali(folder: Path, found: Manifest) -> None:
    """Where the manifest says so, a DALI pipeline of the test's own gives the same pixels; and it says so often."""
    from nvidia.dali import fn, pipeline_def, types

    trusted = [i for i in range(len(found)) if found.dali[i]]
    assert len(trusted) >= 50
    data = [np.fromfile(folder / found.files[i], dtype=np.uint8) for i in trusted]

    @pipeline_def(batch_size=len(data), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> Any:
        return fn.decoders.image(fn.external_source(source=[data], batch=True, cycle=False), output_type=types.RGB)

    (images,) = graph().run()
    for place, i in enumerate(trusted):
        image, other = found.decode(i).astype(int), np.asarray(images[place])
        assert image.shape == other.shape, found.files[i]
        lossy = found.files[i] == "pillow/pil_sample_cmyk.jpg"
        assert np.abs(image - other).max() <= (1 if lossy else 0), found.files[i]
    assert not any(found.dali[found.files.index(name)] for name in ODD_HOST_ONLY)


def test_odd_dicom_files(real_data: Callable[[str], Path]) -> None:
    """Against values read by pydicom and worked out here, and against what is known of the pictures."""
    pydicom = pytest.importorskip("pydicom", reason="the dicom extra is not installed")
    pytest.importorskip("openjpeg", reason="the dicom extra is not installed")
    folder = real_data("odd_encodings") / "dicom"
    found = load_manifest(folder, progress=False)
    assert [item.file for item in found.skipped] == [
        "JPEG-lossy.dcm", "MR_truncated.dcm", "badVR.dcm", "no_meta_group_length.dcm",
    ]  # fmt: skip
    images = {name: found.decode(i) for i, name in enumerate(found.files)}
    stored = {name: pydicom.dcmread(folder / name).pixel_array for name in images}

    def near(name: str, expected: np.ndarray) -> None:
        image = images[name]
        assert image.dtype == np.uint16 and (image == image[:, :, :1]).all(), name
        assert np.abs(image[:, :, 0] / 65535 - expected.clip(0, 1)).max() <= 0.51 / 65535, name

    def window(values: np.ndarray, centre: float, width: float) -> np.ndarray:
        return (values - (centre - 0.5)) / (width - 1) + 0.5

    head = stored["693_J2KI.dcm"]
    near("693_J2KI.dcm", np.where(head == -2000, 0, window(head - 1024.0, 40, 100)))
    for name in ("MR_small.dcm", "MR_small_RLE.dcm"):
        near(name, window(stored[name], 600, 1600))
    near("CT_small.dcm", (stored["CT_small.dcm"] - 128) / (2191 - 128))
    near("JPEG2000.dcm", (stored["JPEG2000.dcm"] + 30) / 275)
    assert np.array_equal(images["image_dfl.dcm"], np.repeat(stored["image_dfl.dcm"][:, :, None], 3, axis=2))
    inverted = 255 - stored["Fake_MONOHR1.dcm"]
    # Stored with loss, which decoders round differently.
    assert np.abs(images["Fake_MONOHR1.dcm"].astype(int) - inverted[:, :, None]).max() <= 1
    bars = [(255, 0, 0), (255, 128, 128), (0, 255, 0), (128, 255, 128), (0, 0, 255), (128, 128, 255), (0, 0, 0),
            (64, 64, 64), (192, 192, 192), (255, 255, 255)]  # fmt: skip
    # The first is stored with loss.
    for name, scale, error in (("SC_rgb_jpeg_dcmtk.dcm", 1, 6), ("SC_rgb_rle_16bit.dcm", 257, 0)):
        middle = images[name][5::10, 50] / scale
        assert np.abs(middle - bars).max() <= error, name
    palette = pydicom.dcmread(folder / "examples_palette.dcm")
    entries = [np.frombuffer(palette[f"{c}PaletteColorLookupTableData"].value, "<u2") for c in ("Red", "Green", "Blue")]
    expected = np.stack([table[stored["examples_palette.dcm"]] for table in entries], axis=2)
    assert np.array_equal(images["examples_palette.dcm"], expected)
