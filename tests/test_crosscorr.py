"""ops.crosscorr against its definition in float64: losses, both gradients, both forms, all implementations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastmoco.errors import UserError
from fastmoco.losses import StageBarlow
from fastmoco.ops import crosscorr as module
from fastmoco.ops import definitions, dispatch
from fastmoco.ops.crosscorr import crosscorr
from parity import OPERATION, relative_error

NATIVE = ["native"] if dispatch.native is not None else []
IMPLEMENTATIONS = ["reference", *NATIVE]
# What computes in float32 refuses float64.
RUNS = [(name, dtype) for name in IMPLEMENTATIONS for dtype in OPERATION if (name, dtype) != ("native", torch.float64)]
FORMS = ["gram", "direct"]
# The least batch, odd ones, both sides of N = 0.75 D, a column alone, and beyond a vector register.
SIZES = [(2, 3), (5, 1), (7, 5), (4, 6), (4, 4), (5, 33), (33, 17), (31, 131), (65, 257)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Correlated, off-centre and of unequal columns, in the values that `dtype` can hold."""
    z1 = torch.randn(shape, dtype=torch.float64)
    z2 = 0.5 * z1 + torch.randn(shape, dtype=torch.float64)
    width = torch.linspace(0.5, 3, shape[-1], dtype=torch.float64)
    return (z1 * width + 1).to(dtype).requires_grad_(), (z2 - 2).to(dtype).requires_grad_()


