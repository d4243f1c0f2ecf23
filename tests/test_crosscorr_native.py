"""The C++ passes of ops.crosscorr by themselves, and what their bindings refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fastmoco.ops import crosscorr as module
from fastmoco.ops import crosscorr_forms, definitions, dispatch
from parity import OPERATION, relative_error

pytestmark = pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """Correlated and off-centre."""
    z1 = 3 * torch.randn(shape) + 1
    return z1, 0.5 * z1 + torch.randn(shape)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, and the number of threads is as before afterwards."""
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("s", "n", "d"), [(1, 2, 1), (2, 5, 255), (1, 3, 256), (3, 90, 1025)])
def test_passes_do_not_depend_on_the_number_of_threads_and_write_everything(s: int, n: int, d: int) -> None:
    z1, z2 = pair(s, n, d)
    product = z1 - z1.mean(dim=1, keepdim=True)
    results = []
    with poisoned_memory():
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            s1, s2, r1, r2, diagonal = module._native_standardize(z1, z2)
            eye = torch.eye(n).expand(s, n, n).contiguous()
            gradient = module._native_gradient(eye, product, 2.0, s2, diagonal, s1, r1)
            results.append([s1, s2, r1, r2, diagonal, gradient])
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))
    for actual, want in zip(results[0], crosscorr_forms._standardize(z1.double(), z2.double()), strict=False):
        assert relative_error(actual, want) <= OPERATION[torch.float32]


def test_means_far_from_zero_and_long_batches_lose_nothing() -> None:
    z1, z2 = (z + 50 for z in pair(1, 5000, 3))
    for actual, want in zip(
        module._native_standardize(z1, z2), crosscorr_forms._standardize(z1.double(), z2.double()), strict=True
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


SETS = dispatch.native.CROSSCORR_GRAM_SETS if dispatch.native is not None else []
# Around tiles of 4 and 8 rows and on both sides of the batches that C++ takes alone.
BATCHES = [2, 3, 7, 16, 31, 32, 33, 64, 128, 129]


def exact(z1: Tensor, z2: Tensor, off_diagonal: float) -> list[Tensor]:
    """Losses and both gradients of their sum, in float64."""
    a, b = (z.double().requires_grad_() for z in (z1, z2))
    losses = torch.stack([definitions.crosscorr(x, y, off_diagonal=off_diagonal) for x, y in zip(a, b, strict=True)])
    return [losses.detach(), *torch.autograd.grad(losses.sum(), (a, b))]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "_INSTRUCTION_SET", request.param)
    return str(request.param)


@pytest.mark.parametrize("n", BATCHES)
@pytest.mark.parametrize(("s", "d", "off_diagonal"), [(1, 1, 1.0), (2, 33, 1.0), (3, 279, 0.005)])
@pytest.mark.usefixtures("instruction_set")
def test_small_batches_by_every_instruction_set(s: int, n: int, d: int, off_diagonal: float) -> None:
    z1, z2 = pair(s, n, d)
    with poisoned_memory():
        loss, *gradients = module._native(z1, z2, off_diagonal, 1.0, "gram", True)
        alone, *none = module._native(z1, z2, off_diagonal, 1.0, "gram", False)
    want, *wanted = exact(z1, z2, off_diagonal)
    # A column alone has its C - 1 for a gradient, a small difference; among others the largest gradient is the measure.
    tolerance = OPERATION[torch.float32] * (1 if d > 1 else 5)
    assert relative_error(loss / d, want / d) <= tolerance * max(1, d / want.max().item())
    assert torch.equal(alone, loss) and [z.shape for z in none] == [(s, 0, d)] * 2
    for actual, expected in zip(gradients, wanted, strict=True):
        # Two images standardise to +1 and -1 whatever they are: what is left of a gradient is all rounding.
        assert relative_error(actual, expected) <= tolerance if n > 2 else actual.isfinite().all()


@pytest.mark.parametrize("n", [32, 33, 64, 128])
@pytest.mark.usefixtures("instruction_set")
def test_small_batches_at_the_papers_width_keep_six_digits(n: int) -> None:
    z1, z2 = pair(1, n, 2048)
    for actual, expected in zip(module._native(z1, z2, 1.0, 1.0, "gram", True), exact(z1, z2, 1.0), strict=True):
        assert relative_error(actual, expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("instruction_set")
def test_narrow_inputs_are_widened_as_torch_widens_them(dtype: torch.dtype) -> None:
    z1, z2 = (z.to(dtype) for z in pair(2, 9, 75))
    z1[0, 0, :4] = torch.tensor([0.0, -0.0, 3e-7, -6e-8])
    results = module._native(z1, z2, 0.5, 1.0, "gram", True)
    assert all(map(torch.equal, results, module._native(z1.float(), z2.float(), 0.5, 1.0, "gram", True)))
    z1[1, 3, 7] = torch.inf
    loss, *_ = module._native(z1, z2, 0.5, 1.0, "gram", True)
    assert torch.equal(loss[0], results[0][0]) and loss[1].isnan()


@pytest.mark.parametrize("n", [31, 128])
@pytest.mark.usefixtures("instruction_set")
def test_small_batches_do_not_depend_on_the_number_of_threads(n: int) -> None:
    z1, z2 = pair(2, n, 2048 + 7)
    results = []
    with poisoned_memory():
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(module._native(z1, z2, 0.5, 1.0, "gram", True))
    assert all(torch.equal(x, y) for result in results for x, y in zip(result, results[0], strict=True))


def test_small_batches_far_from_zero_lose_nothing() -> None:
    z1, z2 = (z + 50 for z in pair(1, 100, 33))
    for actual, expected in zip(module._native(z1, z2, 1.0, 1.0, "gram", True), exact(z1, z2, 1.0), strict=True):
        assert relative_error(actual, expected) <= OPERATION[torch.float32]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z1": 0}, "null address"),
        ({"loss": 0}, "null address"),
        ({"scratch": 3}, "not aligned"),
        ({"dz1": 0}, "one gradient without the other"),
        ({"batch": 0}, "sizes must be at least 1"),
        ({"batch": 100000}, "CROSSCORR_GRAM_ROWS"),
        ({"threads": 0}, "threads"),
        ({"dtype": "float64"}, "not float64"),
        ({"instruction_set": "mmx"}, "mmx"),
    ],
)
def test_gram_binding_refuses(changes: dict[str, object], message: str) -> None:
    names = ("z1", "z2", "loss", "dz1", "dz2", "scratch")
    arguments = {name: row.data_ptr() for name, row in zip(names, torch.zeros(6, 1024), strict=True)}
    options = {"off_diagonal": 1.0, "scale": 1.0, "epsilon": 1e-5, "stages": 1, "batch": 2, "features": 2}
    options |= {"dtype": "float32", "instruction_set": "", "threads": 1}
    assert dispatch.native is not None
    with pytest.raises(ValueError, match=message):
        dispatch.native.crosscorr_gram(**(arguments | options | changes))
