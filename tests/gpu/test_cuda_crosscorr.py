"""The cross-correlation loss on a GPU: losses and both gradients against the float64 definition."""

import pytest
import torch
from torch import Tensor

from cuda_checks import TOLERANCE, assert_near, assert_peak_below, assert_same_bits, no_synchronisation, randn
from fastmoco.ops import definitions
from fastmoco.ops.crosscorr import crosscorr

pytestmark = pytest.mark.gpu
OPERATION = "crosscorr"

# Near the least batch (two images standardise to +-1, whatever they are: no gradient); odd everything; the paper's four
# stages; more images than features.
SIZES = [(1, 4, 5), (2, 67, 131), (4, 32, 2048), (1, 300, 100)]


def inputs(s: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Related views, far from zero mean and unit variance, as projections are before they are standardised."""
    z1 = randn(s, n, d)
    z2 = z1 + randn(s, n, d)
    return [(3 * z + 2).to(dtype).requires_grad_() for z in (z1, z2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("off_diagonal", [1.0, 0.005])
@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_definition(
    implementation: str, size: tuple[int, int, int], form: str, off_diagonal: float, dtype: torch.dtype
) -> None:
    z1, z2 = inputs(*size, dtype)
    exact = [z.detach().double().requires_grad_() for z in (z1, z2)]
    pairs = zip(*exact, strict=True)
    want = torch.stack([definitions.crosscorr(a, b, off_diagonal=off_diagonal, scale=1 / 32) for a, b in pairs])
    # Different weights of the stages, so that no gradient reaches another's.
    weights = torch.arange(1.0, len(want) + 1, device=want.device, dtype=torch.float64)
    wanted = torch.autograd.grad((weights * want).sum(), exact)
    got = crosscorr(z1, z2, off_diagonal=off_diagonal, scale=1 / 32, form=form, implementation=implementation)
    gradients = torch.autograd.grad((weights * got).sum(), [z1, z2])
    # A variance over four images loses a digit in the inputs' own precision.
    tolerance = TOLERANCE[dtype] * (10 if dtype == torch.float32 else 1)
    assert_near(got, want.detach(), TOLERANCE[torch.float32] if dtype == torch.bfloat16 else tolerance, "loss")
    for name, gradient, right in zip(("dz1", "dz2"), gradients, wanted, strict=True):
        assert_near(gradient, right, tolerance, name)


@pytest.mark.parametrize("form", ["gram", "direct"])
def test_the_bits_are_the_same_every_time(implementation: str, form: str) -> None:
    z1, z2 = inputs(4, 64, 512)

    def run() -> list[Tensor]:
        losses = crosscorr(z1, z2, form=form, implementation=implementation)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), [z1, z2])]

    assert_same_bits(run)


def test_the_host_does_not_wait(implementation: str) -> None:
    z1, z2 = inputs(4, 32, 256)
    for attempt in range(2):  # the first compiles
        with no_synchronisation() if attempt else torch.enable_grad():
            torch.autograd.grad(crosscorr(z1, z2, implementation=implementation).sum(), [z1, z2])


def test_no_matrix_of_d_times_d_is_made(implementation: str) -> None:
    n, d = 32, 8192
    z1, z2 = inputs(1, n, d)
    assert_peak_below(
        d * d * 4 // 8, lambda: torch.autograd.grad(crosscorr(z1, z2, implementation=implementation).sum(), [z1, z2])
    )
