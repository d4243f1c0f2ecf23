"""ops.pooled_mse against its definition in float64: losses and gradients on both sides, by all implementations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from fastmoco.errors import UserError
from fastmoco.losses import StageMSE
from fastmoco.ops import definitions, dispatch
from fastmoco.ops import pooled_mse as module
from fastmoco.ops.pooled_mse import pooled_mse
from parity import OPERATION, relative_error

NATIVE = ["native"] if dispatch.native is not None else []
IMPLEMENTATIONS = ["reference", *NATIVE]
# What computes in float32 refuses float64.
RUNS = [(name, dtype) for name in IMPLEMENTATIONS for dtype in OPERATION if (name, dtype) != ("native", torch.float64)]
# Cells that overlap, are disjoint, repeat; sides that differ; a single cell, pixel or channel; odd channels.
CASES = [
    ((2, 64, 56, 56), 16), ((1, 33, 64, 64), 16), ((2, 5, 8, 8), 16), ((3, 17, 7, 12), 4), ((2, 3, 5, 31), 6),
    ((2, 40, 9, 9), 1), ((3, 7, 1, 1), 1), ((1, 2, 1, 1), 3), ((2, 1, 6, 6), 4), ((1, 19, 4, 4), 4), ((2, 8, 1, 13), 2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


def maps(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two correlated maps, channels-last, in the values that `dtype` can hold."""
    a = torch.randn(shape, dtype=torch.float64)
    pair = a + 0.3, 0.5 * a + torch.randn(shape, dtype=torch.float64)
    return tuple(x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_() for x in pair)