def exact(z1: Tensor, z2: Tensor, weight: Tensor | None = None, **options: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and, of their sum weighted by `weight`, both gradients, in float64."""
    a, b = (z.detach().double().requires_grad_() for z in (z1, z2))
    stages = zip(a, b, strict=True) if a.ndim == 3 else [(a, b)]
    losses = torch.stack([definitions.crosscorr(x, y, **options) for x, y in stages])
    total = (losses if weight is None else losses * weight.double()).sum()
    return losses.view(a.shape[:-2]), *torch.autograd.grad(total, (a, b))


@pytest.mark.parametrize(("n", "d"), [(2, 3), (7, 5), (5, 33)])
@pytest.mark.parametrize("off_diagonal", [1.0, 0.005])
def test_the_definition_is_the_sum_over_pairs_of_columns(n: int, d: int, off_diagonal: float) -> None:
    z1, z2 = pair(n, d, dtype=torch.float64)

    def column(z: Tensor, j: int) -> list[float]:
        values = z[:, j].tolist()
        mean = math.fsum(values) / n
        variance = math.fsum((v - mean) ** 2 for v in values) / n
        return [(v - mean) / math.sqrt(variance + 1e-5) for v in values]

    expected = 0.0
    for i in range(d):
        for j in range(d):
            c = math.fsum(x * y for x, y in zip(column(z1, i), column(z2, j), strict=True)) / n
            expected += (c - 1) ** 2 if i == j else off_diagonal * c * c
    loss = definitions.crosscorr(z1, z2, off_diagonal=off_diagonal, scale=1 / 32)
    assert loss.item() == pytest.approx(expected / 32, rel=1e-10)


def test_in_the_papers_form_it_is_a_norm() -> None:
    z1, z2 = pair(6, 9, dtype=torch.float64)
    s1, s2 = (torch.nn.functional.batch_norm(z, None, None, training=True) for z in (z1, z2))
    norm = torch.linalg.matrix_norm(s1.T @ s2 / 6 - torch.eye(9, dtype=torch.float64)).square()
    assert crosscorr(z1, z2).item() == pytest.approx(norm.item(), rel=1e-12)


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize("off_diagonal", [1.0, 0.005])
def test_loss_and_gradients(
    implementation: str, form: str, dtype: torch.dtype, n: int, d: int, off_diagonal: float
) -> None:
    z1, z2 = pair(n, d, dtype=dtype)
    loss = crosscorr(z1, z2, off_diagonal=off_diagonal, scale=1 / 32, form=form, implementation=implementation)
    expected, *gradients = exact(z1, z2, off_diagonal=off_diagonal, scale=1 / 32)
    assert loss.shape == () and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(loss, expected) <= OPERATION[loss.dtype]
    loss.backward()
    for z, gradient in zip((z1, z2), gradients, strict=True):
        assert z.grad is not None and z.grad.dtype == dtype
        # Two images standardise to +1 and -1 whatever they are: what is left of a gradient is all rounding.
        if n > 2 or dtype == torch.float64:
            assert relative_error(z.grad, gradient) <= OPERATION[dtype]


@settings(max_examples=100)
@given(
    run=st.sampled_from(RUNS), s=st.integers(1, 4), n=st.integers(4, 40), d=st.integers(1, 300),
    form=st.sampled_from([None, *FORMS]), off_diagonal=st.sampled_from([0.0, 0.005, 0.5, 1.0, 2.0]),
)  # fmt: skip
def test_stages_are_independent(
    run: tuple[str, torch.dtype], s: int, n: int, d: int, form: str | None, off_diagonal: float
) -> None:
    implementation, dtype = run
    if form == "direct":
        # Only the Gram form can leave out what grows with the columns, and is what is taken for so few images.
        d = min(d, 8 * n)
    torch.manual_seed(n * d + s)
    z1, z2 = pair(s, n, d, dtype=dtype)
    weight = torch.linspace(-1, 2, s)
    losses = crosscorr(z1, z2, off_diagonal=off_diagonal, form=form, implementation=implementation)
    (losses * weight.to(losses.dtype)).sum().backward()
    expected, *gradients = exact(z1, z2, weight, off_diagonal=off_diagonal)
    assert losses.shape == (s,)
    # Where nothing off the diagonal counts and all is correlated, the loss is a difference from C_ii = 1.
    assert relative_error(losses / d, expected / d) <= OPERATION[losses.dtype] * max(1, d / expected.max().item())
    for z, gradient in zip((z1, z2), gradients, strict=True):
        assert z.grad is not None and relative_error(z.grad, gradient) <= OPERATION[dtype]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [32, 64, 256])
def test_at_the_papers_width_float32_keeps_six_digits(implementation: str, form: str, n: int) -> None:
    z1, z2 = pair(n, 512)
    loss = crosscorr(z1, z2, off_diagonal=0.005, form=form, implementation=implementation)
    loss.backward()
    expected, *gradients = exact(z1, z2, off_diagonal=0.005)
    assert relative_error(loss, expected) <= 1e-6
    for z, gradient in zip((z1, z2), gradients, strict=True):
        assert z.grad is not None and relative_error(z.grad, gradient) <= 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_stays_finite(implementation: str) -> None:
    """The sum over D x D entries overflows float16 at once; the arithmetic must not be done in it."""
    z = torch.randn(64, 512)
    value = definitions.crosscorr(z.double(), z.flip(0).double()).item()
    assert value > torch.finfo(torch.float16).max / 32
    loss = crosscorr(z.half(), z.flip(0).half(), implementation=implementation)
    assert loss.item() == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_one_side_alone_and_none(implementation: str, form: str) -> None:
    z1, z2 = pair(9, 14)
    both = torch.autograd.grad(crosscorr(z1, z2, form=form), (z1, z2))
    loss = crosscorr(z1, z2.detach(), form=form, implementation=implementation)
    assert relative_error(torch.autograd.grad(loss, z1)[0], both[0]) <= OPERATION[torch.float32]
    loss = crosscorr(z1.detach(), z2, form=form, implementation=implementation)
    assert relative_error(torch.autograd.grad(loss, z2)[0], both[1]) <= OPERATION[torch.float32]
    for loss in (crosscorr(z1.detach(), z2.detach(), form=form), torch.no_grad()(crosscorr)(z1, z2, form=form)):
        assert not loss.requires_grad
        assert relative_error(loss, exact(z1, z2)[0]) <= OPERATION[torch.float32]


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_is_computed_where_none_is_asked_for(form: str) -> None:
    run = module.dispatch.pick("crosscorr", torch.zeros(1))
    _, *gradients = run(*(z.detach() for z in pair(2, 9, 14)), 1.0, 1.0, form, False)
    assert [gradient.shape for gradient in gradients] == [(2, 0, 14)] * 2


def test_the_cheaper_form_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    forms: list[str] = []

    def spy(z1: Tensor, z2: Tensor, lam: float, scale: float, form: str, gradients: bool) -> tuple[Tensor, ...]:
        forms.append(form)
        return module.reference(z1, z2, lam, scale, form, gradients)

    monkeypatch.setattr(module.dispatch, "pick", lambda *_: spy)
    for n, d in ((5, 7), (6, 8), (7, 8)):
        crosscorr(*pair(n, d))
    assert forms == ["gram", "direct", "direct"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_backwards_repeat_and_accumulate(implementation: str, form: str) -> None:
    z1, z2 = pair(8, 13)
    kept = [z.detach().clone() for z in (z1, z2)]
    loss = crosscorr(z1, z2, form=form, implementation=implementation)
    loss.backward(retain_graph=True)
    assert z1.grad is not None and z2.grad is not None
    once = z1.grad.clone(), z2.grad.clone()
    (2 * loss).backward()
    torch.testing.assert_close((z1.grad, z2.grad), (3 * once[0], 3 * once[1]))
    assert all(torch.equal(z, copy) for z, copy in zip((z1, z2), kept, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_runs_repeat_to_the_last_bit(implementation: str, form: str) -> None:
    z1, z2 = pair(3, 37, 65)
    runs = []
    for _ in range(3):
        loss = crosscorr(z1, z2, form=form, implementation=implementation)
        runs.append(torch.cat([loss.flatten(), *(g.flatten() for g in torch.autograd.grad(loss.sum(), (z1, z2)))]))
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_views_of_other_memory_are_read_as_they_are(implementation: str) -> None:
    whole = torch.randn(4, 12, 10)
    z1, z2 = whole[::2].mT, whole[1::2, :, :].transpose(1, 2)
    assert not z1.is_contiguous()
    losses = crosscorr(z1, z2, implementation=implementation)
    assert relative_error(losses, exact(z1, z2)[0]) <= OPERATION[torch.float32]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_a_constant_column_has_a_finite_gradient(implementation: str, form: str) -> None:
    z1, z2 = pair(6, 5)
    with torch.no_grad():
        z1[:, 2] = 3.0
    gradients = torch.autograd.grad(crosscorr(z1, z2, form=form, implementation=implementation), (z1, z2))
    for actual, expected in zip(gradients, exact(z1, z2)[1:], strict=True):
        assert relative_error(actual, expected) <= OPERATION[torch.float32]


def test_autocast_leaves_the_arithmetic_alone() -> None:
    z1, z2 = pair(9, 24)
    loss = crosscorr(z1, z2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = crosscorr(z1, z2)
    assert torch.equal(inside, loss)
    narrow = z1.detach().bfloat16().requires_grad_()
    mixed = crosscorr(narrow, z2)
    mixed.backward()
    assert mixed.dtype == torch.float32
    assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7), (5, 7)])
def test_operation_keeps_torchs_contract(form: str, gradients: bool, shape: tuple[int, ...]) -> None:
    z1, z2 = (z.requires_grad_(gradients) for z in pair(*shape))
    torch.library.opcheck(module._crosscorr.overload, (z1, z2, 0.5, 1.0, form, gradients, None))


@pytest.mark.parametrize("form", [None, *FORMS])
def test_compiles_into_one_graph(form: str | None) -> None:
    def step(z1: Tensor, z2: Tensor) -> Tensor:
        return (crosscorr(z1 * 2, z2, off_diagonal=0.5, form=form) * 3).sum()

    z1, z2 = pair(2, 5, 7)
    expected = torch.autograd.grad(step(z1, z2), (z1, z2))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(z1, z2), (z1, z2)), expected)


def test_mistakes_are_named() -> None:
    z = torch.randn(3, 4)
    with pytest.raises(ValueError, match="batch of 1"):
        crosscorr(z[:1], z[:1])
    with pytest.raises(ValueError, match="batch of 0"):
        crosscorr(z[:0], z[:0])
    with pytest.raises(ValueError, match=r"one shape, not \(3, 4\) and \(3, 3\)"):
        crosscorr(z, z[:, :3])
    with pytest.raises(ValueError, match=r"\(S, N, D\)"):
        crosscorr(z[0], z[0])
    with pytest.raises(ValueError, match="one device, not cpu and meta"):
        crosscorr(z, z.to("meta"))
    for empty in (z[:, :0], z[None][:0]):
        with pytest.raises(ValueError, match="are empty"):
            crosscorr(empty, empty)
    with pytest.raises(ValueError, match="floating"):
        crosscorr(z.long(), z)
    with pytest.raises(ValueError, match='form must be "gram", "direct" or None, not \'dual\''):
        crosscorr(z, z, form="dual")
    with pytest.raises(UserError, match="implementation"):
        crosscorr(z, z, implementation="nonsense")
    for name in NATIVE:
        with pytest.raises(UserError, match="too narrow for float64"):
            crosscorr(z.double(), z, implementation=name)


def test_a_second_derivative_is_refused() -> None:
    z = torch.randn(5, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*definitions\.crosscorr"):
        torch.autograd.grad(crosscorr(z * z, z), z, create_graph=True)


class TestStageBarlow:
    def test_each_stage_has_its_own_loss_and_trains_its_own_projector(self) -> None:
        widths = (6, 10, 14, 18)
        query, key = ([torch.randn(5, c, 4, 4) for c in widths] for _ in range(2))
        losses = StageBarlow([4, 2], widths, weight=3.0, scale=0.5, off_diagonal=0.005, projector_width=12)
        named = losses(query, key)
        assert list(named) == ["stage4", "stage2"] and all(loss.shape == () for loss in named.values())
        for name, loss in named.items():
            s = int(name[-1]) - 1
            z1, z2 = losses.projectors[name](*(maps[s].mean(dim=(2, 3)) for maps in (query, key)))
            expected = 3.0 * definitions.crosscorr(z1.double(), z2.double(), off_diagonal=0.005, scale=0.5)
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
            parameters = list(losses.projectors[name].parameters())
            gradients = torch.autograd.grad(loss, list(losses.parameters()), allow_unused=True, retain_graph=True)
            reached = sum(g is not None and g.abs().sum() > 0 for g in gradients)
            assert reached == len(parameters)
