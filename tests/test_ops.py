"""The operations' references against plain loops in float64, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from fastmoco.ops.pooled_mse import pooled_mse


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize(
    ("shape", "grid"), [((2, 3, 8, 8), 4), ((1, 5, 7, 5), 3), ((3, 2, 2, 2), 5), ((2, 4, 9, 9), 1), ((2, 1, 1, 1), 1)]
)
def test_pooled_mse_is_its_definition(shape: tuple[int, int, int, int], grid: int) -> None:
    a, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    n, c, h, w = shape
    squares = []
    for i in range(grid):
        for j in range(grid):
            rows = slice(i * h // grid, -(-(i + 1) * h // grid))
            columns = slice(j * w // grid, -(-(j + 1) * w // grid))
            difference = a[:, :, rows, columns].mean(dim=(2, 3)) - b[:, :, rows, columns].mean(dim=(2, 3))
            squares += difference.flatten().square().tolist()
    assert len(squares) == n * c * grid * grid
    expected = math.fsum(squares) / len(squares)
    assert pooled_mse(a, b, grid=grid).item() == pytest.approx(expected, rel=1e-12)


def test_pooled_mse_gradients_reach_both_sides() -> None:
    a, b = (torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, y: pooled_mse(x, y, grid=3), (a, b))


def test_pooled_mse_of_bfloat16_maps_is_done_in_float32() -> None:
    a, b = torch.randn(2, 3, 8, 8).bfloat16(), torch.randn(2, 3, 8, 8).bfloat16()
    loss = pooled_mse(a, b, grid=4)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(pooled_mse(a.double(), b.double(), grid=4).item(), rel=1e-6)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="grid"):
        pooled_mse(torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2), grid=0)
