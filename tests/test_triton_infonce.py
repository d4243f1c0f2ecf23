"""The Triton InfoNCE against its definition in float64: on the GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastmoco.ops import definitions
from fastmoco.ops.infonce import infonce_ranked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 matrices wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
# How far the similarity of two unit vectors may be off: float32 sums, or one vector rounded to the bank's dtype.
SIMILARITY = {torch.float32: 2.0**-21, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

pytestmark = pytest.mark.usefixtures("poisoned")


def unit(rows: int, dim: int) -> Tensor:
    return normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1)


def check(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    *,
    temperature: float,
    margin: float = 0.0,
    normalized: bool = True,
    unit_bank: bool = False,
    skip: Tensor | None = None,
) -> None:
    """Loss, rank and both gradients; the bounds follow an error of the similarities through the formulae."""
    options = {"temperature": temperature, "margin": margin, "normalized": normalized}
    inputs = [x.detach().to(DEVICE).requires_grad_() for x in (query, key)]
    loss, rank = infonce_ranked(
        *inputs,
        bank.to(DEVICE),
        **options,
        unit_bank=unit_bank,
        skip=None if skip is None else skip.to(DEVICE),
        implementation="triton",
    )
    gradients = torch.autograd.grad(loss, inputs)

    exact = [x.double().detach().requires_grad_() for x in (query, key)]
    expected, _ = definitions.infonce(*exact, bank.double(), **options, skip=skip)
    wanted = torch.autograd.grad(expected, exact)

    n, off = len(query), SIMILARITY[bank.dtype]
    assert loss.dtype == torch.float32 and rank.dtype == torch.int64
    assert abs(loss.item() - expected.item()) <= 2 * off / temperature + 1e-6
    for got, want, x in zip(gradients, wanted, exact, strict=True):
        per_row = 2 * off * (1 + 2 / temperature) / (temperature * n)
        shrink = 1.0 if normalized else 1 / x.detach().norm(dim=1, keepdim=True).clamp_min(1e-12)
        assert got.dtype == x.dtype or got.dtype == torch.float32
        assert ((got.cpu().double() - want).abs() <= per_row * shrink + 1e-7 * want.abs().amax()).all()
    q, k = (x if normalized else normalize(x, dim=1) for x in exact)
    above = q @ bank.double().T - (q * k).sum(dim=1, keepdim=True)
    if skip is not None:
        for i, j in (skip >= 0).nonzero():
            above[i, skip[i, j]] = -torch.inf
    assert ((above > 2 * off).sum(dim=1) <= rank.cpu()).all()
    assert (rank.cpu() <= (above > -2 * off).sum(dim=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalized", [True, False])
# One of everything; primes; whole tiles; one over a tile, and over a chunk of columns.
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (2, 7, 5), (7, 299, 33), (32, 256, 128), (33, 257, 129)])
def test_loss_rank_and_gradients(n: int, k: int, d: int, normalized: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    query, key = (unit(n, d) if normalized else 3 * torch.randn(n, d) for _ in range(2))
    check(query.float(), key.float(), unit(k, d).to(dtype), temperature=0.07, normalized=normalized)


@pytest.mark.parametrize("normalized", [True, False])
def test_more_splits_than_are_merged_at_a_time(monkeypatch: pytest.MonkeyPatch, normalized: bool) -> None:
    """As on a GPU with its many processors; the largest logits in the first, a middle and the last split."""
    monkeypatch.setattr("fastmoco.kernels.infonce.processors", lambda device: 37)
    torch.manual_seed(9)
    query, key, bank = unit(3, 16).float(), unit(3, 16).float(), unit(37 * 32, 16).float()
    for i, j in enumerate((0, 18 * 32, 37 * 32 - 1)):
        bank[j] = query[i]
    check(query, key, bank, temperature=0.05, normalized=normalized)


def test_more_queries_than_a_tile_holds() -> None:
    torch.manual_seed(8)
    check(torch.randn(256, 17), torch.randn(256, 17), unit(67, 17).float(), temperature=0.2, normalized=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0, 10.0])
@pytest.mark.parametrize("unit_bank", [False, True])
def test_temperatures(unit_bank: bool, temperature: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    query, key, bank = torch.randn(5, 31), torch.randn(5, 31), (unit(211, 31) * 0.999).to(dtype)
    # From its best match, a tiny term, and its opposite, where a fixed maximum leaves the sum smallest.
    bank[3], bank[4] = normalize(query[0], dim=0) * 0.999, normalize(query[1], dim=0) * -0.999
    check(query, key, bank, temperature=temperature, normalized=False, unit_bank=unit_bank)


@pytest.mark.parametrize("dtype", DTYPES)
def test_margin_and_skipped_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    n = 19
    views = unit(2 * n, 13)
    own = torch.arange(2 * n)
    skip = torch.stack([own, (own + n) % (2 * n), torch.full_like(own, -1)], dim=1)
    skip[5] = -1
    check(views.float(), views.roll(n, 0).float(), views.to(dtype), temperature=0.1, margin=0.3, skip=skip)


def test_no_negatives_at_all() -> None:
    """An empty bank, or every row of it skipped: the key is the softmax's one term."""
    torch.manual_seed(3)
    query, key, bank = unit(4, 9).float(), unit(4, 9).float(), unit(2, 9).float()
    for rows, skip in ((bank[:0], None), (bank, torch.tensor([[0, 1]] * 4))):
        check(query, key, rows, temperature=0.07, skip=skip)
        inputs = [x.to(DEVICE) for x in (query, key, rows)]
        skip = None if skip is None else skip.to(DEVICE)
        loss, rank = infonce_ranked(*inputs, temperature=0.07, skip=skip, implementation="triton")
        assert loss.item() == 0 and not rank.any()