def exact(a: Tensor, b: Tensor, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (z.detach().double().requires_grad_() for z in (a, b))
    loss = definitions.pooled_mse(x, y, grid=grid)
    return loss, *torch.autograd.grad(loss, (x, y))


@pytest.mark.parametrize(
    ("shape", "grid"), [((2, 3, 8, 8), 4), ((1, 5, 7, 5), 3), ((3, 2, 2, 2), 5), ((2, 4, 9, 9), 1), ((2, 1, 1, 1), 1)]
)
def test_the_definition_is_the_mean_over_cells(shape: tuple[int, int, int, int], grid: int) -> None:
    a, b = maps(shape, torch.float64)
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
    assert definitions.pooled_mse(a, b, grid=grid).item() == pytest.approx(expected, rel=1e-12)


def check(a: Tensor, b: Tensor, grid: int, implementation: str) -> None:
    """Loss and both gradients, and how they are laid out.

    The gradient from above makes up for the mean, as a loss scale does, or float16's would be below its least number.
    """
    expected, *gradients = exact(a, b, grid)
    loss = pooled_mse(a, b, grid=grid, implementation=implementation)
    assert loss.shape == () and loss.dtype == torch.promote_types(a.dtype, torch.float32)
    assert relative_error(loss, expected) <= OPERATION[loss.dtype]
    a.grad = b.grad = None
    scale = a.shape[0] * a.shape[1] * grid**2
    (scale * loss).backward()
    for x, gradient in zip((a, b), gradients, strict=True):
        assert x.grad is not None and x.grad.dtype == x.dtype
        assert x.grad.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(x.grad, scale * gradient) <= OPERATION[x.dtype]


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize(("shape", "grid"), CASES)
def test_whole_maps(implementation: str, dtype: torch.dtype, shape: tuple[int, ...], grid: int) -> None:
    check(*maps(shape, dtype), grid, implementation)


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize(("shape", "grid"), CASES)
def test_second_map_pooled_already(implementation: str, dtype: torch.dtype, shape: tuple[int, ...], grid: int) -> None:
    a, b = maps(shape, dtype)
    pooled = adaptive_avg_pool2d(b.detach().double(), grid).to(dtype)
    check(a, pooled.contiguous(memory_format=torch.channels_last).requires_grad_(), grid, implementation)


@settings(max_examples=100)
@given(
    run=st.sampled_from(RUNS), grid=st.integers(1, 20), pooled=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40)),
)  # fmt: skip
def test_any_size(run: tuple[str, torch.dtype], grid: int, pooled: bool, shape: tuple[int, ...]) -> None:
    implementation, dtype = run
    torch.manual_seed(sum(shape))
    a, b = maps(shape, dtype)
    check(a, maps((*shape[:2], grid, grid), dtype)[1] if pooled else b, grid, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_element_of_the_outputs_is_written(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        check(*maps((2, 33, 9, 7), torch.float32), 4, implementation)
        check(*maps((2, 33, 2, 3), torch.bfloat16), 5, implementation)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_memory_format(implementation: str) -> None:
    a, b = maps((2, 6, 9, 7))
    expected = exact(a, b, 4)
    for x in (a.detach().contiguous(), a.detach().mT.contiguous().mT, torch.cat([a.detach()] * 2, dim=1)[:, :6]):
        for y in (b.detach().contiguous(), b.detach().flip(2).flip(2)):
            x, y = x.requires_grad_(), y.requires_grad_()
            loss = pooled_mse(x, y, grid=4, implementation=implementation)
            for actual, want in zip((loss, *torch.autograd.grad(loss, (x, y))), expected, strict=True):
                assert relative_error(actual, want) <= OPERATION[torch.float32]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pooled", [False, True])
def test_one_side_alone_and_none(implementation: str, pooled: bool) -> None:
    a, b = maps((2, 6, 9, 7))
    b = adaptive_avg_pool2d(b.detach(), 4).requires_grad_() if pooled else b
    expected = exact(a, b, 4)
    loss = pooled_mse(a, b.detach(), grid=4, implementation=implementation)
    assert relative_error(torch.autograd.grad(loss, a)[0], expected[1]) <= OPERATION[torch.float32]
    loss = pooled_mse(a.detach(), b, grid=4, implementation=implementation)
    assert relative_error(torch.autograd.grad(loss, b)[0], expected[2]) <= OPERATION[torch.float32]
    assert not pooled_mse(a.detach(), b.detach(), grid=4, implementation=implementation).requires_grad


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dtypes_mix(implementation: str) -> None:
    a, b = maps((2, 6, 9, 7), torch.bfloat16)
    pooled = adaptive_avg_pool2d(b.detach().float(), 4).requires_grad_()
    wider = [pooled.detach().double().requires_grad_()] if implementation == "reference" else []
    for other in (b.detach().float().requires_grad_(), pooled, *wider):
        loss = pooled_mse(a, other, grid=4, implementation=implementation)
        expected = exact(a, other, 4)
        assert loss.dtype == other.dtype
        assert relative_error(loss, expected[0]) <= OPERATION[loss.dtype]
        for x, gradient, want in zip((a, other), torch.autograd.grad(loss, (a, other)), expected[1:], strict=True):
            assert gradient.dtype == x.dtype
            assert relative_error(gradient, want) <= OPERATION[x.dtype]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_backwards_repeat_and_accumulate(implementation: str) -> None:
    a, b = maps((2, 6, 9, 7))
    kept = [x.detach().clone() for x in (a, b)]
    loss = pooled_mse(a, b, grid=4, implementation=implementation)
    loss.backward(retain_graph=True)
    assert a.grad is not None and b.grad is not None
    once = a.grad.clone(), b.grad.clone()
    (2 * loss).backward()
    torch.testing.assert_close((a.grad, b.grad), (3 * once[0], 3 * once[1]))
    assert all(torch.equal(x, copy) for x, copy in zip((a, b), kept, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_maps_are_not_kept_for_the_backward(implementation: str) -> None:
    a, b = maps((2, 6, 9, 7))
    loss = pooled_mse(a, b, grid=4, implementation=implementation)
    expected = torch.autograd.grad(loss, a, retain_graph=True)[0]
    with torch.no_grad():
        a.zero_()
    assert torch.equal(torch.autograd.grad(loss, a)[0], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_and_infinity_reach_the_loss(implementation: str) -> None:
    for value in (math.nan, math.inf):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a, b = (x.detach() for x in maps((1, 3, 5, 5), dtype))
            b[0, 1, 4, 4] = value
            assert not pooled_mse(a, b, grid=2, implementation=implementation).isfinite()


def test_autocast_leaves_the_arithmetic_alone() -> None:
    a, b = maps((2, 6, 9, 7))
    loss = pooled_mse(a, b, grid=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pooled_mse(a, b, grid=4), loss)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("shape", "grid"), [((2, 3, 7, 5), 3), ((1, 1, 2, 1), 3), ((2, 3, 1, 1), 1)])
def test_operations_keep_torchs_contract(implementation: str, pooled: bool, shape: tuple[int, ...], grid: int) -> None:
    a, b = maps(shape)
    b = adaptive_avg_pool2d(b.detach(), grid).requires_grad_() if pooled else b
    torch.library.opcheck(module._pooled_mse.overload, (a, b, grid, implementation))
    difference = torch.randn(shape[0], grid, grid, shape[1])
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(
            module._pooled_mse_backward.overload, (difference, torch.tensor(2.0), *shape[2:], dtype, implementation)
        )


# Dense in another order, with gaps, and every other pixel.
LAYOUTS = [
    lambda x: x.mT.contiguous().mT,
    lambda x: torch.cat([x, x], dim=1)[:, ::2],
    lambda x: x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, ::2, ::2],
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operations_keep_torchs_contract_in_any_layout(implementation: str, layout: Callable[[Tensor], Tensor]) -> None:
    a, b = (x.detach() for x in maps((2, 4, 7, 5)))
    for other in (b, adaptive_avg_pool2d(b, 3)):
        for x, y in ((layout(a), other), (a, layout(other)), (layout(a), layout(other))):
            arguments = (x.requires_grad_(), y.requires_grad_(), 3, implementation)
            torch.library.opcheck(module._pooled_mse.overload, arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_backward_takes_a_difference_in_any_layout(implementation: str) -> None:
    # Large enough for a copy that was freed to be written over.
    difference, dloss = torch.randn(3, 8, 8, 64), torch.tensor(2.0)
    want = module._pooled_mse_backward(difference, dloss, 9, 7, torch.float32, "reference")
    permuted = difference.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for layout in (permuted, difference.transpose(1, 2).contiguous().transpose(1, 2)):
        assert not layout.is_contiguous()
        arguments = (layout, dloss, 9, 7, torch.float32, implementation)
        assert relative_error(module._pooled_mse_backward(*arguments), want) <= OPERATION[torch.float32]
        torch.library.opcheck(module._pooled_mse_backward.overload, arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pooled", [False, True])
def test_a_second_derivative_is_refused(implementation: str, pooled: bool) -> None:
    a, b = maps((2, 6, 9, 7))
    b = adaptive_avg_pool2d(b.detach(), 4).requires_grad_() if pooled else b
    for inputs in ((a, b), (a,), (b,)):
        loss = pooled_mse(a, b, grid=4, implementation=implementation)
        with pytest.raises(RuntimeError, match=r"no second derivative.*definitions\.pooled_mse"):
            torch.autograd.grad(loss**2, inputs, create_graph=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("pooled", [False, True])
def test_compiles_into_one_graph(pooled: bool, backend: str) -> None:
    def step(a: Tensor, b: Tensor) -> Tensor:
        return pooled_mse(a * 2, b, grid=3) * 3

    a, b = maps((2, 3, 7, 5))
    b = adaptive_avg_pool2d(b.detach(), 3).requires_grad_() if pooled else b
    expected = torch.autograd.grad(step(a, b), (a, b))
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(compiled(a, b), (a, b)), expected)


def test_one_compilation_holds_for_maps_of_all_sizes() -> None:
    def step(a: Tensor, b: Tensor) -> Tensor:
        return pooled_mse(a * 2, b, grid=3)

    # Raises where a size that is marked is taken for a constant.
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for height, width in ((8, 9), (11, 7), (16, 5)):
        a, b = maps((2, 3, height, width))
        expected = torch.autograd.grad(step(a, b), (a, b))
        for tensor in (a, b):
            torch._dynamo.mark_dynamic(tensor, (2, 3))
        torch.testing.assert_close(torch.autograd.grad(compiled(a, b), (a, b)), expected)


def test_mistakes_are_named() -> None:
    a = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="grid must be at least 1, not 0"):
        pooled_mse(a, a, grid=0)
    with pytest.raises(ValueError, match=r"pooled, \(N, C, 3, 3\), not \(2, 3, 4, 4\) and \(2, 3, 2, 2\)"):
        pooled_mse(a, a[:, :, :2, :2], grid=3)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        pooled_mse(a[0], a[0], grid=3)
    with pytest.raises(ValueError, match="empty"):
        pooled_mse(a[:0], a[:0], grid=3)
    with pytest.raises(ValueError, match="floating"):
        pooled_mse(a.long(), a, grid=3)
    with pytest.raises(ValueError, match="one device, not cpu and meta"):
        pooled_mse(a, a.to("meta"), grid=3)
    with pytest.raises(UserError, match="implementation"):
        pooled_mse(a, a, grid=3, implementation="nonsense")
    for name in NATIVE:
        with pytest.raises(UserError, match="too narrow for float64"):
            pooled_mse(a.double(), a, grid=3, implementation=name)


class TestStageMSE:
    def test_each_stage_has_its_own_grid_and_takes_pooled_keys(self) -> None:
        shapes = [(2, c, side, side) for c, side in ((4, 16), (8, 8), (16, 4), (32, 2))]
        query, key = ([torch.randn(shape) for shape in shapes] for _ in range(2))
        losses = StageMSE([1, 3, 4], (8, 8, 2, 2), weight=0.25)
        pooled = [adaptive_avg_pool2d(x, grid) for x, grid in zip(key, (8, 8, 2, 2), strict=True)]
        for keys in (key, pooled):
            named = losses(query, keys)
            assert list(named) == ["stage1", "stage3", "stage4"]
            for name, grid in (("stage1", 8), ("stage3", 2), ("stage4", 2)):
                i = int(name[-1]) - 1
                expected = 0.25 * definitions.pooled_mse(query[i].double(), key[i].double(), grid=grid)
                assert named[name].item() == pytest.approx(expected.item(), rel=1e-5)
