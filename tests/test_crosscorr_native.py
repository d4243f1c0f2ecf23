"""The C++ passes of ops.crosscorr by themselves, and what their bindings refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmoco.ops import crosscorr as module
from fastmoco.ops import dispatch
from parity import OPERATION, relative_error

pytestmark = pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """Correlated and off-centre."""
    z1 = 3 * torch.randn(shape) + 1
    return z1, 0.5 * z1 + torch.randn(shape)


@pytest.mark.parametrize(("s", "n", "d"), [(1, 2, 1), (2, 5, 255), (1, 3, 256), (3, 90, 1025)])
def test_passes_do_not_depend_on_the_number_of_threads_and_write_everything(s: int, n: int, d: int) -> None:
    z1, z2 = pair(s, n, d)
    product = z1 - z1.mean(dim=1, keepdim=True)
    results = []
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # Fills torch.empty with NaN.
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            s1, s2, r1, r2, diagonal = module._native_standardize(z1, z2)
            eye = torch.eye(n).expand(s, n, n).contiguous()
            gradient = module._native_gradient(eye, product, 2.0, s2, diagonal, s1, r1)
            results.append([s1, s2, r1, r2, diagonal, gradient])
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))
    for actual, want in zip(results[0], module._standardize(z1.double(), z2.double()), strict=False):
        assert relative_error(actual, want) <= OPERATION[torch.float32]


def test_means_far_from_zero_and_long_batches_lose_nothing() -> None:
    z1, z2 = (z + 50 for z in pair(1, 5000, 3))
    for actual, want in zip(
        module._native_standardize(z1, z2), module._standardize(z1.double(), z2.double()), strict=True
    ):
        assert relative_error(actual, want) <= OPERATION[torch.float32]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z1": 0}, "null address"),
        ({"diagonal": 3}, "not aligned"),
        ({"batch": 0}, "sizes must be at least 1"),
        ({"threads": 0}, "threads"),
    ],
)
def test_bindings_refuse(changes: dict[str, object], message: str) -> None:
    memory = torch.zeros(7, 4)
    names = ("z1", "z2", "s1", "s2", "r1", "r2", "diagonal")
    arguments = {name: row.data_ptr() for name, row in zip(names, memory, strict=True)}
    sizes = {"epsilon": 1e-5, "stages": 1, "batch": 2, "features": 2, "threads": 1}
    assert dispatch.native is not None
    with pytest.raises(ValueError, match=message):
        dispatch.native.crosscorr_standardize(**(arguments | sizes | changes))
    names = ("product", "other", "weight", "s", "r")
    arguments = {name: row.data_ptr() for name, row in zip(names, memory, strict=False)}
    with pytest.raises(ValueError, match=message):
        renamed = {{"z1": "product", "diagonal": "r"}.get(name, name): value for name, value in changes.items()}
        dispatch.native.crosscorr_through_standardize(
            **(arguments | {"alpha": 1.0} | {k: v for k, v in sizes.items() if k != "epsilon"} | renamed)
        )
