"""InfoNCE on a GPU: loss, ranks and gradients of every implementation against the float64 definition."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cuda_checks import (
    DEVICE,
    TOLERANCE,
    assert_near,
    assert_peak_below,
    assert_same_bits,
    no_synchronisation,
    on_cuda,
    randn,
)
from fastmoco.ops import definitions
from fastmoco.ops.infonce import Ranked, infonce_ranked

pytestmark = pytest.mark.gpu
OPERATION = "infonce"

# One query; odd everything; a batch above a tile and a bank that no tile divides; the paper's size.
SIZES = [(1, 1, 128), (3, 5, 7), (7, 1000, 96), (257, 4099, 128), (32, 65536, 128)]
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


def inputs(n: int, k: int, d: int, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys that are related, as views of one image are, of any length; a bank of unit rows."""
    query = randn(n, d)
    key = query + randn(n, d)
    bank = normalize(randn(k, d), dim=1)
    return query.to(dtypes[0]).requires_grad_(), key.to(dtypes[0]).requires_grad_(), bank.to(dtypes[1])


def check(query: Tensor, key: Tensor, bank: Tensor, implementation: str, **options: object) -> None:
    """Loss, rank and the gradients to query and key, against the definition of the same (rounded) inputs."""
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key)]
    flags = {name: value for name, value in options.items() if name != "unit_bank"}
    want, _ = definitions.infonce(*exact, bank.double(), **flags)
    want_gradients = torch.autograd.grad(want, exact)
    got: Ranked = infonce_ranked(query, key, bank, implementation=implementation, **options)
    gradients = torch.autograd.grad(got.loss, [query, key])

    t, n, length = options["temperature"], len(query), float(query.detach().double().norm(dim=1).mean())
    # A logit's rounding grows with 1 / t, and the softmax's relative error is that. In few dimensions the roundings of
    # a product's terms average out less: each moves a logit by 1 / (t d) times its own, and they add up as chance does.
    few = max(1, (16 / query.shape[1]) ** 0.5) if query.dtype == torch.bfloat16 else 1
    tolerance = max(TOLERANCE[query.dtype], TOLERANCE[bank.dtype]) * max(1, 0.07 / t) * few
    assert_near(got.loss, want.detach(), tolerance, "loss", least=0.1 / t)
    for name, gradient, wanted in zip(("dquery", "dkey"), gradients, want_gradients, strict=True):
        assert_near(gradient, wanted, tolerance, name, least=0.01 / (t * length * n**0.5))
    unit = [normalize(tensor.detach(), dim=1) for tensor in exact] if not options["normalized"] else exact
    positive = (unit[0] * unit[1]).sum(dim=1, keepdim=True)
    negative = unit[0] @ bank.double().T
    if options.get("skip") is not None:
        for column in options["skip"].unbind(dim=1):
            rows = (column >= 0).nonzero()[:, 0]
            negative[rows, column[rows]] = -torch.inf
    # Rounding moves a similarity by at most this, and a rank by the negatives within it.
    slack = 2e-6 if tolerance < 1e-3 else 2e-2
    least, most = ((negative > positive + side * slack).sum(dim=1) for side in (1, -1))
    assert ((least <= got.rank) & (got.rank <= most)).all(), "rank"


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_definition(implementation: str, size: tuple[int, int, int], dtypes: tuple) -> None:
    query, key, bank = inputs(*size, dtypes)
    check(query, key, bank, implementation, temperature=0.07, normalized=False, unit_bank=True)


@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("normalized", [True, False])
def test_any_temperature_and_a_margin(implementation: str, normalized: bool, temperature: float) -> None:
    query, key, bank = inputs(33, 1031, 128, DTYPES[0])
    if normalized:
        query, key = (normalize(tensor.detach(), dim=1).requires_grad_() for tensor in (query, key))
    check(query, key, bank, implementation, temperature=temperature, normalized=normalized, margin=0.1)


def test_negatives_may_be_left_out(implementation: str) -> None:
    query, key, bank = inputs(9, 300, 64, DTYPES[0])
    skip = torch.randint(-1, 300, (9, 3), device=DEVICE)
    check(query, key, bank, implementation, temperature=0.1, normalized=False, skip=skip)


def test_the_bits_are_the_same_every_time(implementation: str) -> None:
    query, key, bank = inputs(64, 65536, 128, DTYPES[1])

    def run() -> list[Tensor]:
        result = infonce_ranked(query, key, bank, temperature=0.07, normalized=False, implementation=implementation)
        return [result.loss.detach(), result.rank, *torch.autograd.grad(result.loss, [query, key])]

    assert_same_bits(run)


def test_the_host_does_not_wait(implementation: str) -> None:
    query, key, bank = inputs(32, 4096, 128, DTYPES[0])
    for attempt in range(2):  # the first compiles
        with no_synchronisation() if attempt else torch.enable_grad():
            loss = infonce_ranked(query, key, bank, temperature=0.07, implementation=implementation).loss
            torch.autograd.grad(loss, [query, key])


def test_nothing_of_size_n_times_k_is_made(implementation: str) -> None:
    n, k = 512, 65536
    query, key, bank = inputs(n, k, 128, DTYPES[0])

    def run() -> None:
        loss = infonce_ranked(query, key, bank, temperature=0.07, normalized=False, implementation=implementation).loss
        torch.autograd.grad(loss, [query])

    assert_peak_below(n * k * 4 // 4, run)


def test_rows_beyond_32_bit_offsets(implementation: str) -> None:
    """2^24 + 64 rows of 128 numbers: the last rows, which alone resemble the queries, decide loss and gradient."""
    rows = (1 << 24) + 64 if on_cuda() else 1 << 10
    query = normalize(randn(8, 128), dim=1).bfloat16().float().requires_grad_()
    bank = torch.zeros(rows, 128, dtype=torch.bfloat16, device=DEVICE)
    bank[-8:] = query.detach()
    loss, rank = infonce_ranked(query, -query.detach(), bank, temperature=0.05, implementation=implementation)
    # By hand: the positive is -1, the zeros are 0, the eight queries among themselves the rest.
    q = query.detach().double().requires_grad_()
    among = torch.cat([-q.square().sum(dim=1, keepdim=True).detach(), q @ q.detach().T], dim=1) / 0.05
    zeros = torch.full((8, 1), rows - 8.0, dtype=torch.float64, device=DEVICE).log()
    positive = -(q * q.detach()).sum(dim=1) / 0.05
    lse = torch.cat([positive[:, None], among[:, 1:], zeros], dim=1).logsumexp(dim=1)
    want = (lse - positive).mean()
    assert_near(loss, want.detach(), 1e-2, "loss")
    assert_near(torch.autograd.grad(loss, query)[0], torch.autograd.grad(want, q)[0], 1e-2, "dquery")
    assert (rank == rows).all(), "every negative is more similar than the opposite of a query"
