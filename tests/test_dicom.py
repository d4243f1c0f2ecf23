"""DICOM: what a viewer would show, worked out here by hand from the stored values."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmoco.data.decode import decode
from fastmoco.data.undecodable import DecoderMissing, Undecodable

pydicom = pytest.importorskip("pydicom", reason="the dicom extra is not installed")
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import (  # noqa: E402
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)

RNG = np.random.default_rng(0)


def dicom(pixels: np.ndarray, *, syntax: str = ExplicitVRLittleEndian, compress: str = "", **values: Any) -> bytes:
    """A secondary capture of `pixels` (H, W), (H, W, 3), or (frames, H, W) with NumberOfFrames."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    frames = "NumberOfFrames" in values
    dataset.Rows, dataset.Columns = pixels.shape[1:3] if frames else pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 and not frames else 1
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "RGB" if dataset.SamplesPerPixel == 3 else "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in values.items():
        setattr(dataset, name, value)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    if compress:
        dataset.compress(compress, generate_instance_uid=False)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def gray(found: np.ndarray) -> np.ndarray:
    """One channel of what must be three equal ones, as parts of the full range."""
    assert found.shape[2] == 3 and (found == found[:, :, :1]).all()
    return found[:, :, 0] / np.iinfo(found.dtype).max


HALF_STEP = 0.51 / 65535
STORED = RNG.integers(200, 3000, (7, 10), dtype=np.uint16)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_without_a_window_the_image_fills_the_range(syntax: str) -> None:
    found = decode(dicom(STORED, syntax=syntax, BitsStored=12), "x")
    assert found.dtype == np.uint16
    expected = (STORED - 200.0 - (STORED.min() - 200.0)) / (int(STORED.max()) - int(STORED.min()))
    assert np.abs(gray(found) - expected).max() <= HALF_STEP


@pytest.mark.parametrize("compress", [RLELossless, JPEG2000Lossless])
def test_compressed_files_are_the_same(compress: str) -> None:
    pytest.importorskip("openjpeg", reason="the dicom extra is not installed")
    stored = np.tile(STORED, (10, 7))
    data = dicom(stored, compress=compress)
    assert pydicom.dcmread(io.BytesIO(data)).file_meta.TransferSyntaxUID == compress
    assert np.array_equal(decode(data, "x"), decode(dicom(stored), "x"))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
def test_a_window_is_the_range(function: str | None) -> None:
    stored = np.arange(-60, 60, dtype=np.int16).reshape(10, 12)
    values = {"RescaleSlope": 2, "RescaleIntercept": -10, "WindowCenter": [5, 999], "WindowWidth": [101, 1]}
    if function:
        values["VOILUTFunction"] = function
    x = stored * 2.0 - 10
    expected = {
        "LINEAR": ((x - 4.5) / 100 + 0.5).clip(0, 1),
        "LINEAR_EXACT": ((x - 5.0) / 101 + 0.5).clip(0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (x - 5.0) / 101)),
    }[function or "LINEAR"]
    found = gray(decode(dicom(stored, **values), "x"))
    assert np.abs(found - expected).max() <= HALF_STEP
    assert expected.min() < 0.05 and expected.max() > 0.95


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("width", [0, -3])
def test_a_window_without_width_is_refused(function: str, width: int) -> None:
    stored = np.array([[9, 10, 11]], dtype=np.uint16)
    with pytest.raises(Undecodable, match=f"DICOM whose window is {width} wide"):
        decode(dicom(stored, WindowCenter=10, WindowWidth=width, VOILUTFunction=function), "x")


def test_a_window_of_one_is_a_threshold() -> None:
    stored = np.array([[9, 10, 11]], dtype=np.uint16)
    assert gray(decode(dicom(stored, WindowCenter=11, WindowWidth=1), "x"))[0].tolist() == [0, 0, 1]


