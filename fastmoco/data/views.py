"""What a view of an image is: the settings of its random transforms and the geometry that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastmoco.errors import UserError


@dataclass(kw_only=True, slots=True, frozen=True)
class ViewConfig:
    """How both views of an image are drawn from it.

    The transforms come in this order: resize and centre crop, random resized crop, colour jitter (its four
    operations in random order), gray, blur, rotation, horizontal flip. They are torchvision's `transforms.v2` on
    float32 images in [0, 1]; resizes are bilinear with antialiasing. Raises UserError for a value out of range.
    """

    size: int = 224
    """Side of a view, in pixels."""
    resize: float | None = None
    """First resize the shorter side to this many times `size` (at least 1); with no random crop, the central
    `size` x `size` pixels are the view. None: no first resize."""
    crop_scale: tuple[float, float] | None = None
    """Least and greatest part of the image's area that a random resized crop covers, within (0, 1]; its width is
    3/4 to 4/3 of its height. None: no random crop."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strength of the colour jitter: brightness, contrast and saturation factors are drawn from 1 - x to 1 + x
    (and are at least 0), the hue shift from -x to x turns of the colour circle (x at most 0.5)."""
    jitter_p: float = 0.8
    """Probability of the colour jitter."""
    gray_p: float = 0.2
    """Probability that a view is gray."""
    blur_p: float = 0.5
    """Probability of the Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Least and greatest standard deviation of the blur, in pixels."""
    rotation: float = 0.0
    """Greatest rotation, in degrees, either way about the centre; what it uncovers is black. 0: none."""
    flip_p: float = 0.0
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 4096:
            raise UserError(f"--size: a view has 8 to 4096 pixels a side, not {self.size}")
        if self.resize is None and self.crop_scale is None:
            raise UserError("--resize and --crop-scale are both off, so views would differ in size: set one of them")
        if self.resize is not None and not 1.0 <= self.resize < math.inf:
            raise UserError(f"--resize: must be at least 1 for a {self.size} pixel view to be cut, not {self.resize}")
        if self.crop_scale is not None and not 0.0 < self.crop_scale[0] <= self.crop_scale[1] <= 1.0:
            raise UserError(f"--crop-scale: needs 0 < least <= greatest <= 1, not {self.crop_scale}")
        if not all(0.0 <= strength < math.inf for strength in self.jitter) or self.jitter[3] > 0.5:
            raise UserError(f"--jitter: strengths must be at least 0, and hue at most 0.5, not {self.jitter}")
        for name in ("jitter_p", "gray_p", "blur_p", "flip_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                option = name.replace("_", "-")
                raise UserError(f"--{option}: a probability lies between 0 and 1, not {getattr(self, name)}")
        if not 0.0 < self.blur_sigma[0] <= self.blur_sigma[1] < math.inf:
            raise UserError(f"--blur-sigma: needs 0 < least <= greatest, not {self.blur_sigma}")
        if not 0.0 <= self.rotation <= 180.0:
            raise UserError(f"--rotation: needs 0 to 180 degrees, not {self.rotation}")

    @property
    def blur_kernel(self) -> int:
        """Side of the blur's kernel in pixels: odd, about a tenth of the view's side; 1 blurs nothing."""
        return 2 * math.floor(0.1 * self.size / 2) + 1

    @property
    def jitters(self) -> bool:
        """Whether any colour jitter can be drawn."""
        return self.jitter_p > 0 and any(self.jitter)

    @property
    def blurs(self) -> bool:
        """Whether any blur can be drawn."""
        return self.blur_p > 0 and self.blur_kernel > 1


def resized_sizes(views: ViewConfig, sizes: np.ndarray) -> np.ndarray | None:
    """Heights and widths (N, 2) int64 after the first resize of images of `sizes` (N, 2), in pixels.

    None where there is no first resize. As in torchvision, the longer side is rounded down.
    """
    if views.resize is None:
        return None
    sizes = sizes.astype(np.int64)
    shorter = round(views.resize * views.size)
    return shorter * sizes // sizes.min(axis=1, keepdims=True)


def centre_windows(views: ViewConfig, sizes: np.ndarray) -> np.ndarray:
    """The region (N, 4) int64 (top, left, height, width) of images of `sizes` (N, 2) that views are taken from.

    After a first resize it is the central `size` x `size` pixels, placed as torchvision's centre crop; without
    one it is the whole image. `sizes` are those after the first resize.
    """
    windows = np.zeros((len(sizes), 4), dtype=np.int64)
    if views.resize is None:
        windows[:, 2:] = sizes
    else:
        windows[:, :2] = np.rint((sizes - views.size) / 2)
        windows[:, 2:] = views.size
    return windows
