"""Views cut from decoded images: crop, resize, colour, blur, rotation and flip, as one operation over a batch.

The definition is torchvision's `transforms.v2` on float32 images in [0, 1], written out in `_view`, which is also the
reference implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from fastmoco.ops import dispatch
from fastmoco.ops.lists import NATIVE_DEVICES

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NEUTRAL = (1.0, 1.0, 1.0, 0.0)

VIEW = np.dtype(
    [
        ("image", np.int32),
        ("resized", np.int32, 2),
        ("window", np.int32, 4),
        ("order", np.int32, 4),
        ("factor", np.float32, 4),
        ("sigma", np.float32),
        ("angle", np.float32),
        ("gray", np.int32),
        ("flip", np.int32),
    ]
)
"""What one view is: a record of 19 words of 4 bytes, the same in numpy, C++ and CUDA.

image: which of the images it is cut from.
resized: height and width to which the whole image is resized first; 0, 0 where it is not.
window: top, left, height and width, in the image after that, of the region that is resized to the view.
order: the colour operations (0 brightness, 1 contrast, 2 saturation, 3 hue) in the order in which they are applied.
factor: brightness, contrast and saturation factors (1: off) and the hue shift in turns (0: off).
sigma: standard deviation of the Gaussian blur in pixels (0: off). angle: degrees counter-clockwise.
gray, flip: 0 or 1.
"""

Image = np.ndarray | Tensor


def make_views(
    images: Sequence[Image],
    views: np.ndarray,
    *,
    size: int,
    blur_kernel: int,
    threads: int = 1,
    out: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Cut the M views that `views` (M,) of dtype `VIEW` describes: (M, size, size, 3) float16 in [0, 1].

    images: (H, W, 3) uint8 or uint16 (whose 65535 is white), dense, numpy arrays or tensors, all on one device.
    blur_kernel: side of the Gaussian's kernel in pixels, odd. threads: of the CPU, which do not change the result.
    out: where the views are written, dense, in place of new memory, whose first touch costs a quarter of the work.

    In this order: the whole image is resized to `resized`, bilinearly with antialiasing; `window` is cut out and
    resized likewise to (size, size), pixels outside it unseen; the colour operations that are not neutral, in `order`,
    each clamped to [0, 1], contrast about the image's own mean gray; gray; blur with a reflected border; rotation
    about the centre, bilinear, with zeros outside; horizontal flip. Raises ValueError for images or records that do
    not fit together.
    """
    check(images, views, size=size, blur_kernel=blur_kernel)
    device = _device(images[0]) if images else torch.device("cpu")
    run = dispatch.pick("views", torch.empty(0, device=device), implementation)
    shape = (len(views), size, size, 3)
    if out is None:
        out = torch.empty(shape, dtype=torch.float16, device=device)
    elif out.shape != shape or out.dtype != torch.float16 or out.device != device or not out.is_contiguous():
        raise ValueError(f"out: needs a dense {shape} float16 tensor on {device}, not {tuple(out.shape)} {out.dtype}")
    run(images, views, out, size=size, blur_kernel=blur_kernel, threads=threads)
    return out


def check(images: Sequence[Image], views: np.ndarray, *, size: int, blur_kernel: int) -> None:
    """Raise ValueError, naming the first that is wrong, where `make_views` could not be done with these."""
    if views.dtype != VIEW or views.ndim != 1:
        raise ValueError(f"views: needs a (M,) array of fastmoco.ops.views.VIEW, not {views.dtype} {views.shape}")
    if size < 1 or blur_kernel < 1 or blur_kernel % 2 == 0:
        raise ValueError(f"needs size >= 1 and an odd blur_kernel >= 1, not {size} and {blur_kernel}")
    for i, image in enumerate(images):
        if len(image.shape) != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"images[{i}]: needs (H, W, 3), not {tuple(image.shape)}")
        if image.dtype not in (np.uint8, np.uint16, torch.uint8, torch.uint16):
            raise ValueError(f"images[{i}]: needs uint8 or uint16, not {image.dtype}")
        if _device(image) != _device(images[0]):
            raise ValueError(f"images[{i}] is on {_device(image)} and images[0] on {_device(images[0])}")
    if blur_kernel // 2 >= size:
        raise ValueError(f"blur_kernel: {blur_kernel} pixels reflect more than the {size} that a view has")
    if not len(views):
        return
    if views["image"].min() < 0 or views["image"].max() >= len(images):
        raise ValueError(f"views: field image must be from 0 to {len(images) - 1}")
    sizes = np.array([image.shape[:2] for image in images])[views["image"]]
    first = np.where(views["resized"] > 0, views["resized"], sizes)
    window = views["window"]
    inside = (window[:, :2] >= 0) & (window[:, 2:] > 0) & (window[:, :2].astype(np.int64) + window[:, 2:] <= first)
    whole = (views["resized"] > 0).all(axis=1) | (views["resized"] == 0).all(axis=1)
    wrong = {
        "window, which must lie inside the image": ~inside.all(axis=1),
        "resized, which must be 0, 0 or positive": ~whole,
        "order, which must be a permutation of 0 to 3": (np.sort(views["order"], axis=1) != np.arange(4)).any(axis=1),
        "factor, which must be finite, and not negative but for the hue": ~np.isfinite(views["factor"]).all(axis=1)
        | (views["factor"][:, :HUE] < 0).any(axis=1),
        "factor, whose hue shift must be within half a turn": ~(np.abs(views["factor"][:, HUE]) <= 0.5),
        "sigma, which must be finite and not negative": ~((views["sigma"] >= 0) & (views["sigma"] < np.inf)),
        "angle, which must be finite": ~np.isfinite(views["angle"]),
    }
    for what, rows in wrong.items():
        if rows.any():
            raise ValueError(f"views[{int(rows.argmax())}]: field {what}: {views[rows.argmax()]}")


