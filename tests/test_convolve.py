"""Convolutions of maps of few places: against torch's in float64, and against themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from fastmoco.errors import UserError
from fastmoco.ops import convolve as module
from fastmoco.ops import convolve_native, dispatch
from fastmoco.ops.convolve import SETS, convolve

Pair = tuple[int, int]
Shape = tuple[int, int, int, int]
# Map, weights, stride, padding: places with all taps, some and none; odd numbers of images, lines and columns; parts of
# a tile; a kernel over one place, one that is wider than the map, windows that lie apart and that meet only padding.
CASES: list[tuple[Shape, Shape, Pair, Pair]] = [
    ((5, 64, 5, 6), (32, 64, 3, 3), (1, 1), (1, 1)),
    ((32, 32, 2, 2), (64, 32, 3, 3), (1, 1), (1, 1)),
    ((3, 32, 9, 16), (96, 32, 3, 3), (2, 2), (1, 1)),
    ((2, 32, 7, 5), (32, 32, 1, 1), (2, 3), (0, 0)),
    ((1, 32, 1, 1), (32, 32, 3, 3), (1, 1), (1, 1)),
    ((4, 32, 2, 3), (32, 32, 3, 5), (1, 2), (4, 3)),
    ((3, 32, 9, 8), (32, 32, 2, 2), (4, 3), (0, 1)),
    ((7, 32, 7, 1), (64, 32, 7, 1), (1, 1), (0, 0)),
    ((0, 32, 4, 4), (32, 32, 3, 3), (1, 1), (1, 1)),
]
# Few channels, as images have: lines of even and odd numbers, a kernel of one place, padding that fills no word.
FEW: list[tuple[Shape, Shape, Pair, Pair]] = [
    ((3, 3, 17, 20), (64, 3, 7, 7), (2, 2), (3, 3)),
    ((2, 3, 9, 8), (32, 3, 3, 3), (1, 2), (0, 1)),
    ((2, 1, 9, 12), (96, 1, 5, 4), (1, 2), (2, 0)),
    ((2, 4, 5, 6), (32, 4, 1, 1), (1, 1), (0, 0)),
    ((5, 31, 2, 3), (32, 31, 3, 5), (3, 2), (1, 4)),
    ((0, 3, 4, 4), (32, 3, 3, 3), (2, 2), (1, 1)),
]
# What C++ does not take.
ODD: tuple[Shape, Shape, Pair, Pair] = ((3, 6, 5, 4), (5, 6, 3, 2), (2, 1), (1, 1))
NATIVE = [pytest.param(dtype, name, id=name) for dtype, names in SETS.items() for name in names]
SOME = pytest.mark.skipif(not NATIVE, reason=dispatch.NATIVE_MISSING or "this processor has no AVX2")


@pytest.fixture
def one_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """C++ by one instruction set alone; its dtype."""
    dtype, name = request.param
    monkeypatch.setitem(SETS, dtype, [name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def each_set() -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "one_set", [pytest.param((mark.values[0], mark.values[1]), id=str(mark.id)) for mark in NATIVE], indirect=True
    )


def given(case: tuple[Shape, Shape, Pair, Pair], dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A map, weights, and a gradient to the result, channels-last."""
    shape, weights, stride, padding = case
    generator = torch.Generator().manual_seed(seed)

    def drawn(size: tuple[int, ...]) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    x, weight = drawn(shape), drawn(weights)
    meta = conv2d(x.to("meta"), weight.to("meta"), None, stride, padding)
    return x, weight, drawn(tuple(meta.shape))


