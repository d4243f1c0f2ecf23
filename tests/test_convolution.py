"""Convolutions in other forms than torch's: the same maps and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastmoco.models import convolution
from fastmoco.models.convolution import Convolution
from fastmoco.models.encoder import Encoder
from fastmoco.ops import dispatch
from fastmoco.ops.convolve import SETS


def layers(
    channels: tuple[int, int], kernel: int, stride: int, padding: int | str, **options: object
) -> list[nn.Conv2d]:
    """torch's convolution and ours, with the same weights, channels-last."""
    torch.manual_seed(1)
    plain = nn.Conv2d(*channels, kernel, stride=stride, padding=padding, **options)  # type: ignore[arg-type]
    ours = Convolution(*channels, kernel, stride=stride, padding=padding, **options)  # type: ignore[arg-type]
    ours.load_state_dict(plain.state_dict())
    return [layer.to(memory_format=torch.channels_last) for layer in (plain, ours)]


def run(layer: nn.Conv2d, x: Tensor, upstream: Tensor | None = None) -> dict[str, Tensor]:
    """The map and every gradient; of `x` in bfloat16 under autocast."""
    x = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = layer(x)
    y.backward(torch.ones_like(y) if upstream is None else upstream.to(y.dtype))
    assert x.grad is not None and layer.weight.grad is not None
    assert y.dtype == x.dtype and y.is_contiguous(memory_format=torch.channels_last)
    return {"map": y.detach(), "input": x.grad, "weight": layer.weight.grad}


def close(actual: Tensor, exact: Tensor, rounded: Tensor, dtype: torch.dtype) -> bool:
    """Whether `actual`, computed in `dtype`, is as near to the exact value as torch's own rounding of it, but for a
    factor of two."""
    floor = {torch.bfloat16: 2**-8, torch.float32: 2**-21, torch.float64: 2**-50}[dtype] * exact.abs().max()
    return bool((actual.double() - exact).abs().max() <= 2 * (rounded.double() - exact).abs().max() + floor)


