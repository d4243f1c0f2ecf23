"""Convolutions by Winograd's products: against the exact ones, within what rounding of the transforms makes.

In bfloat16 these are the gradients; the result is as the definition sums it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad, unfold

from fastmoco.ops import convolve_native, dispatch
from fastmoco.ops.convolve import convolve
from fastmoco.ops.convolve_native import SETS, fewer_products

Pair = tuple[int, int]
# Map, channels of the result, padding: odd numbers of lines, columns and images; parts of a block of tiles; maps of one
# tile and of less; no padding and the most; none at all.
CASES: list[tuple[tuple[int, int, int, int], int, Pair]] = [
    ((3, 64, 5, 6), 32, (1, 1)),
    ((2, 32, 9, 16), 96, (1, 1)),
    ((1, 32, 1, 1), 32, (1, 1)),
    ((5, 32, 2, 3), 64, (1, 1)),
    ((2, 32, 7, 4), 32, (0, 2)),
    ((1, 32, 3, 1), 32, (0, 2)),
    ((0, 32, 4, 4), 32, (1, 1)),
]
# More tiles than are transformed at a time, and weights' sums in several units and parts.
LARGE: list[tuple[tuple[int, int, int, int], int, Pair]] = [
    ((9, 32, 31, 30), 32, (1, 1)),
    ((2, 512, 7, 9), 64, (1, 1)),
    ((3, 320, 6, 5), 288, (1, 1)),
]
FORWARD = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
KERNEL = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
RESULT = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float64)
NATIVE = [pytest.param((dtype, name), id=name) for dtype, names in SETS.items() for name in names]
pytestmark = pytest.mark.skipif(not NATIVE, reason=dispatch.NATIVE_MISSING or "this processor has no AVX2")


@pytest.fixture(params=NATIVE)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Winograd's form always, by one instruction set; its dtype."""
    found, name = request.param
    monkeypatch.setitem(SETS, found, [name])
    monkeypatch.setattr(convolve_native, "fewer_products", lambda *_, **__: True)
    assert isinstance(found, torch.dtype)
    return found


def given(shape: tuple[int, int, int, int], out: int, padding: Pair, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A map, weights, and a gradient to the result, channels-last."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    n, c, h, w = shape
    return drawn(*shape), drawn(out, c, 3, 3), drawn(n, out, h + 2 * padding[0] - 2, w + 2 * padding[1] - 2)


def all_three(tensors: tuple[Tensor, ...], padding: Pair) -> list[Tensor]:
    """The result and both gradients."""
    x, weight, dy = tensors
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = convolve(x, weight, padding=padding)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def exact(tensors: tuple[Tensor, ...], padding: Pair) -> list[Tensor]:
    """As all_three, torch's in float64."""
    x, weight, dy = (tensor.double() for tensor in tensors)
    x.requires_grad_(), weight.requires_grad_()
    y = conv2d(x, weight, None, 1, padding)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def tiles(x: Tensor, padding: Pair, size: int) -> Tensor:
    """Each tile's places of a map, (N, C, tiles, size, size): a tile every two places, whole ones and parts."""
    h, w = x.shape[2:]
    above, left = padding
    below, right = (above + (h + 2 * above + size) % 2, left + (w + 2 * left + size) % 2)
    rows = unfold(pad(x, (left, right, above, below)), size, stride=2)
    return rows.unflatten(1, (x.shape[1], size, size)).permute(0, 1, 4, 2, 3)


def sizes(tensors: tuple[Tensor, ...], padding: Pair) -> list[Tensor]:
    """Of each of all_three the sum of the sizes of what Winograd adds up: what its roundings are relative to."""
    x, weight, dy = (tensor.double() for tensor in tensors)

    def both(of: Tensor, with_: Tensor, around: Pair, like: Tensor) -> Tensor:
        d = (FORWARD @ tiles(of, around, 4) @ FORWARD.T).abs()
        g = (KERNEL @ with_ @ KERNEL.T).abs()
        m = RESULT.abs() @ torch.einsum("nctij,ocij->notij", d, g) @ RESULT.abs().T
        h, w = like.shape[2:]
        down, across = (h + 1) // 2, (w + 1) // 2
        m = m.unflatten(2, (down, across)).permute(0, 1, 2, 4, 3, 5).reshape(*m.shape[:2], 2 * down, 2 * across)
        return m[:, :, :h, :w]

    turned = weight.flip(2, 3).transpose(0, 1)
    d = (FORWARD @ tiles(x, padding, 4) @ FORWARD.T).abs()
    r = (RESULT.T @ tiles(dy, (0, 0), 2) @ RESULT).abs()
    to_weights = KERNEL.T.abs() @ torch.einsum("nctij,notij->ocij", d, r) @ KERNEL.abs()
    return [
        both(x, weight, padding, dy),
        both(dy, turned, (2 - padding[0], 2 - padding[1]), x),
        to_weights,
    ]


def check(found: list[Tensor], tensors: tuple[Tensor, ...], padding: Pair) -> None:
    # Both factors are rounded after their transforms, and the result is; float32 is off by its sums besides.
    dtype = found[0].dtype
    factors, rounded = (2.0**-7, 2.0**-8) if dtype == torch.bfloat16 else (2.0**-21, 2.0**-24)
    typical = 6e-3 if dtype == torch.bfloat16 else 1e-6
    for actual, value, size in zip(found, exact(tensors, padding), sizes(tensors, padding), strict=True):
        assert actual.dtype == dtype and actual.shape == value.shape
        assert actual.is_contiguous(memory_format=torch.channels_last)
        off = actual.double() - value
        assert (off.abs() <= 1.01 * factors * size + rounded * value.abs()).all()
        assert off.norm() <= typical * value.norm()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "out", "padding"), [*CASES, *LARGE])
