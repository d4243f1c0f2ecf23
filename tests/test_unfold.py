"""The windows of a map as rows, and their sums: against torch's own operations of these names, and the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastmoco.ops import dispatch
from fastmoco.ops import unfold as module
from fastmoco.ops.unfold import unfold, windows

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
)
Pair = tuple[int, int]
# Shape, kernel, stride, padding: windows that overlap, meet, lie apart, stand over nothing but padding, and one alone.
CASES: list[tuple[tuple[int, ...], Pair, Pair, Pair]] = [
    ((3, 5, 6, 7), (3, 3), (1, 1), (1, 1)),
    ((2, 130, 2, 2), (3, 3), (1, 1), (1, 1)),
    ((2, 257, 5, 4), (3, 3), (2, 2), (1, 1)),
    ((2, 3, 9, 8), (1, 1), (2, 2), (0, 0)),
    ((2, 4, 8, 9), (2, 3), (2, 3), (0, 0)),
    ((2, 4, 9, 10), (2, 2), (4, 3), (0, 1)),
    ((1, 1, 1, 1), (3, 3), (1, 1), (1, 1)),
    ((2, 3, 2, 3), (3, 5), (1, 2), (4, 3)),
    ((1, 6, 7, 1), (7, 1), (1, 1), (0, 0)),
]


def image(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, *, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def torchs(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """torch's unfold of a float64 map, its rows and columns in our order."""
    columns = functional.unfold(x.contiguous(), kernel, stride=stride, padding=padding)
    n, _, count = columns.shape
    parts = columns.view(n, x.shape[1], kernel[0] * kernel[1], count)
    return parts.permute(0, 3, 2, 1).reshape(n * count, -1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("implementation", ["reference", NATIVE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), CASES)
def test_rows_and_sums_are_torchs(
    shape: tuple[int, ...], kernel: Pair, stride: Pair, padding: Pair, dtype: torch.dtype, implementation: str
) -> None:
    x = image(shape, dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    rows = unfold(x, kernel, stride=stride, padding=padding, implementation=implementation)
    wanted = torchs(exact, kernel, stride, padding)
    assert rows.dtype == dtype and rows.is_contiguous()
    assert torch.equal(rows.double(), wanted)
    upstream = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    (gradient,) = torch.autograd.grad(rows, x, upstream)
    (exact_gradient,) = torch.autograd.grad(wanted, exact, upstream.double())
    assert gradient.dtype == dtype and gradient.is_contiguous(memory_format=torch.channels_last)
    # Rounded once, after sums of at most 15 numbers in float32 or wider.
    unit = {torch.float64: 2.0**-49, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8}[dtype]
    assert (
        (gradient.double() - exact_gradient).abs() <= unit * exact_gradient.abs() + 2.0**-20 * (unit > 2.0**-49)
    ).all()


@pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), CASES)
def test_cpp_adds_up_as_the_reference_does_for_any_number_of_threads(
    shape: tuple[int, ...], kernel: Pair, stride: Pair, padding: Pair, dtype: torch.dtype
) -> None:
    """To the last bit but for the sign of zero; NaN, infinity and maps for several threads too."""
    shape = (shape[0] * 3, shape[1] * 17, *shape[2:])
    x = image(shape, dtype)
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = torch.nan, torch.inf
    rows = module.reference_unfold(x, kernel, stride, padding)
    summed = module.reference_fold(rows, shape, kernel, stride, padding)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            again = module._native_unfold(x, kernel, stride, padding)
            torch.testing.assert_close(again, rows, rtol=0, atol=0, equal_nan=True)
            sums = module._native_fold(rows, shape, kernel, stride, padding)
            torch.testing.assert_close(sums, summed, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
def test_a_map_that_is_not_channels_last_is_read_in_its_own_order(implementation: str) -> None:
    x = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5)
    rows = unfold(x[:, :, ::2], (2, 2), stride=(1, 2), implementation=implementation)
    assert torch.equal(rows.double(), torchs(x[:, :, ::2].double(), (2, 2), (1, 2), (0, 0)))
    gradients = []
    for y in (x, x.transpose(2, 3).clone().transpose(2, 3)):
        y.requires_grad_()
        (gradient,) = torch.autograd.grad(unfold(y, (2, 2), implementation=implementation).sum(), y)
        gradients.append(gradient)
    whole, part = gradients
    assert torch.equal(whole, part) and whole[0, 0].tolist()[0] == [1, 2, 2, 2, 1]


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
def test_a_gradient_in_any_layout_is_added_up(implementation: str) -> None:
    x = image((2, 3, 5, 4)).requires_grad_()
    rows = unfold(x, (2, 2), implementation=implementation)
    upstream = torch.randn(rows.shape[::-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64).t()
    across, along = (torch.autograd.grad(rows, x, u, retain_graph=True)[0] for u in (upstream, upstream.contiguous()))
    assert not upstream.is_contiguous() and torch.equal(across, along)


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
def test_derivatives_of_any_order(implementation: str) -> None:
    x = image((2, 3, 5, 4)).requires_grad_()

    def squares(x: Tensor) -> Tensor:
        return unfold(x, (3, 2), stride=(2, 1), padding=(1, 1), implementation=implementation).pow(3)

    assert torch.autograd.gradcheck(squares, x)
    assert torch.autograd.gradgradcheck(squares, x)


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype: torch.dtype, implementation: str) -> None:
    x = image((2, 3, 5, 4), dtype).requires_grad_()
    torch.library.opcheck(torch.ops.fastmoco.unfold.default, (x, (3, 2), (2, 1), (1, 0), implementation))
    rows = unfold(x, (3, 2), stride=(2, 1), padding=(1, 0)).detach().requires_grad_()
    torch.library.opcheck(torch.ops.fastmoco.fold.default, (rows, (2, 3, 5, 4), (3, 2), (2, 1), (1, 0), implementation))


