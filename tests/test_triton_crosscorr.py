"""The Triton cross-correlation against its definition in float64: on a GPU, or in Triton's interpreter without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmoco.ops import definitions
from fastmoco.ops.crosscorr import crosscorr
from parity import OPERATION, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where it should round.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]

pytestmark = pytest.mark.usefixtures("poisoned")


def pair(stages: int, n: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Correlated views with means and deviations of their own."""
    z1 = torch.randn(stages, n, d, dtype=torch.float64)
    z2 = 0.6 * z1 + 0.8 * torch.randn_like(z1)
    return [(3 * z1 + 1).to(dtype), (0.5 * z2 - 0.5).to(dtype)]


@pytest.mark.parametrize("off_diagonal", [1.0, 0.005])
@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("dtype", DTYPES)
# Primes; one row and column over a tile; several tiles of rows and more rows than columns.
@pytest.mark.parametrize(("stages", "n", "d"), [(2, 7, 5), (1, 65, 33), (2, 130, 70), (3, 16, 97)])
def test_loss_and_gradients(stages: int, n: int, d: int, dtype: torch.dtype, form: str, off_diagonal: float) -> None:
    torch.manual_seed(n)
    views = pair(stages, n, d, dtype)
    inputs = [z.to(DEVICE).requires_grad_() for z in views]
    options = {"off_diagonal": off_diagonal, "scale": 1 / 32}
    loss = crosscorr(*inputs, **options, form=form, implementation="triton")
    weights = torch.arange(1.0, stages + 1)
    gradients = torch.autograd.grad((loss * weights.to(DEVICE)).sum(), inputs)

    exact = [z.double().requires_grad_() for z in views]
    expected = torch.stack([definitions.crosscorr(a, b, **options) for a, b in zip(*exact, strict=True)])
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) <= OPERATION[torch.float32]
    for got, want in zip(gradients, wanted, strict=True):
        assert got.dtype == dtype
        # A narrow gradient is rounded on top of the arithmetic's error.
        assert relative_error(got, want) <= OPERATION[torch.float32] + (dtype != torch.float32) * OPERATION[dtype]


def test_a_column_that_never_varies_adds_its_one() -> None:
    z1, z2 = pair(1, 9, 6, torch.float32)
    z1[..., 2] = 5.0
    for form in ("gram", "direct"):
        inputs = [z[0].to(DEVICE).requires_grad_() for z in (z1, z2)]
        loss = crosscorr(*inputs, form=form, implementation="triton")
        assert relative_error(loss, definitions.crosscorr(z1[0].double(), z2[0].double())) <= OPERATION[torch.float32]
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, inputs))


def test_a_mean_far_from_zero_does_not_cost_the_variance() -> None:
    z1, z2 = pair(1, 33, 12, torch.float64)
    far = [(z / z.std() + 1000).float() for z in (z1, z2)]
    loss = crosscorr(*(z.to(DEVICE) for z in far), implementation="triton")
    assert relative_error(loss[0], definitions.crosscorr(*(z[0].double() for z in far))) <= 1e-4


def test_views_with_gaps_and_the_same_bits_every_time() -> None:
    torch.manual_seed(3)
    z1, z2 = (torch.randn(10, 20, device=DEVICE).T[:, ::2].requires_grad_() for _ in range(2))
    results = []
    for _ in range(2):
        loss = crosscorr(z1, z2, implementation="triton")
        results.append([loss, *torch.autograd.grad(loss, [z1, z2])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    exact = definitions.crosscorr(z1.detach().cpu().double(), z2.detach().cpu().double())
    assert relative_error(loss, exact) <= OPERATION[torch.float32]


def test_without_gradients_there_are_none() -> None:
    z1, z2 = (z.to(DEVICE) for z in pair(2, 5, 8, torch.float32))
    assert not crosscorr(z1, z2, implementation="triton").requires_grad
