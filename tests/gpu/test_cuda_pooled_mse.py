"""The pooled mean squared error on a GPU: loss and gradients against the float64 definition."""

import pytest
import torch
from torch import Tensor

from cuda_checks import TOLERANCE, assert_near, assert_peak_below, assert_same_bits, no_synchronisation, randn
from fastmoco.ops import definitions
from fastmoco.ops.pooled_mse import pooled_mse

pytestmark = pytest.mark.gpu
OPERATION = "pooled_mse"

# Shape and grid: odd everything and not square; cells that overlap, are disjoint, repeat; one cell; one number.
CASES = [
    ((2, 3, 5, 7), 4),
    ((2, 64, 56, 56), 16),
    ((2, 33, 64, 64), 16),
    ((3, 24, 8, 8), 16),
    ((5, 130, 7, 7), 1),
    ((1, 1, 1, 1), 1),
    ((2, 2048, 7, 7), 4),
]


def maps(shape: tuple[int, ...], dtype: torch.dtype, *, channels_last: bool = True) -> Tensor:
    n, c, h, w = shape
    if channels_last:
        return randn(n, h, w, c, dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
    return randn(n, c, h, w, dtype=dtype).requires_grad_()


def check(a: Tensor, b: Tensor, grid: int, implementation: str) -> None:
    exact = [tensor.detach().double().requires_grad_() for tensor in (a, b)]
    want = definitions.pooled_mse(*exact, grid=grid)
    # As a loss scaler would: the gradients of a mean over many are below float16's smallest.
    scale = b.shape[0] * b.shape[1] * grid * grid
    wanted = torch.autograd.grad(scale * want, exact)
    got = pooled_mse(a, b, grid=grid, implementation=implementation)
    gradients = torch.autograd.grad(scale * got, [a, b])
    assert got.dtype == torch.float32
    assert_near(got, want.detach(), TOLERANCE[torch.float32], "loss")
    for name, tensor, gradient, right in zip(("da", "db"), (a, b), gradients, wanted, strict=True):
        assert gradient.dtype == tensor.dtype
        assert_near(gradient, right, TOLERANCE[tensor.dtype], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "grid"), CASES, ids=str)
def test_it_is_the_definition(
    implementation: str, shape: tuple[int, int, int, int], grid: int, dtype: torch.dtype
) -> None:
    check(maps(shape, dtype), maps(shape, dtype), grid, implementation)


@pytest.mark.parametrize(("shape", "grid"), CASES, ids=str)
def test_the_other_side_may_be_pooled_already(implementation: str, shape: tuple[int, int, int, int], grid: int) -> None:
    pooled = randn(*shape[:2], grid, grid).requires_grad_()
    check(maps(shape, torch.bfloat16), pooled, grid, implementation)


def test_any_memory_format(implementation: str) -> None:
    shape = (2, 5, 14, 14)
    check(maps(shape, torch.float32, channels_last=False), maps(shape, torch.float32), 4, implementation)


def test_the_bits_are_the_same_every_time(implementation: str) -> None:
    a, b = (maps((8, 256, 56, 56), torch.bfloat16) for _ in range(2))

    def run() -> list[Tensor]:
        loss = pooled_mse(a, b, grid=16, implementation=implementation)
        return [loss.detach(), *torch.autograd.grad(loss, [a, b])]

    assert_same_bits(run)


def test_the_host_does_not_wait(implementation: str) -> None:
    a, b = (maps((2, 64, 28, 28), torch.bfloat16) for _ in range(2))
    for attempt in range(2):  # the first compiles
        with no_synchronisation() if attempt else torch.enable_grad():
            torch.autograd.grad(pooled_mse(a, b, grid=16, implementation=implementation), a)


def test_the_maps_are_not_copied(implementation: str) -> None:
    """One gradient of a map's size and the pooled difference, no third thing as large; the reference widens maps."""
    a, b = (maps((16, 256, 56, 56), torch.bfloat16) for _ in range(2))
    # As the keys' maps are: else their gradient is written too.
    b.requires_grad_(False)
    size, pooled = a.nbytes, 16 * 256 * 16 * 16 * 4
    limit = (size if implementation != "reference" else 6 * size) + 2 * pooled + (1 << 20)
    assert_peak_below(limit, lambda: torch.autograd.grad(pooled_mse(a, b, grid=16, implementation=implementation), a))
