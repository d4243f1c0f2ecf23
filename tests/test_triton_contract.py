"""What torch's autograd, autocast and compiler expect of an operation, of the Triton ones, and sizes that nobody chose.

On a GPU, or in Triton's interpreter without one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastmoco.ops import crosscorr as crosscorr_module
from fastmoco.ops import definitions
from fastmoco.ops import infonce as infonce_module
from fastmoco.ops import pooled_mse as pooled_mse_module
from fastmoco.ops.crosscorr import crosscorr
from fastmoco.ops.infonce import infonce
from fastmoco.ops.pooled_mse import pooled_mse
from parity import OPERATION, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Case:
    """An operation on tensors of these shapes, all of which have a gradient."""

    operation: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any]

    def inputs(self) -> list[Tensor]:
        torch.manual_seed(31)
        return [randn(*shape).requires_grad_() for shape in self.shapes]

    def loss(self, *inputs: Tensor) -> Tensor:
        return self.operation(*inputs, **self.options, implementation="triton").sum()


CASES = {
    "infonce": Case(infonce, ((9, 10), (9, 10), (50, 10)), {"temperature": 0.3, "normalized": False}),
    "crosscorr": Case(crosscorr, ((8, 13),) * 2, {"off_diagonal": 0.5, "form": "gram"}),
    "crosscorr of stages": Case(crosscorr, ((2, 8, 5),) * 2, {"form": "direct"}),
    "pooled_mse": Case(pooled_mse, ((2, 6, 7, 5),) * 2, {"grid": 3}),
    "pooled_mse, pooled": Case(pooled_mse, ((2, 6, 7, 5), (2, 6, 3, 3)), {"grid": 3}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def test_backwards_repeat_and_accumulate(case: Case) -> None:
    inputs = case.inputs()
    kept = [x.detach().clone() for x in inputs]
    once = gradients(case.loss(*inputs), inputs)
    loss = case.loss(*inputs)
    for _ in range(2):
        loss.backward(retain_graph=True)
    (3 * case.loss(*inputs)).backward()
    torch.testing.assert_close([x.grad for x in inputs], [5 * gradient for gradient in once])
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_arithmetic_alone(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs()
    loss = case.loss(*inputs)
    with torch.autocast(DEVICE, dtype=dtype):
        inside = case.loss(*inputs)
    assert torch.equal(inside, loss)
    for got, want in zip(gradients(inside, inputs), gradients(loss, inputs), strict=True):
        assert torch.equal(got, want)


def test_compiles_into_one_graph(case: Case) -> None:
    def step(*inputs: Tensor) -> Tensor:
        return case.loss(inputs[0] * 2, *inputs[1:]) * 3

    inputs = case.inputs()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled(*inputs), inputs), gradients(step(*inputs), inputs))


@pytest.mark.parametrize("key_gradient", [True, False])
@pytest.mark.parametrize("skips", [0, 2])
def test_infonce_passes_opcheck(key_gradient: bool, skips: int) -> None:
    query, key, bank = randn(5, 6).requires_grad_(), randn(5, 6).requires_grad_(key_gradient), randn(11, 6)
    skip = torch.randint(-1, 11, (5, skips), device=DEVICE) if skips else None
    arguments = (query, key, bank, skip, 0.2, 0.1, False, False, key_gradient, "triton")
    torch.library.opcheck(infonce_module._infonce.overload, arguments)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("shape", [(2, 5, 7), (5, 7)])
def test_crosscorr_passes_opcheck(shape: tuple[int, ...], form: str, wanted: bool) -> None:
    z1, z2 = (randn(*shape).requires_grad_(wanted) for _ in range(2))
    torch.library.opcheck(crosscorr_module._crosscorr.overload, (z1, z2, 0.5, 1.0, form, wanted, "triton"))


@pytest.mark.parametrize("side", [(5, 4), (2, 2)])
def test_pooled_mse_passes_opcheck(side: tuple[int, int]) -> None:
    """Of two maps, and of one with what is pooled already."""
    a, b = randn(2, 3, 5, 4).requires_grad_(), randn(2, 3, *side).requires_grad_()
    torch.library.opcheck(pooled_mse_module._pooled_mse.overload, (a, b, 2, "triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_backward_of_pooled_mse_passes_opcheck(dtype: torch.dtype) -> None:
    arguments = (randn(2, 2, 2, 3), torch.tensor(2.0, device=DEVICE), 5, 4, dtype, "triton")
    torch.library.opcheck(pooled_mse_module._pooled_mse_backward.overload, arguments)


def check_crosscorr(s: int, n: int, d: int, form: str | None, off_diagonal: float) -> None:
    z = torch.randn(s, n, d)
    inputs = [x.to(DEVICE).requires_grad_() for x in (2 * z + 1, 0.5 * z + torch.randn(s, n, d) - 2)]
    losses = crosscorr(*inputs, off_diagonal=off_diagonal, form=form, implementation="triton")
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    pairs = zip(*exact, strict=True)
    expected = torch.stack([definitions.crosscorr(*pair, off_diagonal=off_diagonal) for pair in pairs])
    # Where nothing off the diagonal counts and all is correlated, the loss is a difference from C_ii = 1.
    bound = OPERATION[torch.float32] * max(1, d / expected.max().item())
    assert relative_error(losses, expected) <= bound
    # A column's mean is rounded in proportion to its elements, and counts in units of its deviation.
    least = min(x.detach().std(dim=1, correction=0).min().item() for x in exact)
    bound = OPERATION[torch.float32] + torch.finfo(torch.float32).eps * max(x.abs().max().item() for x in exact) / least
    for got, want in zip(gradients(losses.sum(), inputs), gradients(expected.sum(), exact), strict=True):
        # Two images standardise to +1 and -1 whatever they are: what is left of a gradient is all rounding.
        assert got.isfinite().all() if n == 2 else relative_error(got, want) <= bound


@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("n", [2, 7, 32, 33, 256])
@pytest.mark.usefixtures("poisoned")
def test_crosscorr_of_every_batch_size(n: int, form: str) -> None:
    torch.manual_seed(n)
    check_crosscorr(2, n, 37, form, 0.005)


def check_infonce(n: int, d: int, k: int, skips: int, temperature: float, normalized: bool) -> None:
    length = 1.0 if normalized else 3.0
    query, key, bank = (normalize(torch.randn(rows, d), dim=1) for rows in (n, n, k))
    inputs = [(x * length).to(DEVICE).requires_grad_() for x in (query, key)]
    skip = torch.randint(-1, k, (n, skips)) if skips and k else None
    options = {"temperature": temperature, "normalized": normalized}
    there = None if skip is None else skip.to(DEVICE)
    loss = infonce(*inputs, bank.to(DEVICE), **options, skip=there, implementation="triton")
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    expected, _ = definitions.infonce(*exact, bank.double(), **options, skip=skip)
    # A similarity of unit vectors is rounded by so much; the exponential and the gradients carry it on.
    off = 2.0**-21
    assert abs(loss.item() - expected.item()) <= 2 * off / temperature + 1e-6
    bound = 2 * off * (1 + 2 / temperature) / (temperature * n * length)
    for got, want in zip(gradients(loss, inputs), gradients(expected, exact), strict=True):
        assert ((got.cpu().double() - want).abs() <= bound + 1e-6 * want.abs().max()).all()


def check_pooled_mse(shape: tuple[int, int, int, int], grid: int, pooled: bool) -> None:
    other = (*shape[:2], grid, grid) if pooled else shape
    inputs = [randn(*size).requires_grad_() for size in (shape, other)]
    loss = pooled_mse(*inputs, grid=grid, implementation="triton")
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    expected = definitions.pooled_mse(*exact, grid=grid)
    assert relative_error(loss, expected) <= OPERATION[torch.float32]
    for got, want in zip(gradients(loss, inputs), gradients(expected, exact), strict=True):
        assert relative_error(got, want) <= OPERATION[torch.float32]


# A machine that only runs what needs its GPU may have no hypothesis.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import given, settings
    from hypothesis import strategies as st

    @settings(max_examples=24)
    @given(
        n=st.integers(1, 40), d=st.integers(1, 70), k=st.integers(0, 150), skips=st.integers(0, 2),
        temperature=st.floats(0.03, 10), normalized=st.booleans(),
    )  # fmt: skip
    def test_infonce_of_any_size(n: int, d: int, k: int, skips: int, temperature: float, normalized: bool) -> None:
        torch.manual_seed(n * d + k)
        check_infonce(n, d, k, skips, temperature, normalized)

    @settings(max_examples=24)
    @given(
        s=st.integers(1, 2), n=st.integers(4, 40), d=st.integers(1, 70),
        form=st.sampled_from([None, "gram", "direct"]),
        off_diagonal=st.sampled_from([0.0, 0.005, 0.5, 1.0, 2.0]),
    )  # fmt: skip
    def test_crosscorr_of_any_size(s: int, n: int, d: int, form: str | None, off_diagonal: float) -> None:
        torch.manual_seed(n * d + s)
        check_crosscorr(s, n, d, form, off_diagonal)

    @settings(max_examples=24)
    @given(
        shape=st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20)),
        grid=st.integers(1, 6), pooled=st.booleans(),
    )  # fmt: skip
    def test_pooled_mse_of_any_size(shape: tuple[int, int, int, int], grid: int, pooled: bool) -> None:
        torch.manual_seed(sum(shape))
        check_pooled_mse(shape, grid, pooled)
