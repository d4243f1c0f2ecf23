"""DICOM files to RGB arrays, the way a viewer would first show them. Needs pydicom (the `dicom` extra)."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

import numpy as np
from PIL import Image

from fastmoco.data.undecodable import DecoderMissing, Undecodable

try:
    import pydicom
    from pydicom.encaps import get_frame
    from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
    from pydicom.uid import (
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
        RLELossless,
    )
except ImportError as error:
    raise DecoderMissing(f"reading DICOM needs pydicom 3 ({error}): pip install 'fastmoco[dicom]'") from error

# It warns of every value that breaks the standard, in files by the thousand, and reads them all the same.
warnings.filterwarnings("ignore", module=r"pydicom\.")


# The JPEG markers that begin a frame; the last is JPEG-LS's.
_START_OF_FRAME = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})


def decode_dicom(data: bytes) -> np.ndarray:
    """The first frame of the DICOM file contents `data` as (H, W, 3), uint8 or uint16 (65535 is white).

    Gray values go through the modality's rescale or lookup table and the (first) VOI lookup table or window, whose
    output becomes 0..65535; without one, the least to the greatest value of the image do, padding left out.
    Only gray of at most 8 bits that has neither stays as it is, uint8. MONOCHROME1 is inverted, padding is black.
    Palette colours are looked up, YBR becomes RGB; colours of more than 8 bits are scaled to 16.

    Raises Undecodable, and DecoderMissing where its compression needs a package that is not installed.
    """
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
        pixels = _first_frame(dataset)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            return _palette_colour(pixels, dataset)
        return _scaled_colour(pixels, dataset) if pixels.ndim == 3 else _scaled_gray(pixels, dataset)
    except (Undecodable, MemoryError):
        raise
    except Exception as error:  # damaged files make pydicom and its plugins raise nearly anything
        raise Undecodable(f"DICOM: {' '.join(str(error).split())[:300]}") from error


def _first_frame(dataset: Any) -> np.ndarray:
    """(H, W) or (H, W, 3) as stored, but for YBR, which has become RGB."""
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise Undecodable("DICOM without pixels")
    if dataset.Rows * dataset.Columns > 2 * (Image.MAX_IMAGE_PIXELS or np.inf):
        raise Undecodable(f"too large to be read: {dataset.Rows} x {dataset.Columns} pixels; cut it into tiles")
    meta = dataset.file_meta
    if "TransferSyntaxUID" not in meta:
        meta.TransferSyntaxUID = ImplicitVRLittleEndian if dataset.original_encoding[0] else ExplicitVRLittleEndian
    syntax = meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return pixel_array(dataset, index=0)
    plugin = _plugin(dataset)
    if plugin not in get_decoder(syntax).available_plugins:
        raise DecoderMissing(f"DICOM compressed as {syntax.name}: pip install 'fastmoco[dicom]' for its decoders")
    frame = get_frame(dataset.PixelData, 0, number_of_frames=dataset.get("NumberOfFrames") or 1)
    _refuse_other_size(frame, dataset)
    # Decoded by pylibjpeg, a JPEG that is cut short is gray from there on.
    if plugin == "pylibjpeg" and frame.startswith(b"\xff\xd8") and b"\xff\xd9" not in frame[-64:]:
        raise Undecodable("DICOM whose JPEG frame is cut short")
    return pixel_array(dataset, index=0, decoding_plugin=plugin)


def _plugin(dataset: Any) -> str:
    """Which of pydicom's plugins to ask: the one that answers damage with an exception.

    pydicom itself would ask each in turn, until one believes what is damaged, or, as GDCM may, ends the process.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax == RLELossless:
        return "pydicom"
    if syntax == JPEGBaseline8Bit or (syntax == JPEGExtended12Bit and dataset.BitsStored == 8):
        return "pillow"
    return "pylibjpeg"


def _refuse_other_size(frame: bytes, dataset: Any) -> None:
    """Raise Undecodable where a JPEG or JPEG 2000 `frame` says that it is of another size than the file does.

    Its decoder would believe the frame, and one rotten bit there asks for more memory than there is.
    """
    size = _jpeg2000_size(frame) if frame.startswith(b"\xff\x4f\xff\x51") else _jpeg_size(frame)
    if size is not None and size != (dataset.Rows, dataset.Columns):
        raise Undecodable(f"DICOM of {dataset.Rows} x {dataset.Columns} pixels whose frame has {size[0]} x {size[1]}")


def _jpeg2000_size(frame: bytes) -> tuple[int, int] | None:
    """Height and width of a codestream, from its SIZ segment, which comes first."""
    if len(frame) < 24:
        return None
    right, bottom, left, top = struct.unpack(">4I", frame[8:24])
    return bottom - top, right - left


