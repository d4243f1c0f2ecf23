"""One image's bytes to an RGB array on the host: the definition that other decoders are held against."""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
from PIL import Image

from fastmoco.data.undecodable import Undecodable

DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
IMAGE_SUFFIXES = DICOM_SUFFIXES | frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif"})
# Pillow would also hand a file to other programs (Ghostscript, say); nothing here needs that.
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE = 258
_PHOTOMETRIC = 262
_WHITE_IS_ZERO = 0

# Between its limit and twice as much Pillow warns, on standard error, and decodes; beyond, it refuses. It warns of
# damaged metadata too, whose pixels are fine.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")


def decode(data: bytes, name: str) -> np.ndarray:
    """Decode the file contents `data` to (H, W, 3), upright by its EXIF orientation.

    uint8, or uint16 where gray of more than 8 bits is stored: 65535 is white. 16-bit colour, or gray with alpha, is
    read at 8 bits (but for DICOM). Gray is repeated, alpha dropped (transparent pixels keep their colour), and of
    several frames the first is taken. What `data` is, is told by its contents; only DICOM files that lack their mark
    are known by the suffix of `name`.

    Raises Undecodable, and DecoderMissing where a package that is not installed would be needed.
    """
    if data[128:132] == b"DICM" or os.path.splitext(name)[1].lower() in DICOM_SUFFIXES:
        # Few data sets need it, and pydicom takes a while to import.
        from fastmoco.data.dicom import decode_dicom

        return decode_dicom(data)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
            return _pixels(image)
    except (Undecodable, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Undecodable(f"too large to be read: {error}; cut it into tiles") from error
    except Image.UnidentifiedImageError as error:
        raise Undecodable("empty" if not data else "not an image of a kind that is read") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise Undecodable(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def eight_bits(image: np.ndarray) -> np.ndarray:
    """`image` as uint8: itself, or uint16 pixels rounded to 8 bits, for what knows no more (Pillow's RGB, say)."""
    return image if image.dtype == np.uint8 else np.rint(image / 257.0).astype(np.uint8)


def _pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 or uint16 of a loaded image."""
    mode, bits = image.mode, _bits(image)
    if mode == "F" or (mode == "I" and image.format != "PNG"):
        kind = "floating-point" if mode == "F" else "32-bit or signed"
        raise Undecodable(f"{kind} pixels have no fixed range: rescale them to 8 or 16 bits")
    if mode.startswith("I"):
        gray = np.asarray(_upright(image)).astype(np.uint16)
        if bits < 16:
            most = (1 << bits) - 1
            gray = ((gray.astype(np.uint32) * 65535 + most // 2) // most).astype(np.uint16)
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            # Pillow sees to that up to 8 bits only.
            gray = 65535 - gray
        return np.repeat(gray[:, :, None], 3, axis=2)
    # Converted first: RGB can be turned in every way. A copy, so that it can be written to.
    return np.array(_upright(image.convert("RGB"), image))


def _bits(image: Image.Image) -> int:
    """Bits a sample has in the file, where a TIFF says so; 16 otherwise."""
    tags = getattr(image, "tag_v2", {})
    return int(tags.get(_BITS_PER_SAMPLE, (16,))[0])


def _upright(image: Image.Image, tagged: Image.Image | None = None) -> Image.Image:
    """`image` turned as the EXIF data of `tagged` (itself) say. Damaged EXIF data turn nothing."""
    try:
        orientation = (tagged or image).getexif().get(_ORIENTATION)
    except Exception:  # whatever the parser trips over, the pixels are fine
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)