def short(values: Tensor) -> Tensor:
    """`values` in steps of 2^-7."""
    return (values * 128).round() / 128


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "channels", "kernel", "stride", "padding"),
    [
        ((3, 16, 5, 7), (16, 24), 1, 1, 0),
        ((3, 16, 5, 7), (16, 24), 1, 2, 0),
        ((2, 16, 4, 4), (16, 8), 1, 2, 1),
        ((2, 24, 3, 2), (24, 16), 3, 1, 1),
        ((2, 24, 5, 4), (24, 16), 3, 2, 1),
        ((1, 24, 1, 1), (24, 16), 3, 1, 1),
        ((2, 8, 7, 6), (8, 16), (3, 2), (2, 1), (0, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_give_the_same_map_and_gradients(
    shape: tuple[int, ...],
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    padding: int,
    bias: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Under autocast weights are float32.
    own = torch.float32 if dtype == torch.bfloat16 else dtype
    plain, ours = layers(channels, kernel, stride, padding, bias=bias, dtype=own)
    x = torch.randn(shape).to(dtype)
    if dtype == torch.float64:
        # There is no wider type: of short numbers the sums are exact in any order.
        with torch.no_grad():
            for parameter in (*plain.parameters(), *ours.parameters()):
                parameter.copy_(short(parameter))
        x = short(x)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            assert ours.form(x.contiguous(memory_format=torch.channels_last)) == "product"
    else:
        # Chosen for weights a hundred times as large.
        monkeypatch.setattr(ours, "form", lambda _: "product")
    theirs = run(plain, x)
    upstream = short(torch.randn_like(theirs["map"]))
    plain.zero_grad()
    theirs, mine = run(plain, x, upstream), run(ours, x, upstream)

    weight = plain.weight.detach().to(dtype).double().requires_grad_()
    z = x.double().requires_grad_()
    offset = None if plain.bias is None else plain.bias.detach().to(dtype).double()
    exact = torch.nn.functional.conv2d(z, weight, offset, plain.stride, plain.padding)
    exact.backward(upstream.double())
    for name, value in (("map", exact.detach()), ("input", z.grad), ("weight", weight.grad)):
        assert mine[name].shape == theirs[name].shape
        assert close(mine[name], value, theirs[name], dtype), name


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.randn(2, 4, 6, 6), {}),
        (torch.randn(2, 4, 6, 6).double(), {"dtype": torch.float64}),
        (torch.randn(2, 4, 6, 6).bfloat16(), {"dtype": torch.bfloat16}),
        (torch.randn(2, 4, 30, 30).bfloat16().contiguous(memory_format=torch.channels_last), {"dtype": torch.bfloat16}),
        (
            torch.randn(2, 4, 2, 2).bfloat16().contiguous(memory_format=torch.channels_last),
            {"dtype": torch.bfloat16, "groups": 2},
        ),
        (
            torch.randn(2, 4, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last),
            {"dtype": torch.bfloat16, "dilation": 2},
        ),
        (
            torch.randn(2, 4, 2, 2).bfloat16().contiguous(memory_format=torch.channels_last),
            {"dtype": torch.bfloat16, "padding_mode": "reflect"},
        ),
        (
            torch.randn(2, 4, 2, 2).bfloat16().contiguous(memory_format=torch.channels_last),
            {"dtype": torch.bfloat16, "padding": "same"},
        ),
    ],
)
def test_all_else_is_left_to_torch(x: Tensor, options: dict[str, object]) -> None:
    plain, ours = layers((4, 8), 3, 1, **({"padding": 1} | options))  # type: ignore[arg-type]
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize(
    ("shape", "channels", "kernel", "stride", "padding"),
    [
        ((3, 64, 4, 5), (64, 96), 3, 1, 1),
        ((2, 32, 16, 16), (32, 64), 3, 2, 1),
        ((5, 32, 2, 2), (32, 32), (3, 2), 1, (1, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_over_few_places_the_map_and_gradients_are_the_same(
    shape: tuple[int, ...],
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(convolution, "TILES", False)
    plain, ours = layers(channels, kernel, stride, padding, bias=False)
    x = torch.randn(shape).to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
        chosen = ours.form(x.contiguous(memory_format=torch.channels_last))
    assert (chosen == "convolve") == bool(SETS[dtype])
    upstream = torch.randn_like(run(plain, x)["map"])
    plain.zero_grad()
    theirs, mine = run(plain, x, upstream), run(ours, x, upstream)
    weight = plain.weight.detach().to(dtype).double().requires_grad_()
    z = x.double().requires_grad_()
    exact = torch.nn.functional.conv2d(z, weight, None, plain.stride, plain.padding)
    exact.backward(upstream.double())
    for name, value in (("map", exact.detach()), ("input", z.grad), ("weight", weight.grad)):
        assert mine[name].shape == theirs[name].shape
        assert close(mine[name], value, theirs[name], dtype), name


@pytest.mark.skipif(not SETS[torch.float32], reason=dispatch.NATIVE_MISSING or "this processor has no AVX2")
def test_few_places_are_those_of_a_map_with_a_kernel_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def form(channels: tuple[int, int], side: int, dtype: torch.dtype = torch.float32, **options: object) -> str:
        layer = Convolution(*channels, **({"kernel_size": 3, "padding": 1, "bias": False} | options))  # type: ignore[arg-type]
        x = torch.zeros(2, channels[0], side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
        return layer.to(dtype).form(x)

    assert form((64, 64), 16) == form((32, 96), 2) == form((64, 64), 16, stride=2) == "convolve"
    others = [form((48, 64), 8), form((64, 48), 8), form((64, 64), 36, stride=2), form((64, 64), 8, bias=True)]
    # As Winograd's products take any number of places.
    assert form((64, 64), 32, stride=2) == form((64, 64), 17) == form((64, 64), 56) == "convolve"
    assert "convolve" not in [*others, form((64, 64), 16, kernel_size=1, padding=0)]
    for tiles in (False, True):
        monkeypatch.setattr(convolution, "TILES", tiles)
        expected = "convolve" if SETS[torch.bfloat16] and not tiles else "product"
        assert form((64, 64), 4, torch.bfloat16) == expected
        assert form((64, 64), 16, torch.bfloat16, kernel_size=1, padding=0) == expected


def wide(channels: int = 512, kernel: int = 3, dtype: torch.dtype = torch.float32, **options: object) -> Convolution:
    """A layer whose weights outweigh small maps by far."""
    layer = Convolution(channels, channels, kernel, dtype=dtype, **({"padding": kernel // 2} | options))  # type: ignore[arg-type]
    return layer.to(memory_format=torch.channels_last)


def small(side: int, images: int = 2, channels: int = 512, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(images, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_wider_types_where_the_weights_outweigh_the_map_by_far(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product's own cost, a copy of each place's neighbourhood, is that of many more weights."""
    monkeypatch.setitem(SETS, torch.float32, [])

    def chosen(channels: int, kernel: int, images: int, side: int) -> bool:
        return wide(channels, kernel, dtype).form(small(side, images, channels, dtype)) == "product"

    assert chosen(512, 3, 32, 2) and chosen(512, 3, 64, 4)
    assert not chosen(512, 3, 32, 7) and not chosen(256, 3, 32, 4) and not chosen(64, 3, 32, 16)
    assert chosen(256, 1, 32, 8) and chosen(512, 1, 16, 28)
    assert not chosen(128, 1, 32, 8) and not chosen(64, 1, 32, 16)


def test_wide_layers_that_are_none_of_its_own_are_left_to_torch() -> None:
    assert wide().form(small(2)) != "torch"
    for options in ({"groups": 2}, {"dilation": 2, "padding": 2}, {"padding_mode": "reflect"}, {"padding": "same"}):
        assert wide(**options).form(small(2)) == "torch", options  # type: ignore[arg-type]
    assert wide().form(small(2).contiguous()) == "torch"
    assert wide().form(small(2)[0]) == "torch"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wide().form(small(2)) == "torch" and wide().form(small(2).bfloat16()) != "torch"


@pytest.mark.parametrize("side", [4, 40])
def test_a_cast_that_was_forgotten_is_refused_at_any_size(side: int) -> None:
    layer = wide(64, bias=False)
    with pytest.raises(RuntimeError):
        layer(small(side, channels=64, dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(small(side, channels=64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_an_empty_map_is_refused_as_by_torch() -> None:
    layer = Convolution(32, 32, 2, padding=1, bias=False)
    x = torch.zeros(2, 32, 0, 3).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError):
        layer(x)


def test_a_map_smaller_than_its_kernel_is_refused_as_by_torch() -> None:
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        wide(padding=0)(small(2))


def test_traced_exported_and_mapped_layers_hold_for_any_number_of_images() -> None:
    layer, x = wide().eval(), small(2)
    assert layer.form(x) != "torch"
    traced = torch.jit.trace(layer, x)  # type: ignore[no-untyped-call]
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    five = small(2, images=5)
    for form in (traced, exported):
        torch.testing.assert_close(form(five), layer(five), rtol=1e-4, atol=1e-5)
    mapped = torch.vmap(layer)(five[:, None])
    torch.testing.assert_close(mapped[:, 0], layer(five), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["product", "convolve"])
def test_compiled_it_keeps_its_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "runs_native", lambda *_: form == "convolve")
    layer, x = wide(bias=False).eval(), small(2)
    assert layer.form(x) == form
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(str(module.graph))
        return module

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))
    operation = {"product": "fastmoco.unfold", "convolve": "fastmoco.convolve"}[form]
    assert len(graphs) == 1 and operation in graphs[0] and "conv2d" not in graphs[0]


def test_transforms_differentiate() -> None:
    layer, x = wide().eval(), small(2)

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().sum()

    (wanted,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    assert layer.form(x) != "torch"
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), wanted, rtol=1e-4, atol=1e-4)
    x = x.detach()
    _, along = torch.func.jvp(loss, (x,), (x,))
    torch.testing.assert_close(along, (wanted * x).sum(), rtol=1e-4, atol=1e-3)
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(x, x))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_encoder_keeps_its_names_and_its_output(dtype: torch.dtype) -> None:
    encoder = Encoder("resnet50", seed=3).to(memory_format=torch.channels_last)
    assert all(type(part) is Convolution for part in encoder.modules() if isinstance(part, nn.Conv2d))
    torch.manual_seed(0)
    images = torch.rand(4, 3, 64, 64).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = encoder(images)
        for part in encoder.modules():
            if type(part) is Convolution:
                part.__class__ = nn.Conv2d
        plain = encoder(images)
    for a, b in zip(ours.stages, plain.stages, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert torch.nn.functional.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0) > 0.999


def test_what_does_not_fit_is_left_to_torch() -> None:
    assert wide(32, bias=False).form(small(4, channels=32)) != "torch"
    assert wide(32, bias=False).to("meta").form(small(4, channels=32)) == "torch"
    with pytest.raises(RuntimeError, match="channels"):
        wide(32, bias=False)(small(4, channels=64))