def _device(image: Image) -> torch.device:
    return image.device if isinstance(image, Tensor) else torch.device("cpu")


def _reference(
    images: Sequence[Image],
    views: np.ndarray,
    out: Tensor,
    *,
    size: int,
    blur_kernel: int,
    threads: int,
) -> None:
    def make(i: int) -> None:
        x = _view(_unit(images[int(views[i]["image"])]), views[i], size, blur_kernel)
        out[i].copy_(x.permute(1, 2, 0))

    if out.device.type == "cpu":
        list(_pool(threads).map(make, range(len(views))))
    else:
        # One stream: threads would only wait for each other.
        for i in range(len(views)):
            make(i)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which a torch operation runs by itself: bits must not depend on how many there are."""

    def alone() -> None:
        # torch sets OpenMP's threads for a thread when that first asks it for something, and once only.
        torch.get_num_threads()
        threadpool_limits(1, user_api="openmp")

    return ThreadPoolExecutor(threads, thread_name_prefix="views", initializer=alone)


def _unit(image: Image) -> Tensor:
    """(H, W, 3) integers as (3, H, W) float32 in [0, 1]."""
    x = torch.as_tensor(image) if isinstance(image, Tensor) or image.flags.writeable else torch.tensor(image)
    white = 65535.0 if x.dtype == torch.uint16 else 255.0
    return x.permute(2, 0, 1).float().div(white)


def _view(x: Tensor, view: np.ndarray, size: int, blur_kernel: int) -> Tensor:
    """The view that the record `view` makes of `x` (3, H, W) float32: (3, size, size) float32."""
    # Here, since it takes torch's compiler with it: 2 s of every start where C++ makes the views.
    from torchvision.transforms.v2 import functional as F

    if view["resized"].any():
        x = F.resize(x, view["resized"].tolist(), antialias=True)
    top, left, height, width = view["window"].tolist()
    x = x[:, top : top + height, left : left + width]
    x = F.resize(x, [size, size], antialias=True)
    colours = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for operation in view["order"]:
        factor = float(view["factor"][operation])
        # A neutral one leaves the image untouched, as it would up to rounding.
        if factor != NEUTRAL[operation]:
            x = colours[operation](x, factor)
    if view["gray"]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if view["sigma"] > 0 and blur_kernel > 1:
        x = F.gaussian_blur(x, [blur_kernel] * 2, [float(view["sigma"])] * 2)
    if view["angle"] != 0:
        x = F.rotate(x, float(view["angle"]), interpolation=F.InterpolationMode.BILINEAR)
    return F.horizontal_flip(x) if view["flip"] else x


# What fastmoco._C knows of an image.
_IMAGE = np.dtype(
    [("address", np.uint64), ("height", np.int32), ("width", np.int32), ("wide", np.int32), ("unused", np.int32)]
)


def _native(
    images: Sequence[Image],
    views: np.ndarray,
    out: Tensor,
    *,
    size: int,
    blur_kernel: int,
    threads: int,
    instruction_set: str = "",
) -> None:
    """C++ on the CPU, or CUDA on the current stream; instruction_set is one of fastmoco._C.VIEWS_SETS, "" the best."""
    assert dispatch.native is not None
    # Kept until the work is done, or given to the stream: copies may be among them.
    dense = [image.contiguous() if isinstance(image, Tensor) else np.ascontiguousarray(image) for image in images]
    table = np.array([_row(image) for image in dense], dtype=_IMAGE)
    views = np.ascontiguousarray(views)
    sizes = {"count": len(views), "size": size, "blur_kernel": blur_kernel}
    on_host = table.ctypes.data, views.ctypes.data
    if out.device.type == "cpu":
        dispatch.native.views(*on_host, out.data_ptr(), **sizes, instruction_set=instruction_set, threads=threads)
        return
    taps, needed = dispatch.native.views_space(*on_host, **sizes)
    workspace = torch.empty(needed, dtype=torch.uint8, device=out.device)
    # One copy, from pinned memory, so that nothing waits for the device.
    records = torch.from_numpy(np.concatenate([table.view(np.uint8), views.view(np.uint8)])).pin_memory()
    records = records.to(out.device, non_blocking=True)
    addresses = records.data_ptr(), records.data_ptr() + table.nbytes, out.data_ptr(), workspace.data_ptr()
    stream = torch.cuda.current_stream(out.device).cuda_stream
    with torch.cuda.device(out.device):
        dispatch.native.views_cuda(*addresses, **sizes, taps=taps, device=out.get_device(), stream=stream)


def _row(image: Image) -> tuple[int, ...]:
    """A dense image as a row of dtype `_IMAGE`."""
    address = image.data_ptr() if isinstance(image, Tensor) else image.ctypes.data
    return address, image.shape[0], image.shape[1], int(image.dtype in (torch.uint16, np.uint16)), 0


dispatch.register("views", "reference", _reference)
dispatch.register("views", "native", _native, device_types=NATIVE_DEVICES, missing=dispatch.NATIVE_MISSING)
