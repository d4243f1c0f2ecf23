"""ops.infonce against its definition in float64: loss, ranks and every gradient, for all that runs here."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from fastmoco.errors import UserError
from fastmoco.ops import definitions, dispatch
from fastmoco.ops import infonce as module
from fastmoco.ops.infonce import infonce, infonce_ranked

NATIVE = [] if dispatch.native is None else [f"native {name}".strip() for name in ("", *dispatch.native.INFONCE_SETS)]
IMPLEMENTATIONS = ["reference", *NATIVE]

# Relative to the largest element of the exact gradient, by the dtype in which the bank is multiplied. A bfloat16 query
# and bfloat16 weights round by 2^-9 each; the sum over the bank averages most of it out where no single term dominates.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 6e-3}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name to ask for; of the native one, each instruction set that this processor has."""
    name, _, instruction_set = request.param.partition(" ")
    monkeypatch.setattr(module, "_INSTRUCTION_SET", instruction_set)
    return name


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that what is not written shows."""
    torch.manual_seed(5)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def unit(rows: int, dim: int) -> Tensor:
    return normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1)


def check(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    *,
    dtype: torch.dtype,
    implementation: str | None,
    bank_gradient: bool = False,
    tolerance: float | None = None,
    **options: object,
) -> None:
    """Loss, rank and gradients of inputs rounded to `dtype` against the definition of the rounded inputs in float64."""
    inputs = [x.to(dtype).requires_grad_(i < 2 or bank_gradient) for i, x in enumerate((query, key, bank))]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    result = infonce_ranked(*inputs, implementation=implementation, **options)
    result.loss.backward()
    expected = {name: value for name, value in options.items() if name != "unit_bank"}
    loss, rank = definitions.infonce(*exact, **expected)
    loss.backward()

    assert result.loss.dtype == torch.promote_types(dtype, torch.float32)
    bound = TOLERANCE[dtype] if tolerance is None else tolerance
    assert result.loss.item() == pytest.approx(loss.item(), rel=bound, abs=bound)
    assert_ranks(result.rank, rank, exact, bound, normalized=bool(options.get("normalized", True)))
    for name, got, want in zip(("query", "key", "bank"), inputs, exact, strict=True):
        if want.grad is None:
            assert got.grad is None
            continue
        assert got.grad is not None and got.grad.dtype == dtype
        # What comes back in a narrow dtype is rounded once more.
        slack = bound + (torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)
        # A gradient that is small is the difference of terms of this size, each rounded, and so are the logits.
        inverse = 1 / float(str(options["temperature"]))
        term = inverse / len(query) * (2 + inverse) if name != "bank" else 0
        rounding = torch.finfo(dtype if dtype != torch.float16 else torch.float32).eps
        scale = want.grad.abs().max().item()
        error = (got.grad.double() - want.grad).abs().max().item()
        assert error <= slack * scale + rounding * term, f"{name}: off by {error:.1e} of {scale:.1e}"


def assert_ranks(rank: Tensor, exact: Tensor, inputs: list[Tensor], bound: float, *, normalized: bool) -> None:
    """Ranks agree but for negatives that are as similar as the key within rounding."""
    query, key, bank = (x.detach() for x in inputs)
    if not normalized:
        query, key = normalize(query, dim=1), normalize(key, dim=1)
    positive = (query * key).sum(dim=1, keepdim=True)
    reach = 2 * bound * query.norm(dim=1, keepdim=True) * (key.norm(dim=1, keepdim=True) + bank.norm(dim=1))
    near = ((query @ bank.T - positive).abs() <= reach).sum(dim=1)
    assert rank.dtype == torch.int64
    assert ((rank - exact).abs() <= near).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("n", [1, 2, 7, 32, 33, 256])
def test_every_batch_size_and_dtype(n: int, dtype: torch.dtype, implementation: str) -> None:
    if dtype == torch.float64 and implementation == "native":
        with pytest.raises(UserError, match="float32, which is too narrow for float64"):
            infonce(unit(n, 3), unit(n, 3), unit(5, 3), temperature=0.2, implementation="native")
        return
    # Tile registers take whole multiples of 32 only.
    d = 64 if dtype == torch.bfloat16 else 37
    check(unit(n, d), unit(n, d), unit(301, d), dtype=dtype, implementation=implementation, temperature=0.2)


@pytest.mark.parametrize(("d", "k"), [(1, 1), (2, 95), (3, 96), (16, 97), (128, 193), (129, 300), (6, 0), (512, 40)])
def test_every_width_and_queue_size(d: int, k: int, implementation: str) -> None:
    check(unit(19, d), unit(19, d), unit(k, d), dtype=torch.float32, implementation=implementation, temperature=0.1)
    check(unit(40, d), unit(40, d), unit(k, d), dtype=torch.bfloat16, implementation=implementation, temperature=0.5)


@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.034, 0.07, 1.0, 10.0])
@pytest.mark.parametrize("unit_bank", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_every_temperature(temperature: float, unit_bank: bool, normalized: bool, implementation: str) -> None:
    length = 1.0 if normalized else 7.0
    check(
        unit(33, 24) * length,
        unit(33, 24) * length,
        unit(257, 24),
        dtype=torch.float32,
        implementation=implementation,
        # A logit is rounded to 2^-24 of 1/t, and an exponential carries that on.
        tolerance=max(3e-6, 2e-7 / temperature),
        temperature=temperature,
        unit_bank=unit_bank,
        normalized=normalized,
    )


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.2, -0.3])
def test_margin_and_skipped_rows(margin: float, normalized: bool, implementation: str) -> None:
    skip = torch.randint(-1, 301, (33, 3))
    check(
        unit(33, 24) * (1 if normalized else 3),
        unit(33, 24) * (1 if normalized else 0.1),
        unit(301, 24),
        dtype=torch.float32,
        implementation=implementation,
        temperature=0.2,
        margin=margin,
        normalized=normalized,
        skip=skip,
    )


def test_the_batch_as_its_own_bank(implementation: str) -> None:
    """SimCLR: both views are queries, other images are negatives, and all three roles get gradients."""
    z1, z2 = unit(13, 20), unit(13, 20)
    both, other = torch.cat([z1, z2]), torch.cat([z2, z1])
    own = torch.arange(26)
    skip = torch.stack([own, (own + 13) % 26], dim=1)
    options = {"temperature": 0.5, "skip": skip, "implementation": implementation}
    check(both, other, both, dtype=torch.float32, bank_gradient=True, **options)
    loss = infonce(both.float(), other.float(), both.float(), **options)
    similarity = (both @ both.T / 0.5).fill_diagonal_(-math.inf)
    expected = torch.nn.functional.cross_entropy(similarity, (own + 13) % 26)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_all_negatives_skipped_is_a_loss_of_zero(implementation: str) -> None:
    q = unit(3, 8).float().requires_grad_()
    skip = torch.arange(5).expand(3, 5).contiguous()
    loss = infonce(q, unit(3, 8).float(), unit(5, 8).float(), temperature=0.1, skip=skip, implementation=implementation)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and q.grad is not None and q.grad.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_vectors(dtype: torch.dtype, implementation: str) -> None:
    one = unit(1, 16)
    check(
        one.expand(9, 16),
        one.expand(9, 16),
        one.expand(130, 16),
        dtype=dtype,
        implementation=implementation,
        temperature=0.07,
    )


@pytest.mark.parametrize("normalized", [False, True])
def test_zero_vectors(normalized: bool, implementation: str) -> None:
    query, key, bank = unit(5, 12), unit(5, 12), unit(70, 12)
    query[0], key[1], bank[3] = 0, 0, 0
    query[2] = key[2] = 0
    check(query, key, bank, dtype=torch.float32, implementation=implementation, temperature=0.1, normalized=normalized)


@pytest.mark.parametrize("where", ["negative", "positive"])
def test_one_huge_logit(where: str, implementation: str) -> None:
    query, key, bank = unit(4, 12), unit(4, 12), unit(200, 12)
    if where == "negative":
        bank[150] = 3e4 * query[1]
    else:
        key[1] = 3e4 * query[1]
    check(query, key, bank, dtype=torch.float32, implementation=implementation, temperature=0.07, tolerance=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_does_not_turn_finite(bad: float, implementation: str) -> None:
    query, key, bank = unit(40, 12).float(), unit(40, 12).float(), unit(200, 12).float()
    query[35, 3] = bad
    assert not infonce(query, key, bank, temperature=0.1, implementation=implementation).isfinite()
    query = unit(40, 12).float()
    bank[150, 3] = bad
    assert not infonce(query, key, bank, temperature=0.1, implementation=implementation).isfinite()


@settings(max_examples=60)
@given(
    n=st.integers(1, 70),
    d=st.integers(1, 70),
    k=st.integers(0, 300),
    skips=st.integers(0, 2),
    temperature=st.floats(0.03, 10),
    normalized=st.booleans(),
    name=st.sampled_from(["reference", None]),
)
def test_any_shape(n: int, d: int, k: int, skips: int, temperature: float, normalized: bool, name: str | None) -> None:
    query, key = unit(n, d), unit(n, d)
    if not normalized:
        query, key = 2 * query, 5 * key
    check(
        query,
        key,
        unit(k, d),
        dtype=torch.float32,
        implementation=name,
        tolerance=1e-5,
        temperature=temperature,
        normalized=normalized,
        skip=torch.randint(-1, max(k, 1), (n, skips)) if skips and k else None,
    )


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=2)[:, :, 0]


def test_strides_do_not_matter(implementation: str) -> None:
    query, key, bank = unit(9, 10).float(), unit(9, 10).float(), unit(50, 10).float()
    skip = torch.randint(0, 50, (9, 2))
    options = {"temperature": 0.3, "implementation": implementation}
    plain = infonce(query, key, bank, skip=skip, **options)
    odd = infonce(strided(query), key.T.contiguous().T, strided(bank), skip=skip.T.contiguous().T, **options)
    assert torch.equal(plain, odd)


def test_gradients_accumulate_and_a_graph_can_be_walked_twice(implementation: str) -> None:
    query, key, bank = unit(9, 10).float().requires_grad_(), unit(9, 10).float().requires_grad_(), unit(50, 10).float()
    loss = infonce(query, key, bank, temperature=0.3, implementation=implementation)
    loss.backward(retain_graph=True)
    assert query.grad is not None and key.grad is not None
    once = query.grad.clone(), key.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(query.grad, 4 * once[0])
    torch.testing.assert_close(key.grad, 4 * once[1])


def test_the_bank_may_change_before_the_backward(implementation: str) -> None:
    """Keys are pushed to the queue between loss and backward in most training loops."""
    query, key, bank = unit(9, 10).float().requires_grad_(), unit(9, 10).float(), unit(50, 10).float()
    (expected,) = torch.autograd.grad(infonce(query, key, bank, temperature=0.3, implementation=implementation), query)
    loss = infonce(query, key, bank, temperature=0.3, implementation=implementation)
    bank.zero_()
    loss.backward()
    assert query.grad is not None and torch.equal(query.grad, expected)


def test_repeated_runs_agree_to_the_last_bit(implementation: str) -> None:
    query, key, bank = unit(70, 64).float(), unit(70, 64).float(), unit(3000, 64).float()
    runs = []
    for _ in range(3):
        q = query.clone().requires_grad_()
        infonce(q, key, bank, temperature=0.1, implementation=implementation).backward()
        runs.append(q.grad)
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
def test_more_threads_change_rounding_only() -> None:
    query, key, bank = unit(70, 64), unit(70, 64), unit(3000, 64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 50):
            torch.set_num_threads(threads)
            check(query, key, bank, dtype=torch.float32, implementation="native", temperature=0.1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_it_alone(dtype: torch.dtype, implementation: str) -> None:
    query, key, bank = unit(9, 10).float(), unit(9, 10).float(), unit(50, 10).float()
    plain = infonce(query, key, bank, temperature=0.3, implementation=implementation)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(infonce(query, key, bank, temperature=0.3, implementation=implementation), plain)


def test_it_compiles_without_graph_breaks(implementation: str) -> None:
    def loss(query: Tensor, key: Tensor, bank: Tensor) -> Tensor:
        return 2 * infonce(query, key, bank, temperature=0.3, normalized=False, implementation=implementation)

    key, bank = unit(9, 10).float(), unit(50, 10).float()
    gradients = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        query = key.flip(0).clone().requires_grad_()
        run(query, key, bank).backward()
        gradients.append(query.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("bank_gradient", [False, True])
def test_opcheck(bank_gradient: bool, implementation: str) -> None:
    # opcheck runs the operation many ways and compares; NaN in fresh memory is for the other tests.
    torch.use_deterministic_algorithms(False)
    query, key = (unit(5, 6).float().requires_grad_() for _ in range(2))
    bank = unit(11, 6).float().requires_grad_(bank_gradient)
    skip = torch.randint(-1, 11, (5, 2))
    arguments = (query, key, bank, skip, 0.2, 0.1, False, False, True, implementation)
    torch.library.opcheck(module._infonce.overload, arguments)
    torch.library.opcheck(
        module._bank_gradient.overload, (query.detach(), bank.detach(), skip, torch.ones(5), 0.2, False)
    )


class Largest(TorchDispatchMode):
    """The most elements that any tensor made under it has. It sees into functions, not into operations."""

    elements = 0

    def __torch_dispatch__(self, func: Callable[..., object], types, args=(), kwargs=None) -> object:  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_nothing_of_size_n_by_k_is_made(implementation: str) -> None:
    n, d, k = 128, 16, 65536
    query, key, bank = unit(n, d).float(), unit(n, d).float(), unit(k, d).float()
    torch.use_deterministic_algorithms(False)
    run = dispatch.pick("infonce", query, implementation)
    with Largest() as ours:
        run(query, key, bank, None, module.Options(0.2, 0.0, True, False, True))
    with Largest() as plain:
        definitions.infonce(query, key, bank, temperature=0.2)
    assert 0 < ours.elements <= 1 << 20 < n * k <= plain.elements


@pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
def test_scratch_memory_of_two_threads_is_small() -> None:
    """4 MB for the queue and batch of the paper's largest setting, outputs and casts included."""
    assert dispatch.native is not None
    outputs = 4 * 256 * (128 * 2 + 3)
    assert 4 * dispatch.native.infonce_scratch(256, 128, 2) + outputs <= 4e6