def test_identical_vectors_leave_the_logarithm_of_their_number() -> None:
    row = unit(1, 8).float()
    query, bank = row.repeat(3, 1), row.repeat(99, 1)
    check(query, query.clone(), bank, temperature=0.05)
    loss, _ = infonce_ranked(
        query.to(DEVICE), query.to(DEVICE), bank.to(DEVICE), temperature=0.05, implementation="triton"
    )
    assert loss.item() == pytest.approx(math.log(100), rel=1e-6)


def test_zero_and_tiny_vectors_have_the_definitions_gradients() -> None:
    """Below the norm's epsilon a vector is divided by that, a constant, and what is left of its gradient is simpler."""
    torch.manual_seed(4)
    query, key, bank = torch.randn(3, 7), torch.randn(3, 7), torch.cat([unit(20, 7).float(), torch.zeros(2, 7)])
    query[1], key[2] = 0, 0
    query[0], key[1] = query[0] * 1e-13, key[1] * 1e-13
    check(query, key, bank, temperature=0.5, normalized=False)


@pytest.mark.parametrize("where", ["bank", "key"])
def test_one_huge_logit_stays_finite(where: str) -> None:
    torch.manual_seed(5)
    query, key, bank = unit(3, 8).float(), unit(3, 8).float(), unit(70, 8).float()
    if where == "bank":
        bank[69] = query[0] * 1e6
    else:
        key[0] = query[0] * 1e6
    inputs = [x.to(DEVICE).requires_grad_() for x in (query, key)]
    loss, rank = infonce_ranked(*inputs, bank.to(DEVICE), temperature=0.01, implementation="triton")
    expected, expected_rank = definitions.infonce(query.double(), key.double(), bank.double(), temperature=0.01)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-6, atol=1e-4)
    assert torch.equal(rank.cpu(), expected_rank)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, inputs))


def test_a_nan_is_not_swallowed() -> None:
    query, key, bank = unit(3, 8).float(), unit(3, 8).float(), unit(70, 8).float()
    bank[69, 7] = math.nan
    loss, _ = infonce_ranked(
        query.to(DEVICE), key.to(DEVICE), bank.to(DEVICE), temperature=0.1, implementation="triton"
    )
    assert loss.isnan()


def test_inputs_of_any_layout_and_precision() -> None:
    torch.manual_seed(6)
    wide = torch.randn(10, 24)
    query, key, bank = wide[:5, ::2], wide[5:, 1::2].half(), unit(12, 40).float().T
    loss, _ = infonce_ranked(
        query.to(DEVICE), key.to(DEVICE), bank.to(DEVICE), temperature=0.2, normalized=False, implementation="triton"
    )
    expected, _ = definitions.infonce(query.double(), key.double(), bank.double(), temperature=0.2, normalized=False)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_same_bits_every_time() -> None:
    torch.manual_seed(7)
    query, key, bank = (x.float().to(DEVICE).requires_grad_() for x in (unit(33, 20), unit(33, 20), unit(300, 20)))
    results = []
    for _ in range(2):
        loss, _ = infonce_ranked(query, key, bank.detach(), temperature=0.07, implementation="triton")
        results.append([loss, *torch.autograd.grad(loss, [query, key])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