def all_three(case: tuple[Shape, Shape, Pair, Pair], dtype: torch.dtype, implementation: str | None) -> list[Tensor]:
    """The result and both gradients."""
    x, weight, dy = given(case, dtype)
    x.requires_grad_(), weight.requires_grad_()
    y = convolve(x, weight, stride=case[2], padding=case[3], implementation=implementation)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def exact(case: tuple[Shape, Shape, Pair, Pair], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """As all_three, torch's in float64 of the same rounded numbers, each with the sums of the products' sizes."""

    def torchs(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
        y = conv2d(x, weight, None, case[2], case[3])
        return [y, *torch.autograd.grad(y, (x, weight), dy)]

    tensors = [tensor.double() for tensor in given(case, dtype)]
    values, sizes = (
        torchs(*(change(t).detach().requires_grad_(i < 2) for i, t in enumerate(tensors)))
        for change in (torch.clone, torch.abs)
    )
    return [(value.detach(), size.detach()) for value, size in zip(values, sizes, strict=True)]


def check(found: list[Tensor], case: tuple[Shape, Shape, Pair, Pair], dtype: torch.dtype) -> None:
    # Sums of up to some hundred products in float32, then rounded once.
    rounded = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}[dtype]
    summed = 2.0**-50 if dtype == torch.float64 else 2.0**-21
    for actual, (value, size) in zip(found, exact(case, dtype), strict=True):
        assert actual.dtype == dtype and actual.shape == value.shape
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert ((actual.double() - value).abs() <= rounded * value.abs() + summed * size).all()


@SOME
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [*CASES, *FEW])
@each_set()
def test_cpp_sums_what_the_definition_does(case: tuple[Shape, Shape, Pair, Pair], one_set: torch.dtype) -> None:
    check(all_three(case, one_set, "native"), case, one_set)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [*CASES, *FEW, ODD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_does(case: tuple[Shape, Shape, Pair, Pair], dtype: torch.dtype) -> None:
    check(all_three(case, dtype, "reference"), case, dtype)


@SOME
@pytest.mark.parametrize("case", [((9, 64, 7, 6), (96, 64, 3, 3), (1, 1), (1, 1)), FEW[0]])
@each_set()
def test_any_number_of_threads_gives_the_same_bits(case: tuple[Shape, Shape, Pair, Pair], one_set: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            # Of few channels the gradients are torch's.
            found.append(all_three(case, one_set, "native")[: 1 if case in FEW else 3])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@SOME
@each_set()
def test_long_sums_keep_their_places(one_set: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More lines than are summed at a time, more channels than stay near, and weights in several ranges."""
    # Winograd's products, chosen at these sizes, have tests of their own.
    monkeypatch.setattr(convolve_native, "fewer_products", lambda *_, **__: False)
    case: tuple[Shape, Shape, Pair, Pair] = ((17, 512, 3, 19), (64, 512, 3, 3), (1, 1), (1, 1))
    check(all_three(case, one_set, "native"), case, one_set)
    check(all_three(wide := ((3, 64, 16, 16), (512, 64, 3, 3), (1, 1), (1, 1)), one_set, "native"), wide, one_set)


@SOME
@each_set()
def test_nan_and_infinity_stay_where_they_are_used(one_set: torch.dtype) -> None:
    x, weight, _ = given(CASES[0], one_set)
    x[1, 3, 0, 0], x[2, 5, 4, 5] = torch.nan, torch.inf
    y = convolve(x, weight, padding=(1, 1), implementation="native")
    wanted = conv2d(x.double(), weight.double(), None, 1, 1)
    assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.isinf(), wanted.isinf())
    assert 0 < y.isnan().sum() < y.numel() and y.isinf().any()


@SOME
@each_set()
def test_nan_in_few_channels_reaches_all_that_uses_it(one_set: torch.dtype) -> None:
    """And, in bfloat16, at most the place before: a line of odd length is multiplied with one number more."""
    x, weight, _ = given(FEW[0], one_set)
    # Behind a window of stride 2 is always an even column.
    x[1, 0, 8, 10] = torch.nan
    y = convolve(x, weight, stride=(2, 2), padding=(3, 3), implementation="native").isnan()
    wanted = conv2d(x.double(), weight.double(), None, 2, 3).isnan()
    assert (y | ~wanted).all() and wanted.any()
    beyond = y & ~wanted
    assert beyond.any() == (one_set == torch.bfloat16)
    assert not beyond[..., -1].any() and (~beyond[..., :-1] | wanted[..., 1:]).all()


@SOME
@each_set()
def test_maps_and_gradients_in_any_layout(one_set: torch.dtype) -> None:
    x, weight, dy = given(CASES[0], one_set)
    wanted = all_three(CASES[0], one_set, "native")
    x, weight = (tensor.contiguous().requires_grad_() for tensor in (x, weight))
    y = convolve(x, weight, padding=(1, 1), implementation="native")
    found = [y, *torch.autograd.grad(y, (x, weight), dy.contiguous())]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_what_is_asked_for_has_a_gradient(frozen: int) -> None:
    x, weight, dy = given(CASES[0], torch.float32)
    leaf = (weight, x)[frozen].requires_grad_()
    (gradient,) = torch.autograd.grad(convolve(x, weight, padding=(1, 1)), leaf, dy)
    assert torch.equal(gradient, all_three(CASES[0], torch.float32, None)[2 - frozen])


def test_derivatives_of_any_order() -> None:
    x, weight, _ = given(ODD, torch.float64)
    x, weight = x[:1, :2].requires_grad_(), weight[:2, :2].requires_grad_()

    def cubes(x: Tensor, weight: Tensor) -> Tensor:
        return convolve(x, weight, stride=(2, 1), padding=(1, 1)).pow(3)

    assert torch.autograd.gradcheck(cubes, (x, weight))
    assert torch.autograd.gradgradcheck(cubes, (x, weight))


@SOME
@each_set()
def test_cpp_has_the_second_derivatives_of_the_definition(one_set: torch.dtype) -> None:
    found = []
    for implementation, dtype in (("native", one_set), ("reference", torch.float64)):
        x, weight, dy = (tensor.to(dtype).requires_grad_() for tensor in given(CASES[0], one_set))
        y = convolve(x, weight, padding=(1, 1), implementation=implementation)
        gradients = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
        into = [torch.ones_like(gradient) for gradient in gradients]
        found.append(torch.autograd.grad(gradients, (x, weight, dy), into))
    for actual, wanted in zip(*found, strict=True):
        error = (actual.double() - wanted).abs().max() / wanted.abs().max()
        assert error <= (2.0**-7 if one_set == torch.bfloat16 else 2.0**-20)


@pytest.mark.parametrize("implementation", ["reference", None])
def test_registration(implementation: str | None) -> None:
    x, weight, dy = (tensor.requires_grad_() for tensor in given(CASES[0], torch.float32))
    how = ((1, 1), (1, 1), implementation)
    torch.library.opcheck(torch.ops.fastmoco.convolve.default, (x, weight, *how))
    torch.library.opcheck(torch.ops.fastmoco.convolve_map_gradient.default, (dy, weight, x.shape, *how))
    torch.library.opcheck(torch.ops.fastmoco.convolve_weight_gradient.default, (x, dy, weight.shape, *how))


def test_one_compilation_holds_for_all_sizes() -> None:
    compiled = torch.compile(
        lambda x, weight: convolve(x, weight, padding=(1, 1)), fullgraph=True, backend="eager", dynamic=True
    )
    for case in (CASES[0], CASES[1]):
        x, weight, _ = given(case, torch.float32)
        assert torch.equal(compiled(x, weight), convolve(x, weight, padding=(1, 1)))


def test_transforms_are_refused_rather_than_given_no_derivative() -> None:
    x, weight, _ = given(CASES[0], torch.float32)
    with pytest.raises(RuntimeError, match="no derivatives for torch"):
        torch.func.jvp(lambda x: convolve(x, weight).sum(), (x,), (x,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, r"x must be \(N, C, H, W\)"),
        ({"weight": torch.zeros(2, 4, 3, 3)}, r"not \(1, 3, 4, 4\) and \(2, 4, 3, 3\)"),
        ({"weight": torch.zeros(2, 3, 3, 3).double()}, "one floating dtype"),
        ({"x": torch.zeros(1, 3, 4, 4).long(), "weight": torch.zeros(2, 3, 3, 3).long()}, "one floating dtype"),
        ({"weight": torch.zeros(2, 3, 5, 3)}, "does not fit"),
        ({"weight": torch.zeros(2, 3, 0, 3)}, "at least 1"),
        ({"stride": (0, 1)}, "at least 1"),
        ({"padding": (-1, 0)}, "padding .* at least 0"),
        ({"stride": 2}, "two numbers each"),
        ({"padding": (1,)}, "two numbers each"),
    ],
)
def test_refuses(changes: dict[str, object], message: str) -> None:
    tensors = {"x": torch.zeros(1, 3, 4, 4), "weight": torch.zeros(2, 3, 3, 3)} | changes
    with pytest.raises(ValueError, match=message):
        convolve(**tensors)  # type: ignore[arg-type]


@SOME
def test_cpp_that_cannot_is_refused_and_otherwise_passed_over() -> None:
    x, weight, _ = given(ODD, torch.float32)
    assert torch.equal(convolve(x, weight), convolve(x, weight, implementation="reference"))
    with pytest.raises(ValueError, match="words of 4 bytes, not 6 and 5"):
        convolve(x, weight, implementation="native")
    odd = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16), torch.zeros(32, 3, 1, 1, dtype=torch.bfloat16)
    if SETS[torch.bfloat16]:
        with pytest.raises(ValueError, match="words of 4 bytes, not 3 and 32"):
            convolve(*odd, implementation="native")
    assert torch.equal(convolve(*odd), convolve(*odd, implementation="reference"))
    with pytest.raises(UserError, match="too narrow for float64"):
        convolve(x.double(), weight.double(), implementation="native")


@SOME
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 0}, "null address"),
        ({"x": 2}, "not aligned"),
        ({"map": (1, 2, 2, 16)}, "multiples of 32"),
        ({"out": 48}, "multiples of 32, not 32 and 48"),
        ({"out": 0}, "multiples of 32"),
        ({"map": (1, 2, 2, 0)}, "multiples of 32"),
        ({"kernel": (3, 3)}, "larger than the padded map"),
        ({"kernel": (0, 1)}, "at least 1"),
        ({"stride": (1, 0)}, "at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"dtype": "float64"}, "dtype must be bfloat16 or float32, not float64"),
        ({"instruction_set": "mmx"}, 'no instruction set "mmx"'),
    ],
)
def test_bindings_refuse(changes: dict[str, object], message: str) -> None:
    x, weights, y = torch.zeros(1, 2, 2, 32), torch.zeros(32, 1, 1, 32), torch.zeros(1, 2, 2, 32)
    sizes = {"map": (1, 2, 2, 32), "out": 32, "kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "threads": 1}
    addresses = {"x": x.data_ptr(), "weights": weights.data_ptr(), "y": y.data_ptr()}
    how = {"dtype": "float32", "instruction_set": SETS[torch.float32][0]}
    assert dispatch.native is not None
    with pytest.raises(ValueError, match=message):
        dispatch.native.convolve(**(addresses | sizes | how | changes))


@SOME
@pytest.mark.parametrize("changes", [{"map": (1, 2, 2, 0)}, {"out": 48}, {"dtype": "bfloat16", "stride": (2, 1)}])
def test_bindings_refuse_few_channels_that_do_not_fit(changes: dict[str, object]) -> None:
    tensor = torch.zeros(64)
    sizes = {"map": (1, 2, 2, 3), "out": 32, "kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "threads": 1}
    how = {"dtype": "float32", "instruction_set": SETS[torch.float32][0]}
    assert dispatch.native is not None
    with pytest.raises(ValueError, match="whole words"):
        dispatch.native.convolve_few(*[tensor.data_ptr()] * 3, **(sizes | how | changes))


def test_every_implementation_is_registered() -> None:
    for name, definition, fast in module._IMPLEMENTATIONS:
        assert dispatch.pick(name, torch.zeros(1, dtype=torch.float64)) is definition
        for dtype, names in SETS.items():
            assert dispatch.pick(name, torch.zeros(1, dtype=dtype)) is (fast if names else definition)


def test_many_gradients_at_once() -> None:
    x, weight, dy = (tensor.requires_grad_() for tensor in given(CASES[0], torch.float32))
    y = convolve(x, weight, padding=(1, 1))
    many = torch.stack([dy.detach(), 2 * dy.detach()])
    found = torch.autograd.grad(y, (x, weight), many, is_grads_batched=True, retain_graph=True)
    for gradient, one in zip(found, torch.autograd.grad(y, (x, weight), dy, create_graph=True), strict=True):
        torch.testing.assert_close(gradient, torch.stack([one, 2 * one]), rtol=1e-4, atol=1e-3)
        # And of the gradients.
        into = torch.stack([torch.ones_like(one), torch.zeros_like(one)])
        for second in torch.autograd.grad(
            one, (x, weight, dy), into, is_grads_batched=True, retain_graph=True, allow_unused=True
        ):
            assert second is None or (second[0].any() and not second[1].any())


def test_the_reference_is_no_narrower_under_autocast() -> None:
    x, weight, _ = given(CASES[0], torch.float32)
    wanted = convolve(x, weight, implementation="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(convolve(x, weight, implementation="reference"), wanted)


@SOME
@each_set()
def test_parts_of_tensors_may_begin_anywhere(one_set: torch.dtype) -> None:
    x, weight, dy = given(CASES[0], one_set)
    moved = []
    for tensor in (x, weight, dy):
        inner = torch.empty(tensor.numel() + 1, dtype=one_set)[1:]
        n, c, h, w = tensor.shape
        moved.append(inner.view(n, h, w, c).permute(0, 3, 1, 2).copy_(tensor))
    leaves = [tensor.requires_grad_() for tensor in moved[:2]]
    y = convolve(*leaves, padding=(1, 1), implementation="native")
    found = [y, *torch.autograd.grad(y, leaves, moved[2])]
    assert all(torch.equal(a, b) for a, b in zip(found, all_three(CASES[0], one_set, "native"), strict=True))
