"""The largest of each window over a map: against torch's own, values bit for bit and gradients within one rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from fastmoco.ops import dispatch
from fastmoco.ops import max_pool as module
from fastmoco.ops.max_pool import max_pool

BUILT = pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
NATIVE = pytest.param("native", marks=BUILT)
Pair = tuple[int, int]
Windows = tuple[Pair, Pair, Pair]
STEM: Windows = ((3, 3), (2, 2), (1, 1))
# Kernel, stride, padding: windows that overlap, meet and lie apart, of one place, of few, and of more than are taken at
# once; places that 1, 2, 3, 4, 6, 9 and 25 windows cover, or none.
WINDOWS: list[Windows] = [
    STEM,
    ((2, 2), (2, 2), (0, 0)),
    ((2, 3), (1, 2), (1, 1)),
    ((3, 3), (1, 1), (1, 1)),
    ((1, 1), (2, 3), (0, 0)),
    ((3, 2), (4, 1), (0, 1)),
    ((5, 5), (1, 1), (2, 2)),
    ((7, 4), (2, 3), (3, 2)),
]
SIDES = [(1, 1), (1, 6), (2, 3), (3, 2), (5, 4), (4, 7), (7, 7), (8, 9), (11, 10)]
CHANNELS = [1, 3, 33, 64, 257]
# Half a unit in the last place.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def fitting(sides: Pair, windows: Windows) -> bool:
    return module.fits((1, 1, *sides), *windows)


def image(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0, ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if ties:
        # Zeros of both signs among few others.
        values = values.round()
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def strange(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN of both signs, infinities and zeros of both signs, and whole neighbourhoods of minus infinity."""
    generator = torch.Generator().manual_seed(2)
    # By bits: torch's conversions make every NaN of a bfloat16 positive.
    bits = {torch.bfloat16: (torch.int16, 0x7FC0, -0x40), torch.float32: (torch.int32, 0x7FC00000, -0x400000)}[dtype]
    nans = torch.tensor(bits[1:], dtype=bits[0]).view(dtype)
    kinds = torch.cat([nans, torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0], dtype=dtype)])
    drawn = kinds[torch.randint(0, len(kinds), shape, generator=generator)]
    rare = drawn[: shape[0] // 2]
    rare[torch.rand(rare.shape, generator=generator) < 0.9] = 0.5
    drawn[0] = -torch.inf
    return drawn.contiguous(memory_format=torch.channels_last)


def check(x: Tensor, windows: Windows, implementation: str | None) -> None:
    """Values, and the gradient of every one of them, against torch's."""
    dtype, (kernel, stride, padding) = x.dtype, windows
    mine, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y = max_pool(mine, kernel, stride=stride, padding=padding, implementation=implementation)
    wanted = max_pool2d(exact, kernel, stride, padding)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.detach().double(), wanted.detach(), rtol=0, atol=0, equal_nan=True)
    zero = wanted == 0
    assert torch.equal(y.signbit()[zero], wanted.signbit()[zero])
    upstream = image(tuple(y.shape), dtype, seed=1)
    (gradient,) = torch.autograd.grad(y, mine, upstream)
    (exact_gradient,) = torch.autograd.grad(wanted, exact, upstream.double())
    assert gradient.dtype == dtype and gradient.is_contiguous(memory_format=torch.channels_last)
    # Rounded once, after sums in float32 of as many numbers as windows may cover a place.
    taken = (kernel[0] + stride[0] - 1) // stride[0] * ((kernel[1] + stride[1] - 1) // stride[1])
    (sizes,) = torch.autograd.grad(max_pool2d(exact, kernel, stride, padding), exact, upstream.double().abs())
    allowed = ROUNDING[dtype] * exact_gradient.abs() + (taken - 1) * 2.0**-24 * sizes
    assert ((gradient.double() - exact_gradient).abs() <= allowed).all()
    with torch.no_grad():
        alone = max_pool(mine, kernel, stride=stride, padding=padding, implementation=implementation)
    torch.testing.assert_close(alone, y.detach(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("implementation", ["reference", NATIVE])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("windows", WINDOWS)
def test_values_and_gradients_are_torchs(
    windows: Windows, channels: int, dtype: torch.dtype, implementation: str
) -> None:
    sides = [pair for pair in SIDES if fitting(pair, windows)]
    assert len(sides) >= 2
    for height, width in sides:
        check(image((2, channels, height, width), dtype), windows, implementation)
        check(image((2, channels, height, width), dtype, ties=True), windows, implementation)


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("windows", WINDOWS)
def test_what_is_no_number_or_infinite_goes_as_torch_has_it(
    windows: Windows, channels: int, dtype: torch.dtype, implementation: str
) -> None:
    x = strange((4, channels, 11, 10), dtype)
    assert x.isnan().any() and x.isnan().logical_and(x.signbit()).any()
    check(x, windows, implementation)


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_of_equal_numbers_the_first_has_the_gradient_and_of_nan_the_last(
    dtype: torch.dtype, implementation: str
) -> None:
    for value, place in ((1.0, (0, 0)), (-torch.inf, (0, 0)), (torch.nan, (1, 1))):
        x = torch.full((1, 2, 3, 3), value, dtype=dtype).requires_grad_()
        y = max_pool(x, (3, 3), stride=(2, 2), padding=(1, 1), implementation=implementation)
        (gradient,) = torch.autograd.grad(y[:, :, 0, 0].sum(), x)
        assert gradient.count_nonzero() == 2 and gradient[:, :, place[0], place[1]].eq(1).all()


@BUILT
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("windows", WINDOWS)
def test_cpp_takes_what_the_reference_does_and_has_the_same_bits_for_any_number_of_threads(
    windows: Windows, dtype: torch.dtype
) -> None:
    """Of maps for several threads; the reference adds up in another order."""
    x = image((5, 70, 29, 31), dtype, ties=True)
    y, index = module.reference(x, *windows, True)
    dy = image(tuple(y.shape), dtype, seed=1)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            again, at = module._native(x, *windows, True)
            assert torch.equal(again, y) and torch.equal(at, index)
            none, empty = module._native(x, *windows, False)
            assert torch.equal(none, y) and empty.numel() == 0
            found.append(module._native_backward(dy, index, x.shape, *windows))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(dx, found[0]) for dx in found)
    wanted = module.reference_backward(dy.double(), index, x.shape, *windows)
    torch.testing.assert_close(found[0].double(), wanted, rtol=ROUNDING[dtype], atol=1e-5)


@BUILT
def test_a_kernel_of_as_many_taps_as_a_byte_counts() -> None:
    for kernel in ((15, 17), (255, 1), (1, 255)):
        padding = (kernel[0] // 2, kernel[1] // 2)
        x = image((1, 3, 258, 258), torch.float32)[:, :, : kernel[0] + 3, : kernel[1] + 3]
        check(x.contiguous(memory_format=torch.channels_last), (kernel, (3, 2), padding), "native")


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
def test_maps_and_gradients_in_any_layout(implementation: str) -> None:
    x = image((2, 5, 8, 9), torch.float32)
    upstream = image((2, 5, 4, 5), torch.float32, seed=1)
    found = []
    for given, back in (
        (x, upstream),
        (x.contiguous(), upstream.contiguous()),
        (x.mT.clone().mT, upstream.mT.clone().mT),
    ):
        leaf = given.clone().requires_grad_()
        y = max_pool(leaf, (3, 3), stride=(2, 2), padding=(1, 1), implementation=implementation)
        found.append([y.detach(), *torch.autograd.grad(y, leaf, back)])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)])