def test_gives_what_the_definition_does(
    shape: tuple[int, int, int, int], out: int, padding: Pair, dtype: torch.dtype
) -> None:
    tensors = given(shape, out, padding, dtype)
    check(all_three(tensors, padding), tensors, padding)


def test_numbers_that_need_no_rounding_are_exact(dtype: torch.dtype) -> None:
    """Of short numbers transforms and sums are exact, so that each place and channel is seen to be the right one."""
    tensors = tuple(4 * (tensor.float() * 2).round().clamp(-3, 3).to(dtype) for tensor in given(*CASES[0], dtype))
    for actual, value in zip(all_three(tensors, (1, 1)), exact(tensors, (1, 1)), strict=True):
        assert torch.equal(actual, value.to(dtype))


def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    tensors = given((9, 64, 17, 14), 96, (1, 1), dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(all_three(tensors, (1, 1)))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_nan_and_infinity_are_not_lost(dtype: torch.dtype) -> None:
    x, weight, _ = given(*CASES[0], dtype)
    x[1, 3, 0, 0], x[2, 5, 4, 5] = torch.nan, torch.inf
    y = convolve(x, weight, padding=(1, 1))
    wanted = conv2d(x.double(), weight.double(), None, 1, 1)
    assert not y[~wanted.isfinite()].isfinite().any() and y[0].isfinite().all()


def test_second_derivatives(dtype: torch.dtype) -> None:
    found = []
    for wide in (False, True):
        x, weight, dy = (tensor.double() if wide else tensor for tensor in given(*CASES[0], dtype))
        for tensor in (x, weight, dy):
            tensor.requires_grad_()
        y = conv2d(x, weight, None, 1, 1) if wide else convolve(x, weight, padding=(1, 1))
        gradients = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
        found.append(torch.autograd.grad(gradients, (x, weight, dy), [torch.ones_like(of) for of in gradients]))
    for actual, wanted in zip(*found, strict=True):
        error = (actual.double() - wanted).norm() / wanted.norm()
        assert error <= (2.0**-6 if dtype == torch.bfloat16 else 2.0**-19)


def test_where_it_is_chosen() -> None:
    def chosen(images: int, channels: int, side: int, *, out: int | None = None, **how: object) -> list[bool]:
        weight = (channels if out is None else out, channels, how.get("kernel", 3), how.get("kernel", 3))
        stride, padding = how.get("stride", (1, 1)), how.get("padding", (1, 1))
        shape = (images, channels, side, side)
        return [
            fewer_products(shape, weight, stride, padding, to_weights=to_weights)  # type: ignore[arg-type]
            for to_weights in (False, True)
        ]

    assert chosen(32, 64, 16) == chosen(16, 64, 56) == chosen(32, 128, 8) == [True, True]
    assert chosen(32, 256, 4) == chosen(16, 512, 7) == [True, False]
    assert chosen(32, 512, 2) == chosen(1, 256, 4) == chosen(0, 64, 16) == [False, False]
    for how in ({"stride": (2, 2)}, {"kernel": 1, "padding": (0, 0)}, {"padding": (3, 3)}, {"kernel": 5}):
        assert chosen(32, 64, 16, **how) == [False, False]


@pytest.mark.parametrize("changes", [{"kernel": (3, 1)}, {"stride": (1, 2)}, {"padding": (0, 3)}])
@pytest.mark.parametrize("name", ["winograd", "winograd_map_gradient", "winograd_weight_gradient"])
def test_the_binding_refuses_what_it_has_no_transform_of(name: str, changes: dict[str, Pair]) -> None:
    dtype, names = next((dtype, names) for dtype, names in SETS.items() if names)
    memory = torch.zeros(2**16, dtype=torch.float32)
    how = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1)} | changes
    with pytest.raises(ValueError, match="a kernel of 3 x 3, stride 1 and at most 2 places of padding"):
        getattr(dispatch.native, name)(
            *(memory.data_ptr(),) * 3,
            map=(1, 4, 4, 32),
            out=32,
            dtype=str(dtype).removeprefix("torch."),
            instruction_set=names[0],
            threads=1,
            **how,
        )
