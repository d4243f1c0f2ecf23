"""The operations' references against plain loops in float64, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastmoco.errors import UserError
from fastmoco.ops.infonce import infonce
from fastmoco.ops.pooled_mse import pooled_mse


def unit(rows: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1).to(dtype)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 3), (2, 7, 5), (7, 33, 17), (33, 257, 31)])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 10.0])
def test_infonce_is_its_definition(n: int, k: int, d: int, temperature: float) -> None:
    query, key, bank = unit(n, d), unit(n, d), unit(k, d)
    expected = 0.0
    for i in range(n):
        positive = float(query[i] @ key[i]) / temperature
        terms = [positive, *(float(query[i] @ row) / temperature for row in bank)]
        top = max(terms)
        expected += top + math.log(math.fsum(math.exp(term - top) for term in terms)) - positive
    loss = infonce(query, key, bank, temperature=temperature).item()
    assert loss == pytest.approx(expected / n, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_infonce_of_narrow_inputs_is_done_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    query, key, bank = unit(9, 65), unit(9, 65), unit(301, 65)
    exact = infonce(query, key, bank, temperature=0.2).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = infonce(query.to(dtype), key.to(dtype), bank.to(dtype), temperature=0.2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=tolerance)


def test_infonce_gradients() -> None:
    query, key, bank = unit(4, 6).requires_grad_(), unit(4, 6).requires_grad_(), unit(11, 6)
    assert torch.autograd.gradcheck(lambda q, k: infonce(q, k, bank, temperature=0.3), (query, key))


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
    with pytest.raises(ValueError, match="temperature"):
        infonce(unit(2, 3), unit(2, 3), unit(4, 3), temperature=0.0)
    with pytest.raises(ValueError, match=r"\(K, D\)"):
        infonce(unit(2, 3), unit(2, 3), unit(4, 5), temperature=0.1)
    with pytest.raises(ValueError, match="grid"):
        pooled_mse(torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2), grid=0)
    with pytest.raises(UserError, match="implementation"):
        infonce(unit(2, 3), unit(2, 3), unit(4, 3), temperature=0.1, implementation="nonsense")
