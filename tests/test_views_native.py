"""Views in C++ against torchvision's transforms: each operation alone and all together, at sizes nobody chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmoco.ops import dispatch
from fastmoco.ops.views import _IMAGE, NEUTRAL, VIEW, Image, _native, make_views

pytestmark = pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING)

CUDA = dispatch.native.build_info()["cuda"] if dispatch.native else ""
SETS = dispatch.native.VIEWS_SETS if dispatch.native else []
# The spacing of float16 below 1: what is equal in float32 but for its rounding may differ by one.
STEP = 2.0**-11
SHAPES = [(1, 1), (1, 7), (7, 1), (8, 50), (50, 8), (97, 131), (64, 64), (300, 211)]


def image(height: int, width: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    """Grain on smooth colours, with rows of gray, of saturated and of black and white pixels: the corners of hue."""
    rng = np.random.default_rng((seed, height, width))
    coarse = torch.from_numpy(rng.random((1, 3, 5, 7)))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].permute(1, 2, 0)
    pixels = smooth.numpy() + rng.choice([0.1, 1.0]) * (rng.random((height, width, 3)) - 0.5)
    pixels[1:3] = pixels[1:3, :, :1]
    pixels[4:6] = np.rint(pixels[4:6])
    return (pixels.clip(0, 1) * np.iinfo(dtype).max).astype(dtype)


def record(window: Sequence[int], **fields: object) -> np.ndarray:
    """One view of `window`, in which everything is off but `fields`."""
    views = np.zeros(1, dtype=VIEW)
    views["window"], views["order"], views["factor"] = window, np.arange(4), NEUTRAL
    for name, value in fields.items():
        views[name] = value
    return views


def whole(picture: np.ndarray, **fields: object) -> np.ndarray:
    return record((0, 0, *picture.shape[:2]), **fields)


def native(images: Sequence[Image], views: np.ndarray, name: str = "", *, size: int, blur_kernel: int = 1) -> Tensor:
    out = torch.full((len(views), size, size, 3), np.nan, dtype=torch.float16)
    _native(images, views, out, size=size, blur_kernel=blur_kernel, threads=1, instruction_set=name)
    return out


def check(images: Sequence[Image], views: np.ndarray, *, size: int, blur_kernel: int = 1) -> Tensor:
    """Every instruction set's views are the reference's but for rounding; returns the reference's."""
    options = {"size": size, "blur_kernel": blur_kernel}
    expected = make_views(images, views, implementation="reference", **options)
    for name in SETS:
        made = native(images, views, name, **options)
        assert made.shape == expected.shape and made.dtype == torch.float16
        error = (made.float() - expected.float()).abs()
        assert error.max() <= STEP, (name, views, error.max() / STEP)
        assert error.mean() <= 0.01 * STEP or error.numel() < 1000, (name, views, error.mean() / STEP)
    return expected


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 5, 8, 33, 100])
def test_one_resize(shape: tuple[int, int], size: int, dtype: type) -> None:
    """Of the whole image and of windows in its corners and down to a pixel, made larger and smaller."""
    picture = image(*shape, dtype)
    height, width = shape
    windows = [(0, 0, height, width), (height - 1, width - 1, 1, 1), (0, width // 2, 1, 1)]
    windows += [(height // 2, 0, height - height // 2, (width + 1) // 2), (height // 3, width // 3, 1, width // 3 + 1)]
    check([picture], np.concatenate([record(window) for window in windows]), size=size)


@pytest.mark.parametrize("size", [*range(8, 50), 63, 65, 127, 128, 129, 223, 224, 255])
def test_every_width_fills_its_vectors(size: int) -> None:
    picture = image(97, 131)
    fields = {"factor": (1.3, 0.8, 1.4, 0.1), "sigma": 0.8}
    views = [whole(picture, flip=1, **fields), whole(picture, angle=17.0, **fields)]
    check([picture], np.concatenate(views), size=size, blur_kernel=2 * (size // 20) + 1)


@pytest.mark.parametrize("times", [1.01, 1.5, 2.0, 3.0, 5.3, 12.0])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_scale_of(times: float, dtype: type) -> None:
    """`times` smaller, larger, and one of each across and down."""
    small, large = 24, round(24 * times)
    for shape in [(large, large), (large, 30), (30, large)]:
        check([image(*shape, dtype)], whole(image(*shape, dtype)), size=small)
    check([image(small, 30, dtype)], whole(image(small, 30, dtype)), size=large)


@pytest.mark.parametrize("resized", [(30, 200), (97, 131), (97, 60), (250, 300), (20, 20)])
@pytest.mark.parametrize("size", [20, 45])
def test_two_resizes_are_one_filter(resized: tuple[int, int], size: int) -> None:
    """The window cut between them hides what is outside it from the second, not from the first."""
    picture = image(97, 131)
    height, width = resized
    windows = [(0, 0, height, width), (height - 20, width - 20, 20, 20), (3, 5, height // 2, width // 3)]
    check([picture], np.concatenate([record(window, resized=resized) for window in windows]), size=size)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_view_of_its_own_size_is_exact(dtype: type) -> None:
    """All values that a pixel can have, to the bit of what dividing by white in float32 gives."""
    side = 16 if dtype == np.uint8 else 256
    values = np.arange(side * side).astype(dtype).reshape(side, side, 1).repeat(3, axis=2)
    expected = (torch.from_numpy(values.astype(np.float32)) / float(np.iinfo(dtype).max)).half()
    for name in SETS:
        assert torch.equal(native([values], whole(values), name, size=side)[0], expected)


FACTORS = {
    "brightness": [(0.0, 1, 1, 0), (0.3, 1, 1, 0), (1.9, 1, 1, 0)],
    "contrast": [(1, 0.0, 1, 0), (1, 0.4, 1, 0), (1, 1.8, 1, 0)],
    "saturation": [(1, 1, 0.0, 0), (1, 1, 0.4, 0), (1, 1, 1.8, 0)],
    "hue": [(1, 1, 1, turns) for turns in (-0.5, -1 / 3, -0.25, -1 / 6, -0.1, 1e-4, 0.1, 1 / 6, 0.25, 1 / 3, 0.5)],
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("size", [31, 64])
def test_a_colour_operation_alone(name: str, size: int) -> None:
    picture = image(size, size)
    check([picture], np.concatenate([whole(picture, factor=factor) for factor in FACTORS[name]]), size=size)


def test_hue_at_the_boundaries_of_its_sectors() -> None:
    """The six saturated colours, their neighbours one value away, gray, black and white, turned by every sixth."""
    corners = np.array([[r, g, b] for r in (0, 1, 128, 254, 255) for g in (0, 1, 127, 128, 255) for b in (0, 128, 255)])
    picture = np.resize(corners, (9, 9, 3)).astype(np.uint8)
    turns = np.arange(-6, 7) / 12
    check([picture], np.concatenate([whole(picture, factor=(1, 1, 1, turn)) for turn in turns]), size=9)


def test_the_order_of_the_colour_operations() -> None:
    """All 24, each with the mean that contrast finds when its turn comes; they do not come to the same."""
    picture = image(40, 40, seed=3)
    orders = [order for order in np.ndindex(4, 4, 4, 4) if len(set(order)) == 4]
    views = [whole(picture, order=order, factor=(1.5, 1.6, 0.4, 0.3), gray=i % 2) for i, order in enumerate(orders)]
    made = check([picture], np.concatenate(views), size=40)
    assert len(orders) == 24 and (made[0] - made[-2]).abs().max() > 0.1


@pytest.mark.parametrize("sigma", [1e-3, 0.1, 0.5, 1.0, 2.0, 9.0])
@pytest.mark.parametrize(("size", "kernel"), [(64, 1), (64, 7), (33, 3), (20, 39), (2, 3), (255, 25)])
def test_blur(sigma: float, size: int, kernel: int) -> None:
    picture = image(size, size)
    check([picture], whole(picture, sigma=sigma), size=size, blur_kernel=kernel)


@pytest.mark.parametrize("size", [1, 2, 31, 64, 129])
def test_rotation_and_flip(size: int) -> None:
    picture = image(size, size)
    angles = (-180.0, -90.0, -30.0, -1e-3, 1e-3, 17.0, 45.0, 90.0, 123.4, 180.0, 270.0, 360.0, 725.0)
    views = [whole(picture, angle=angle, flip=flip) for angle in (0.0, *angles) for flip in (0, 1)]
    made = check([picture], np.concatenate(views), size=size)
    assert torch.equal(made[1], made[0].flip(1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_threads_do_not_change_a_bit(dtype: type) -> None:
    images = [image(*shape, dtype) for shape in SHAPES]
    views = np.concatenate(
        [whole(images[i % 8], image=i % 8, factor=(1.2, 0.9, 1.1, 0.1), sigma=i % 3, angle=i % 5) for i in range(40)]
    )
    made = [make_views(images, views, size=45, blur_kernel=5, threads=threads) for threads in (1, 2, 3, 64)]
    assert all(torch.equal(other, made[0]) for other in made[1:])


def test_what_was_in_memory_before_does_not_show(poisoned: None) -> None:
    picture = image(50, 61)
    for size in (1, 5, 16, 37):
        assert native([picture], whole(picture, sigma=1.0), size=size).isfinite().all()


def test_arrays_and_tensors_with_gaps_and_read_only() -> None:
    picture = image(60, 40)
    expected = native([picture], whole(picture), size=24)
    frozen = picture.copy()
    frozen.flags.writeable = False
    turned = np.ascontiguousarray(picture.transpose(1, 0, 2)).transpose(1, 0, 2)
    for same in (torch.from_numpy(picture), torch.from_numpy(turned), turned, frozen):
        assert torch.equal(native([same], whole(picture), size=24), expected)


def test_no_views_of_no_images() -> None:
    assert make_views([], np.zeros(0, dtype=VIEW), size=8, blur_kernel=1).shape == (0, 8, 8, 3)


def test_on_a_gpu_that_is_not_there_it_says_so() -> None:
    """Whether built with CUDA or without."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert dispatch.native is not None
    memory = np.zeros(64, dtype=np.uint64)
    address = memory.ctypes.data
    sizes = {"count": 1, "size": 2, "blur_kernel": 1}
    with pytest.raises(RuntimeError, match="CUDA: .*(driver|device)" if CUDA else "built without CUDA"):
        dispatch.native.views_cuda(address, address, address, address, **sizes, taps=1, device=0, stream=0)
    with pytest.raises(ValueError, match="taps"):
        dispatch.native.views_cuda(address, address, address, address, **sizes, taps=0, device=0, stream=0)


def test_images_on_two_devices_are_refused() -> None:
    images = [image(8, 8), torch.zeros((8, 8, 3), dtype=torch.uint8, device="meta")]
    with pytest.raises(ValueError, match=r"images\[1\] is on meta and images\[0\] on cpu"):
        make_views(images, whole(image(8, 8)), size=8, blur_kernel=1)


def test_the_workspace_holds_a_group_however_many_views() -> None:
    """A view's own room, then that of all, then no more."""
    assert dispatch.native is not None
    picture = image(400, 300)
    table = np.array([(picture.ctypes.data, 400, 300, 0, 0)], dtype=_IMAGE)

    def needed(count: int) -> tuple[int, int]:
        views = whole(picture).repeat(count)
        space = dispatch.native.views_space
        return space(table.ctypes.data, views.ctypes.data, count=count, size=100, blur_kernel=11)

    taps, one = needed(1)
    assert 9 <= taps <= 11 and 2 * 3 * 100 * 100 * 4 < one < 300_000
    assert needed(10) == (taps, 10 * one)
    assert needed(1000) == needed(5000) and 31 << 20 < needed(1000)[1] <= 32 << 20


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_views_are_written_where_they_are_wanted(implementation: str) -> None:
    picture = image(20, 30)
    options: dict[str, Any] = {"size": 8, "blur_kernel": 1, "implementation": implementation}
    room = torch.full((3, 8, 8, 3), np.nan, dtype=torch.float16)
    made = make_views([picture], whole(picture).repeat(3), out=room, **options)
    assert made is room and torch.equal(room, make_views([picture], whole(picture).repeat(3), **options))
    for wrong in (room[:2], room.float(), room.permute(0, 2, 1, 3)):
        with pytest.raises(ValueError, match="out: needs a dense"):
            make_views([picture], whole(picture).repeat(3), out=wrong, **options)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="instruction set abacus"):
        native([image(8, 8)], whole(image(8, 8)), "abacus", size=8)
    with pytest.raises(ValueError, match="blur_kernel"):
        native([image(8, 8)], whole(image(8, 8)), size=8, blur_kernel=17)


WRONG: list[tuple[str, object]] = [
    ("image", 1),
    ("window", (0, 0, 9, 8)),
    ("window", (-1, 0, 8, 8)),
    ("window", (0, 0, 0, 8)),
    ("window", (2, 0, 8, 8)),
    ("window", (2**31 - 1, 0, 2**31 - 1, 8)),
    ("resized", (8, 0)),
    ("order", (0, 1, 2, 2)),
    ("factor", (np.nan, 1, 1, 0)),
    ("factor", (1, -1, 1, 0)),
    ("factor", (1, 1, 1, 0.6)),
    ("sigma", np.inf),
    ("angle", np.nan),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_record_that_does_not_fit_is_refused(field: str, value: object) -> None:
    picture = image(8, 8)
    views = np.concatenate([whole(picture), whole(picture)])
    views[field][1] = value
    with pytest.raises(ValueError, match=f"field {field}"):
        make_views([picture], views, size=8, blur_kernel=1)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int]:
    """An image, a record of a view of it, a size and a kernel."""

    def whole_number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    def number(low: float, high: float) -> float:
        return draw(st.floats(low, high, width=32))

    picture = image(
        whole_number(1, 80), whole_number(1, 80), draw(st.sampled_from([np.uint8, np.uint16])), whole_number(0, 9)
    )
    size = whole_number(1, 70)
    resized = (whole_number(1, 90), whole_number(1, 90)) if draw(st.booleans()) else (0, 0)
    bounds = resized if resized[0] else picture.shape[:2]
    height, width = (whole_number(1, side) for side in bounds)
    top, left = whole_number(0, bounds[0] - height), whole_number(0, bounds[1] - width)
    view = record(
        (top, left, height, width),
        resized=resized,
        order=draw(st.permutations(range(4))),
        factor=[number(0, 2), number(0, 2), number(0, 2), number(-0.5, 0.5)],
        sigma=draw(st.sampled_from([0.0, number(0.125, 4.0)])),
        angle=draw(st.sampled_from([0.0, number(-180, 180)])),
        gray=whole_number(0, 1),
        flip=whole_number(0, 1),
    )
    return picture, view, size, 2 * whole_number(0, min(size - 1, 6)) + 1


@settings(max_examples=150)
@given(drawn())
def test_any_view(case: tuple[np.ndarray, np.ndarray, int, int]) -> None:
    picture, view, size, kernel = case
    check([picture], view, size=size, blur_kernel=kernel)
