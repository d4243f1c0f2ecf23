"""The C++ implementation of ops.pooled_mse by itself: conversions, threads, and what its bindings refuse."""

from __future__ import annotations

import pytest
import torch

from fastmoco.ops import dispatch
from fastmoco.ops import pooled_mse as module
from fastmoco.ops.pooled_mse import pooled_mse

pytestmark = pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_converted_as_torch_does(dtype: torch.dtype) -> None:
    """Read: through a pooled map that is the map. Written: through the gradient of a map that is its pooled one."""
    numbers = torch.arange(-(1 << 15), 1 << 15).short().view(dtype).view(1, -1, 1, 1)
    difference = module._native(numbers, torch.zeros_like(numbers), 1)[1]
    assert torch.equal(difference.view(torch.int32).flatten()[numbers.isfinite().flatten()],
                       numbers.float().view(torch.int32).flatten()[numbers.isfinite().flatten()])  # fmt: skip
    torch.testing.assert_close(difference.flatten(), numbers.float().flatten(), rtol=0, atol=0, equal_nan=True)

    # Between each number and the next: a little less than half way, half way and a little more.
    steps = numbers.float().flatten().view(torch.int32)[:, None]
    half = 1 << (15 if dtype == torch.bfloat16 else 12)
    wide = (steps + torch.tensor([0, half - 1, half, half + 1], dtype=torch.int32)).view(torch.float32)
    wide = torch.cat([wide.flatten(), torch.tensor([65519.0, 65520.0, 1e38, 2.0**-25, 2.0**-25 * 1.0001, 1e-45])])
    wide = torch.cat([wide, -wide]).view(1, 1, 1, -1)
    unit = torch.tensor(wide.numel() / 2)
    written = module._native_backward(wide, unit, 1, 1, dtype).flatten()
    assert torch.equal(written.isnan(), wide.flatten().isnan())
    torch.testing.assert_close(written, wide.flatten().to(dtype), rtol=0, atol=0, equal_nan=True)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    a, b = (torch.randn(3, 33, 11, 9, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 3, 7, 64):
            torch.set_num_threads(threads)
            loss = pooled_mse(a, b, grid=4, implementation="native")
            results.append((loss, *torch.autograd.grad(loss, (a, b))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


class TestBindings:
    """What the C++ module refuses by itself, whoever calls it."""

    SIZES = {"batch": 1, "height": 2, "width": 2, "channels": 1, "grid": 1, "dtype": "float32", "threads": 1}  # noqa: RUF012

    def forward(self, **changes: object) -> None:
        a, b, difference = torch.zeros(4), torch.ones(4), torch.zeros(1)
        addresses = {"a": a.data_ptr(), "b": b.data_ptr(), "pooled": 0, "difference": difference.data_ptr()}
        assert dispatch.native is not None
        dispatch.native.pooled_mse_forward(**(addresses | self.SIZES | changes))

    def backward(self, **changes: object) -> None:
        difference, da = torch.zeros(1), torch.zeros(4)
        addresses = {"difference": difference.data_ptr(), "da": da.data_ptr(), "scale": 1.0}
        assert dispatch.native is not None
        dispatch.native.pooled_mse_backward(**(addresses | self.SIZES | changes))

    @pytest.mark.parametrize("call", ["forward", "backward"])
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"difference": 0}, "null address"),
            ({"difference": 3}, "not aligned"),
            ({"grid": 0}, "sizes must be at least 1"),
            ({"batch": 0}, "sizes must be at least 1"),
            ({"dtype": "float64"}, "dtype must be float32, bfloat16 or float16, not float64"),
            ({"threads": 0}, "threads"),
        ],
    )
    def test_refuses(self, call: str, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            getattr(self, call)(**changes)

    @pytest.mark.parametrize("changes", [{"b": 0}, {"pooled": 8}])
    def test_refuses_both_and_neither_second_map(self, changes: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="address of b or of pooled"):
            self.forward(**changes)