def test_a_second_derivative_is_refused(implementation: str) -> None:
    x = unit(5, 6).float().requires_grad_()
    loss = infonce(normalize(x, dim=1), unit(5, 6).float(), unit(11, 6).float(), temperature=0.2)
    with pytest.raises(RuntimeError, match=r"no second derivative.*definitions\.infonce"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("case", range(24))
@pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
def test_bfloat16_banks_with_every_option(case: int, implementation: str) -> None:
    """Widths that pairs and tiles take, slices that end anywhere, and all options at once."""
    draw = random.Random(case)
    n, k = draw.choice([1, 7, 16, 17, 32, 33, 63, 70]), draw.randrange(1, 500)
    d, normalized = draw.choice([2, 32, 34, 64, 96, 128]), draw.random() < 0.5
    length = 1.0 if normalized else 5.0
    temperature = draw.choice([0.05, 0.07, 0.2, 1.0, 10.0])
    check(
        length * unit(n, d),
        length * unit(n, d),
        unit(k, d),
        dtype=torch.bfloat16,
        implementation=implementation,
        # A rounded query moves each logit by up to 2^-9 of 1/t, which an exponential carries on.
        tolerance=max(TOLERANCE[torch.bfloat16], 2**-9 / temperature),
        temperature=temperature,
        margin=draw.choice([0.0, 0.2]),
        normalized=normalized,
        unit_bank=draw.random() < 0.5,
        skip=torch.randint(-1, k, (n, 2)) if draw.random() < 0.5 else None,
    )


def test_bfloat16_banks_of_zero_huge_and_broken_rows(implementation: str) -> None:
    query, key, bank = unit(33, 64), unit(33, 64), unit(400, 64)
    query[3], key[4], bank[5:200] = 0, 0, 0
    check(query, key, bank, dtype=torch.bfloat16, implementation=implementation, temperature=0.2)
    bank[150] = 3e4 * query[1]
    check(query, key, bank, dtype=torch.bfloat16, implementation=implementation, temperature=0.2, tolerance=2e-2)
    bank[399, 63] = math.nan
    narrow = [x.bfloat16() for x in (query, key, bank)]
    assert not infonce(*narrow, temperature=0.2, implementation=implementation).isfinite()


def transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


def test_opcheck_of_odd_strides(implementation: str) -> None:
    torch.use_deterministic_algorithms(False)
    query, key, bank = (transposed(unit(rows, 6).float()).requires_grad_() for rows in (5, 5, 11))
    arguments = (query, key, bank, None, 0.2, 0.0, True, False, True, implementation)
    torch.library.opcheck(module._infonce.overload, arguments)
    torch.library.opcheck(
        module._bank_gradient.overload, (query.detach(), bank.detach(), None, torch.ones(5), 0.2, True)
    )


def test_inductor_compiles_it() -> None:
    torch.use_deterministic_algorithms(False)

    def loss(query: Tensor, key: Tensor, bank: Tensor) -> Tensor:
        return 2 * infonce(query, key, bank, temperature=0.3, normalized=False)

    gradients = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        query, key, bank = (
            transposed(x) for x in (torch.arange(30.0).view(5, 6).sin(), torch.ones(5, 6), torch.eye(6))
        )
        query.requires_grad_(), bank.requires_grad_()
        run(query, key, bank).backward()
        gradients += [query.grad, bank.grad]
    torch.testing.assert_close(gradients[:2], gradients[2:])


def test_an_empty_bank_has_an_empty_gradient(implementation: str) -> None:
    bank = torch.empty(0, 4, requires_grad=True)
    infonce(torch.ones(2, 4), torch.ones(2, 4), bank, temperature=0.3, implementation=implementation).backward()
    assert bank.grad is not None and bank.grad.shape == (0, 4)


def test_mistakes_are_named() -> None:
    q, bank = unit(2, 3), unit(4, 3)
    for arguments, options, message in (
        ((q, q, bank), {"temperature": 0.0}, "temperature"),
        ((q, q, bank), {"temperature": math.nan}, "temperature"),
        ((q, q, unit(4, 5)), {"temperature": 0.1}, r"\(K, D\)"),
        ((q, unit(3, 3), bank), {"temperature": 0.1}, r"\(N, D\)"),
        ((q[:0], q[:0], bank), {"temperature": 0.1}, r"\(0, 3\) are empty"),
        ((q[:, :0], q[:, :0], bank[:, :0]), {"temperature": 0.1}, r"\(2, 0\) are empty"),
        ((q, q, bank.to("meta")), {"temperature": 0.1}, "bank is on meta, but the query on cpu"),
        ((q, q.to("meta"), bank), {"temperature": 0.1}, "key is on meta"),
        ((q.long(), q, bank), {"temperature": 0.1}, "query must have a floating dtype, not torch.int64"),
        ((q, q.cfloat(), bank), {"temperature": 0.1}, "key must have a floating dtype"),
        ((q, q, bank), {"temperature": 0.1, "skip": torch.zeros(2, dtype=torch.int64)}, r"skip must be \(2, M\)"),
        ((q, q, bank), {"temperature": 0.1, "skip": torch.zeros(2, 1)}, "int64, not"),
    ):
        with pytest.raises(ValueError, match=message):
            infonce(*arguments, **options)
    with pytest.raises(UserError, match="implementation"):
        infonce(q, q, bank, temperature=0.1, implementation="nonsense")


@pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
class TestBindings:
    """What the C++ module refuses by itself, whoever calls it."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"temperature": 0.0}, "temperature"),
            ({"n": 0}, "empty"),
            ({"query": 0}, "null address"),
            ({"bank": 2}, "not aligned"),
            ({"scratch": 32}, "64 bytes"),
            ({"bank_dtype": "int8"}, "not int8"),
            ({"instruction_set": "mmx"}, "mmx"),
            ({"threads": 0}, "threads"),
        ],
    )
    def test_refuses(self, changes: dict[str, object], message: str) -> None:
        assert dispatch.native is not None
        x = torch.zeros(4096)
        address = -(-x.data_ptr() // 64) * 64
        names = ("query", "key", "bank", "loss", "rank", "lse", "dquery", "scratch")
        options = dict.fromkeys(names, address) | {"skip": 0, "dkey": 0, "n": 1, "d": 2, "k": 0, "skips": 0}
        options |= {"temperature": 0.1, "margin": 0.0, "normalized": True, "fixed_maximum": False}
        options |= {"bank_dtype": "float32", "instruction_set": "", "threads": 1}
        with pytest.raises(ValueError, match=message):
            dispatch.native.infonce(**(options | changes))