def test_compiles_whole() -> None:
    def function(x: Tensor) -> Tensor:
        return unfold(x, (3, 3), padding=(1, 1)).square().sum()

    x = image((2, 3, 5, 4), torch.float32).requires_grad_()
    (plain,) = torch.autograd.grad(function(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(x), x)
    assert torch.equal(plain, compiled)


def test_one_compilation_holds_for_all_sizes() -> None:
    compiled = torch.compile(lambda x: unfold(x, (3, 3), padding=(1, 1)), fullgraph=True, backend="eager", dynamic=True)
    for shape in [(2, 3, 5, 4), (3, 5, 7, 6), (4, 2, 9, 8)]:
        assert torch.equal(compiled(image(shape)), unfold(image(shape), (3, 3), padding=(1, 1)))


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
def test_rows_may_be_written_to(implementation: str) -> None:
    x = image((2, 3, 5, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(unfold(x, (2, 2), implementation=implementation).mul_(2).sum(), x)
    assert gradient[0, 0, 1, 1] == 8


def test_transforms_are_refused_rather_than_given_no_derivative() -> None:
    x = image((2, 3, 5, 4))
    with pytest.raises(RuntimeError, match="no derivatives for torch"):
        torch.func.jvp(lambda x: unfold(x, (2, 2)).sum(), (x,), (x,))


def test_windows_are_counted_as_torch_does() -> None:
    for side, kernel, stride, padding in [(7, 3, 2, 1), (5, 5, 1, 0), (4, 3, 3, 2)]:
        x = torch.zeros(1, 1, side, side)
        counted = functional.conv2d(x, torch.zeros(1, 1, kernel, kernel), stride=stride, padding=padding).shape[2]
        assert windows(side, kernel, stride, padding) == counted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 4, 4)}, r"x must be a floating \(N, C, H, W\)"),
        ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.long)}, "floating"),
        ({"kernel": (5, 3)}, r"a kernel of \(5, 3\) does not fit"),
        ({"kernel": (3, 0)}, "at least 1"),
        ({"stride": (0, 1)}, "at least 1"),
        ({"padding": (-1, 0)}, "padding .* at least 0"),
        ({"kernel": (3, 3, 3)}, "two numbers each"),
        ({"kernel": 3}, "two numbers each"),
        ({"padding": (1,)}, "two numbers each"),
    ],
)
def test_refuses(changes: dict[str, object], message: str) -> None:
    given = {"x": torch.zeros(1, 3, 4, 4), "kernel": (3, 3)} | changes
    with pytest.raises(ValueError, match=message):
        unfold(**given)  # type: ignore[arg-type]


@pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 0}, "null address"),
        ({"kernel": (3, 4)}, "larger than the padded map"),
        ({"kernel": (0, 1)}, "at least 1"),
        ({"stride": (1, 0)}, "at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"dtype": "float16"}, "dtype must be bfloat16, float32 or float64, not float16"),
    ],
)
def test_bindings_refuse(changes: dict[str, object], message: str) -> None:
    x, rows = torch.zeros(1, 2, 3, 1), torch.zeros(2 * 3, 2)
    sizes = {"map": (1, 2, 3, 1), "kernel": (1, 2), "stride": (1, 1), "padding": (0, 0), "threads": 1}
    addresses = {"x": x.data_ptr(), "rows": rows.data_ptr()}
    given = addresses | sizes | {"dtype": "float32"} | changes
    assert dispatch.native is not None
    with pytest.raises(ValueError, match=message):
        dispatch.native.fold(**given)
    if "dtype" not in changes:
        given.pop("dtype")
        with pytest.raises(ValueError, match=message):
            dispatch.native.unfold(**given, element=4)