def test_monochrome1_is_inverted_and_padding_is_black() -> None:
    stored = np.array([[65000, 100, 300, 200]], dtype=np.uint16)
    found = gray(decode(dicom(stored, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=65000), "x"))
    assert found[0, [0, 1, 2]].tolist() == [0, 1, 0]
    assert abs(found[0, 3] - 0.5) <= HALF_STEP
    whole = gray(decode(dicom(stored, PixelPaddingValue=100, PixelPaddingRangeLimit=250), "x"))
    assert whole[0].tolist() == [1, 0, 0, 0], "100 to 250 are padding"
    assert not decode(dicom(stored, PixelPaddingValue=0, PixelPaddingRangeLimit=65535), "x").any()


def test_eight_bits_stay_as_they_are() -> None:
    stored = RNG.integers(40, 90, (7, 10), dtype=np.uint8)
    found = decode(dicom(stored), "x")
    assert found.dtype == np.uint8 and np.array_equal(found, np.repeat(stored[:, :, None], 3, axis=2))
    inverted = decode(dicom(stored, PhotometricInterpretation="MONOCHROME1"), "x")
    assert np.array_equal(inverted, 255 - found)
    rescaled = decode(dicom(stored, RescaleSlope=2, RescaleIntercept=1), "x")
    assert rescaled.dtype == np.uint16 and rescaled.min() == 0 and rescaled.max() == 65535


def test_a_constant_image_is_black() -> None:
    assert not decode(dicom(np.full((3, 4), 1000, dtype=np.uint16)), "x").any()