@pytest.mark.parametrize("implementation", ["reference", NATIVE])
def test_maps_without_numbers(shape: tuple[int, ...], implementation: str) -> None:
    x = torch.zeros(shape).requires_grad_()
    y = max_pool(x, (2, 2), stride=(2, 2), implementation=implementation)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == (*shape[:2], 2, 2) and gradient.shape == shape


def test_derivatives_of_any_order_in_float64() -> None:
    x = image((2, 3, 5, 4), torch.float64).requires_grad_()

    def cubes(x: Tensor) -> Tensor:
        return max_pool(x, (3, 2), stride=(2, 1), padding=(1, 1)).pow(3)

    assert torch.autograd.gradcheck(cubes, x)
    assert torch.autograd.gradgradcheck(cubes, x)


def penalty(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of a sum of squared gradients."""
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).pow(3).sum(), leaf, create_graph=True)
    (again,) = torch.autograd.grad(gradient.square().sum(), leaf)
    return again


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_second_derivatives_are_torchs(dtype: torch.dtype, tolerance: float) -> None:
    x = image((2, 33, 9, 8), dtype)
    mine = penalty(lambda x: max_pool(x, (3, 3), stride=(2, 2), padding=(1, 1)), x)
    wanted = penalty(lambda x: max_pool2d(x, 3, 2, 1), x.double())
    assert (mine.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_many_gradients_at_once(dtype: torch.dtype) -> None:
    x = image((2, 5, 9, 8), dtype).requires_grad_()
    y = max_pool(x, (3, 3), stride=(2, 2), padding=(1, 1))
    upstream = torch.randn(4, *y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (mapped,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    for one, gradient in zip(upstream, mapped, strict=True):
        (alone,) = torch.autograd.grad(y, x, one, retain_graph=True)
        torch.testing.assert_close(gradient, alone, rtol=2 * ROUNDING[dtype], atol=1e-6)