def _jpeg_size(frame: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG or JPEG-LS frame, from its SOF segment; None where there is none."""
    at = 2
    while frame.startswith(b"\xff\xd8") and at + 9 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if marker == 0xFF:
            # Bytes of filling.
            at += 1
        elif marker in _START_OF_FRAME:
            height, width = struct.unpack(">HH", frame[at + 5 : at + 9])
            return height, width
        else:
            at += 2 + length
    return None


def _scaled_colour(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    """(H, W, 3) uint8 as it is; more bits to uint16, of which the stored bits are the full range."""
    if pixels.dtype == np.uint8:
        return pixels
    most = float((1 << dataset.BitsStored) - 1)
    return np.rint(np.clip(pixels / most, 0.0, 1.0) * 65535.0).astype(np.uint16)


def _palette_colour(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    """(H, W) entries of a palette to (H, W, 3) of its colours, as many bits as they have."""
    colours = apply_color_lut(pixels, dataset)[:, :, :3]
    # Entries of 8 bits may stand in 16.
    narrow = dataset.RedPaletteColorLookupTableDescriptor[2] == 8 and colours.max() < 256
    return colours.astype(np.uint8) if narrow else colours


def _scaled_gray(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """(H, W) stored values to (H, W, 3)."""
    values = _modality(stored, _frame_item(dataset, "PixelValueTransformationSequence"))
    voi = _frame_item(dataset, "FrameVOILUTSequence")
    padding = _padding(stored, dataset)
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    if voi.get("VOILUTSequence"):
        table, first = _table(voi.VOILUTSequence[0])
        shown = _stretched(_looked_up(values, table, first), table)
    elif voi.get("WindowWidth") is not None and voi.get("WindowCenter") is not None:
        shown = _windowed(values, voi)
    elif values.dtype == np.uint8:
        gray = np.where(padding, 0, 255 - values if inverted else values).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    else:
        shown = _stretched(values, values if padding.all() else values[~padding])
    gray = np.rint(np.where(padding, 0.0, 1.0 - shown if inverted else shown) * 65535.0).astype(np.uint16)
    return np.repeat(gray[:, :, None], 3, axis=2)


def _modality(stored: np.ndarray, modality: Any) -> np.ndarray:
    """Stored values to those of the modality (Hounsfield units, say); the same array where it tells no difference."""
    if modality.get("ModalityLUTSequence"):
        table, first = _table(modality.ModalityLUTSequence[0])
        return _looked_up(stored, table, first)
    slope, intercept = modality.get("RescaleSlope"), modality.get("RescaleIntercept")
    if slope is None or intercept is None or (slope == 1 and intercept == 0):
        return stored
    return stored * float(slope) + float(intercept)


def _table(item: Any) -> tuple[np.ndarray, int]:
    """The entries of a lookup table, and the value that the first of them stands for."""
    entries, first, _ = item.LUTDescriptor
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, dtype=np.uint8 if len(data) < 2 * (entries or 65536) else "<u2")
    return np.asarray(data), int(first)


def _looked_up(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    """Each of `values` replaced by its entry; what lies outside of the table by its first or last."""
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]


def _stretched(values: np.ndarray, span: np.ndarray) -> np.ndarray:
    """`values` so scaled that the least of `span` becomes 0 and the greatest 1; all 0 where these are equal."""
    least, greatest = float(span.min()), float(span.max())
    return np.clip((values - least) / ((greatest - least) or 1.0), 0.0, 1.0)


def _frame_item(dataset: Any, sequence: str) -> Any:
    """Where the first frame's values of `sequence` stand: in its functional groups, or in the file's main part."""
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in dataset.get(groups, [])[:1]:
            if sequence in group:
                return group[sequence][0]
    return dataset


def _padding(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """(H, W) bool: the pixels that the file says were never taken."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = dataset.get("PixelPaddingRangeLimit", value)
    return (stored >= min(value, limit)) & (stored <= max(value, limit))


def _windowed(values: np.ndarray, voi: Any) -> np.ndarray:
    """(H, W) in [0, 1] by the first window of `voi`; DICOM part 3, C.11.2.1.2 and C.11.2.1.3."""
    centre, width = _first(voi.WindowCenter), _first(voi.WindowWidth)
    function = voi.get("VOILUTFunction") or "LINEAR"
    if function != "LINEAR" and not width > 0:
        raise Undecodable(f"DICOM whose window is {width:g} wide")
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -700.0, 700.0)))
    if function == "LINEAR":
        # A window of width 1 is a threshold.
        centre, width = centre - 0.5, max(width - 1.0, 1e-6)
    return np.clip((values - centre) / width + 0.5, 0.0, 1.0)


def _first(value: Any) -> float:
    """The first of one or more numbers."""
    return float(value[0] if hasattr(value, "__len__") else value)