@pytest.mark.parametrize("bits", [8, 12])
def test_lookup_tables(bits: int) -> None:
    """A modality table and then a VOI table: beyond their ends, their first and last entries."""
    modality, voi = Dataset(), Dataset()
    modality.LUTDescriptor, modality.ModalityLUTType = [3, 10, 16], "US"
    modality.LUTData = np.array([50, 70, 60], dtype="<u2").tobytes()
    most = (1 << bits) - 1
    entries = [0, most // 4, most // 2, *[most] * 297]
    voi.LUTDescriptor, voi.LUTData = [300, 59, bits], np.array(entries, dtype="u1" if bits == 8 else "<u2").tobytes()
    stored = np.array([[0, 10, 11, 12, 40]], dtype=np.uint16)
    data = dicom(stored, ModalityLUTSequence=Sequence([modality]), VOILUTSequence=Sequence([voi]), WindowCenter=1)
    expected = np.array([0, 0, most, most // 4, most // 4]) / most
    assert np.abs(gray(decode(data, "x"))[0] - expected).max() <= HALF_STEP


def test_of_several_frames_the_first_with_its_own_window() -> None:
    stored = RNG.integers(0, 1000, (3, 7, 10), dtype=np.uint16)
    assert np.array_equal(decode(dicom(stored, NumberOfFrames=3), "x"), decode(dicom(stored[0]), "x"))
    groups = []
    for centre in (300, 900, 900):
        group, voi, item = Dataset(), Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = centre, 200
        item.RescaleSlope, item.RescaleIntercept, item.RescaleType = 2, 0, "US"
        group.FrameVOILUTSequence = Sequence([voi])
        group.PixelValueTransformationSequence = Sequence([item])
        groups.append(group)
    found = decode(dicom(stored, NumberOfFrames=3, PerFrameFunctionalGroupsSequence=Sequence(groups)), "x")
    expected = ((stored[0] * 2.0 - 299.5) / 199 + 0.5).clip(0, 1)
    assert np.abs(gray(found) - expected).max() <= HALF_STEP


def test_colours() -> None:
    stored = RNG.integers(0, 256, (7, 10, 3), dtype=np.uint8)
    assert np.array_equal(decode(dicom(stored), "x"), stored)
    wide = RNG.integers(0, 4096, (7, 10, 3), dtype=np.uint16)
    found = decode(dicom(wide, BitsStored=12), "x")
    assert found.dtype == np.uint16 and np.abs(found / 65535 - wide / 4095).max() <= HALF_STEP
    ycbcr = np.broadcast_to(np.array([76, 85, 255], dtype=np.uint8), (7, 10, 3))
    red = decode(dicom(np.ascontiguousarray(ycbcr), PhotometricInterpretation="YBR_FULL"), "x")
    assert np.abs(red.astype(int) - [254, 0, 0]).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes(bits: int) -> None:
    entries = RNG.integers(0, 1 << bits, (3, 256)).astype(f"<u{bits // 8}")
    values: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, row in zip(("Red", "Green", "Blue"), entries, strict=True):
        values[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        values[f"{name}PaletteColorLookupTableData"] = row.tobytes()
    stored = RNG.integers(0, 256, (7, 10), dtype=np.uint8)
    found = decode(dicom(stored, **values), "x")
    assert found.dtype == entries.dtype and np.array_equal(found, np.moveaxis(entries[:, stored], 0, 2))


def test_files_without_the_mark_are_known_by_their_suffix() -> None:
    bare = dicom(STORED, syntax=ImplicitVRLittleEndian)
    start = bare.index(b"\x08\x00\x16\x00")
    assert np.array_equal(decode(bare[start:], "x.DCM"), decode(bare, "x"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (dicom(STORED)[:-20], "less than expected"),
        (b"hello", "without pixels|DICOM:"),
        (b"", "without pixels|DICOM:"),
        (dicom(STORED, Rows=60000, Columns=60000), "too large to be read: 60000 x 60000"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Undecodable, match=reason) as caught:
        decode(data, "x.dcm")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_frame_of_another_size_is_refused_before_it_is_decoded() -> None:
    """A rotten bit in a codestream's header may ask for gigabytes."""
    pytest.importorskip("openjpeg", reason="the dicom extra is not installed")
    data = bytearray(dicom(np.tile(STORED, (10, 7)), compress=JPEG2000Lossless))
    at = data.index(b"\xff\x4f\xff\x51") + 8
    data[at] = 0xB7
    with pytest.raises(Undecodable, match="DICOM of 70 x 70 pixels whose frame has 70 x 3070230598"):
        decode(bytes(data), "x")


def test_a_jpeg_frame_of_another_size_or_cut_short_is_refused() -> None:
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (16, 24), dtype=np.uint8)).save(stream, "JPEG")
    dataset = pydicom.dcmread(io.BytesIO(dicom(np.zeros((16, 24), dtype=np.uint8))))
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit

    def saved(frame: bytes) -> bytes:
        dataset.PixelData = encapsulate([frame])
        dataset["PixelData"].is_undefined_length = True
        stream = io.BytesIO()
        dataset.save_as(stream)
        return stream.getvalue()

    assert decode(saved(stream.getvalue()), "x").shape == (16, 24, 3)
    for syntax, reason in ((JPEGBaseline8Bit, "truncated"), (JPEGLosslessSV1, "cut short|pip install")):
        dataset.file_meta.TransferSyntaxUID = syntax
        with pytest.raises(Undecodable, match=reason):
            decode(saved(stream.getvalue()[:-150]), "x")
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    at = stream.getvalue().index(b"\xff\xc0") + 5
    wrong = stream.getvalue()[:at] + b"\xfe\xfe" + stream.getvalue()[at + 2 :]
    with pytest.raises(Undecodable, match="16 x 24 pixels whose frame has 65278 x 24"):
        decode(saved(wrong), "x")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    compressed = dicom(STORED, compress=RLELossless)
    decoder = pydicom.pixels.get_decoder(RLELossless)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_available", {"gdcm": None})
        with pytest.raises(DecoderMissing, match=r"RLE Lossless.*fastmoco\[dicom\]"):
            decode(compressed, "x")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.delitem(sys.modules, "fastmoco.data.dicom")
    with pytest.raises(DecoderMissing, match=r"pip install 'fastmoco\[dicom\]'"):
        decode(compressed, "x")
