"""The Triton pooled MSE against its definition in float64: on the GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from fastmoco.kernels.pooled_mse import pooled_mse, pooled_mse_backward
from fastmoco.ops import definitions
from fastmoco.ops.pooled_mse import pooled_mse as operation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Cells that overlap, are disjoint, repeat; sides that differ; a single cell, pixel, channel; more channels than a tile.
CASES = [
    ((1, 5, 56, 56), 16), ((1, 3, 32, 32), 8), ((1, 6, 8, 8), 12), ((3, 17, 7, 12), 4), ((2, 3, 5, 31), 6),
    ((2, 70, 19, 17), 1), ((3, 7, 1, 1), 1), ((1, 2, 1, 1), 3), ((2, 1, 6, 6), 4), ((2, 600, 4, 4), 4),
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("poisoned")


def maps(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a = torch.randn(shape, dtype=torch.float64)
    pair = a + 0.3, 0.5 * a + torch.randn(shape, dtype=torch.float64)
    return tuple(x.to(dtype).contiguous(memory_format=torch.channels_last) for x in pair)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "grid"), CASES)
def test_loss_difference_and_gradient(
    shape: tuple[int, int, int, int], grid: int, dtype: torch.dtype, pooled: bool
) -> None:
    if shape[0] == 1 and dtype != torch.float32 and DEVICE == "cpu":
        grid = min(grid, 3)  # The interpreter takes a second for a hundred programs.
    torch.manual_seed(11)
    a, b = maps(shape, dtype)
    if pooled:
        b = adaptive_avg_pool2d(b.float(), grid)
    loss, difference = pooled_mse(a.to(DEVICE), b.to(DEVICE), grid)
    da = pooled_mse_backward(difference, torch.tensor(3.0, device=DEVICE), *shape[2:], dtype)

    exact = a.double().requires_grad_()
    expected = definitions.pooled_mse(exact, b.double(), grid=grid)
    (wanted,) = torch.autograd.grad(3 * expected, exact)
    pools = (adaptive_avg_pool2d(x.double(), grid) for x in (a, b))
    apart = torch.sub(*pools).permute(0, 2, 3, 1)
    assert loss.dtype == difference.dtype == torch.float32 and da.dtype == dtype
    assert da.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(loss.cpu().double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(difference.cpu().double(), apart, rtol=0, atol=1e-6)
    # Rounded once to its own dtype, after float32 sums; the interpreter cuts bfloat16 off instead.
    rounding = torch.finfo(dtype).eps * (1.0 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.5)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    close = {"rtol": rounding + 1e-6, "atol": 1e-6 * wanted.abs().max().item() + least}
    torch.testing.assert_close(da.cpu().double(), wanted, **close)


def test_maps_of_another_memory_format_are_copied() -> None:
    torch.manual_seed(12)
    a, b = torch.randn(2, 3, 6, 5), torch.randn(2, 6, 5, 3).permute(0, 3, 1, 2)
    loss, _ = pooled_mse(a.to(DEVICE), b.to(DEVICE), 2)
    expected = definitions.pooled_mse(a.double(), b.double(), grid=2)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-6, atol=0)


def test_a_nan_reaches_the_loss_and_only_its_own_cells_gradient() -> None:
    a, b = maps((1, 2, 4, 4), torch.float32)
    a[0, 1, 0, 0] = torch.nan
    loss, difference = pooled_mse(a.to(DEVICE), b.to(DEVICE), 2)
    da = pooled_mse_backward(difference, torch.ones((), device=DEVICE), 4, 4, torch.float32)
    assert loss.isnan()
    assert da.isnan().nonzero().tolist() == [[0, 1, y, x] for y in range(2) for x in range(2)]


def test_the_same_bits_every_time() -> None:
    a, b = (x.to(DEVICE) for x in maps((2, 40, 9, 9), torch.float32))
    first, second = pooled_mse(a, b, 4), pooled_mse(a, b, 4)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_the_operation_reaches_both_sides() -> None:
    torch.manual_seed(13)
    inputs = [x.to(DEVICE).requires_grad_() for x in maps((2, 6, 7, 5), torch.float32)]
    gradients = torch.autograd.grad(operation(*inputs, grid=3, implementation="triton"), inputs)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(definitions.pooled_mse(*exact, grid=3), exact)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-8)
