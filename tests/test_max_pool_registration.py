"""Max pooling as torch's dispatcher and compiler know it, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.ops import dispatch
from fastmoco.ops.max_pool import max_pool

BUILT = pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
NATIVE = pytest.param("native", marks=BUILT)


def image(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_registration(dtype: torch.dtype, implementation: str) -> None:
    x = image((2, 3, 5, 4), dtype).requires_grad_()
    windows = ((3, 2), (2, 1), (1, 0))
    torch.library.opcheck(torch.ops.fastmoco.max_pool.default, (x, *windows, True, implementation))
    torch.library.opcheck(torch.ops.fastmoco.max_pool.default, (x.detach(), *windows, False, implementation))
    y, index = torch.ops.fastmoco.max_pool.default(x.detach(), *windows, True, implementation)
    back = (torch.ones_like(y), index, (2, 3, 5, 4), *windows, implementation)
    torch.library.opcheck(torch.ops.fastmoco.max_pool_backward.default, back)


def test_an_operation_without_an_index_has_no_backward_rather_than_a_wrong_one() -> None:
    x = image((2, 3, 5, 4), torch.float32).requires_grad_()
    y, _ = torch.ops.fastmoco.max_pool.default(x, (2, 2), (2, 2), (0, 0), False, None)
    with pytest.raises(RuntimeError, match="no gradient would be asked for"):
        y.sum().backward()


def test_compiles_whole_and_for_all_sizes() -> None:
    def function(x: Tensor) -> Tensor:
        return max_pool(x, (3, 3), stride=(2, 2), padding=(1, 1)).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in [(2, 3, 5, 4), (3, 5, 7, 6)]:
        x = image(shape, torch.float32).requires_grad_()
        plain, other = (torch.autograd.grad(run(x), x)[0] for run in (function, compiled))
        assert torch.equal(plain, other)


def test_transforms_are_refused_rather_than_given_no_derivative() -> None:
    x = image((2, 3, 5, 4), torch.float32)
    with pytest.raises(RuntimeError, match="no derivatives for torch"):
        torch.func.jvp(lambda x: max_pool(x, (2, 2), stride=(2, 2)).sum(), (x,), (x,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, r"x must be a floating \(N, C, H, W\)"),
        ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.long)}, "floating"),
        ({"kernel": (5, 3)}, r"a kernel of \(5, 3\) does not fit"),
        ({"x": torch.zeros(1, 3, 0, 4), "padding": (1, 1), "kernel": (2, 2)}, "does not fit"),
        ({"kernel": (16, 16)}, "more than 255 places"),
        ({"padding": (2, 0)}, "at most half of the kernel"),
        ({"kernel": (3, 0)}, "at least 1"),
        ({"stride": (0, 1)}, "at least 1"),
        ({"padding": (-1, 0)}, "padding .* at least 0"),
        ({"kernel": (3, 3, 3)}, "two numbers each"),
        ({"kernel": 3}, "two numbers each"),
        ({"padding": (1,)}, "two numbers each"),
    ],
)
def test_refuses(changes: dict[str, object], message: str) -> None:
    given = {"x": torch.zeros(1, 3, 4, 4), "kernel": (3, 3), "stride": (2, 2)} | changes
    with pytest.raises(ValueError, match=message):
        max_pool(**given)  # type: ignore[arg-type]


@BUILT
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 0}, "null address"),
        ({"index": 0}, "null address"),
        ({"kernel": (3, 4)}, "larger than the padded map"),
        ({"map": (1, 0, 3, 1), "padding": (0, 1)}, "larger than the padded map"),
        ({"kernel": (1, 1), "padding": (0, 1)}, "at most half"),
        ({"kernel": (16, 16)}, "255 taps at most"),
        ({"kernel": (2**62, 8)}, "255 taps at most"),
        ({"kernel": (0, 1)}, "at least 1"),
        ({"stride": (1, 0)}, "at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"dtype": "float16"}, "dtype must be bfloat16 or float32, not float16"),
    ],
)
def test_bindings_refuse(changes: dict[str, Any], message: str) -> None:
    x, y, index = torch.zeros(1, 2, 3, 1), torch.zeros(1, 2, 2, 1), torch.zeros(1, 2, 2, 1, dtype=torch.uint8)
    sizes = {"map": (1, 2, 3, 1), "kernel": (1, 2), "stride": (1, 1), "padding": (0, 0), "threads": 1}
    given = {"x": x.data_ptr(), "y": y.data_ptr(), "index": index.data_ptr()} | sizes | {"dtype": "float32"} | changes
    assert dispatch.native is not None
    if "index" not in changes:
        with pytest.raises(ValueError, match=message):
            dispatch.native.max_pool(**given)
    given["dx"], given["dy"] = given.pop("x"), given.pop("y")
    with pytest.raises(ValueError, match=message):
        dispatch.native.max_pool_backward(**given)
