"""Batch normalisation with an addition and ReLU in one operation, against torch's own in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet as torchvision

from fastmoco.models import convolve_norm
from fastmoco.models import norm as blocks
from fastmoco.models.encoder import Encoder
from fastmoco.models.resnet import BasicBlock, Bottleneck
from fastmoco.ops import dispatch
from fastmoco.ops.batch_norm import batch_norm
from fastmoco.ops.running_statistics import track

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
)
SHAPES = [(2, 3, 1, 1), (3, 1, 5, 7), (2, 257, 3, 1), (5, 33, 8, 13), (2, 300, 17, 16), (1, 8, 1, 2)]
# Of channels in whole vectors, for which bfloat16 has instructions of its own on some processors.
SHAPES += [(3, 32, 5, 7), (5, 32, 8, 13), (3, 288, 9, 1), (2, 320, 17, 16)]
# More than a tile is wide.
SHAPES += [(2, 2101, 9, 5), (3, 2080, 7, 4)]
NAMES = ("x", "weight", "bias", "residual")
# Half a unit in the last place.
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-24}


def inputs(shape: tuple[int, ...], *, residual: bool, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def draw(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def image(values: Tensor) -> Tensor:
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    wide = torch.promote_types(dtype, torch.float32)
    x = image(2 * draw(shape) + 3 * draw((1, shape[1], 1, 1)))
    weight, bias = draw((shape[1],)).to(wide), draw((shape[1],)).to(wide)
    return {"x": x, "weight": weight, "bias": bias, "residual": image(draw(shape)) if residual else None}


def differentiate(
    function: Callable[..., tuple[Tensor, Tensor | None]], given: dict[str, Tensor | None], upstream: Tensor
) -> dict[str, Tensor]:
    """y, the statistics where there are any, and the gradient to everything given."""
    leaves = {name: value.clone().requires_grad_() for name, value in given.items() if value is not None}
    y, statistics = function(**(given | leaves))
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))
    results = {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))
    return results if statistics is None else results | {"statistics": statistics}


def exact(given: dict[str, Tensor | None], upstream: Tensor, relu: bool) -> dict[str, Tensor]:
    """torch's own three operations in float64."""
    wide = {name: None if value is None else value.double() for name, value in given.items()}

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = functional.batch_norm(x, None, None, weight, bias, training=True)
        y = y if residual is None else y + residual
        return y.relu() if relu else y, None

    results = differentiate(function, wide, upstream)
    x = wide["x"]
    assert x is not None
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    unbiased = torch.var(x, dim=(0, 2, 3))
    return results | {"statistics": torch.stack([mean, (variance + 1e-5).rsqrt(), unbiased])}


def fused(implementation: str | None, relu: bool) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return lambda x, weight, bias, residual: batch_norm(
        x, weight, bias, residual=residual, relu=relu, implementation=implementation
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("implementation", ["reference", NATIVE])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_every_gradient(
    shape: tuple[int, ...], residual: bool, relu: bool, implementation: str, dtype: torch.dtype
) -> None:
    given = inputs(shape, residual=residual, dtype=dtype)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine, wanted = differentiate(fused(implementation, relu), given, upstream), exact(given, upstream, relu)
    assert mine.keys() == wanted.keys()
    for name in ("y", "x", "residual"):
        if name not in mine:
            continue
        assert mine[name].dtype == dtype
        # A residual that ReLU does not follow gets dy, as it is.
        assert mine[name].is_contiguous(memory_format=torch.channels_last) or (name == "residual" and not relu)
        # Half a unit in the last place, and what float32 leaves of a difference of terms.
        largest = wanted[name].abs().amax(dim=(0, 2, 3), keepdim=True)
        allowed = ROUNDING[dtype] * wanted[name].abs() + 2**-8 * 1e-4 * (largest + 1)
        assert ((mine[name].double() - wanted[name]).abs() <= allowed).all(), name
    for name in ("weight", "bias"):
        assert mine[name].dtype == torch.float32
        torch.testing.assert_close(mine[name].double(), wanted[name], rtol=1e-5, atol=2e-5 * upstream.numel() ** 0.5)
    torch.testing.assert_close(mine["statistics"].double(), wanted["statistics"], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_reference_in_float64_is_the_definition(residual: bool, relu: bool) -> None:
    given = inputs((3, 5, 4, 3), residual=residual, dtype=torch.float64)
    upstream = torch.randn(3, 5, 4, 3, dtype=torch.float64)
    mine, wanted = differentiate(fused(None, relu), given, upstream), exact(given, upstream, relu)
    for name, value in wanted.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
@pytest.mark.parametrize("channels", [3, 32])
def test_large_means_and_constant_channels_lose_nothing(channels: int, implementation: str) -> None:
    """Variances come from deviations: of numbers near 1000 that differ in their last bits, and of equal ones."""
    torch.manual_seed(0)
    x = (1000 + 4 * torch.randint(0, 3, (4, channels, 33, 9))).bfloat16()
    x[:, 1] = 1000
    x[:, 2:] = 0.1
    x = x.contiguous(memory_format=torch.channels_last)
    y, statistics = batch_norm(x, torch.ones(channels), torch.zeros(channels), implementation=implementation)
    wanted = functional.batch_norm(x.double(), None, None, training=True)
    assert ((y.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-3)[:, :1].all()
    torch.testing.assert_close(statistics[2, 0].double(), x[:, 0].double().var(), rtol=5e-6, atol=0)
    if implementation == "native":
        assert statistics[2, 1:].eq(0).all() and y[:, 1:].eq(0).all()
        assert statistics[0, 1:].equal(x[0, 1:, 0, 0].float())


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("implementation", ["reference", NATIVE])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels", [3, 32])
def test_nan_reaches_its_channel_and_no_other(
    channels: int, residual: bool, implementation: str, dtype: torch.dtype
) -> None:
    given = inputs((2, channels, 4, 5), residual=residual, dtype=dtype)
    assert given["x"] is not None
    given["x"][1, 1, 2, 2] = torch.nan
    mine = differentiate(fused(implementation, True), given, torch.ones(2, channels, 4, 5))
    for name in ("y", "x", "weight"):
        nan = mine[name].isnan()
        rows = nan if nan.ndim == 1 else nan.transpose(0, 1).flatten(1)
        assert rows[1].all() and not rows[0].any() and not rows[2:].any(), name


@pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
@pytest.mark.parametrize("channels", [33, 64])
def test_a_residual_takes_the_gradient_bit_for_bit(channels: int) -> None:
    """Numbers too small for a bfloat16's own exponents too."""
    given = inputs((2, channels, 4, 5), residual=True)
    upstream = torch.randn(2, channels, 4, 5, generator=torch.Generator().manual_seed(1)).bfloat16() * 1e-39
    mine = differentiate(fused("native", True), given, upstream)
    assert torch.equal(mine["residual"], torch.where(mine["y"] > 0, upstream, 0))
    assert mine["residual"].any()


@pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels", [520, 544])
def test_result_does_not_depend_on_the_number_of_threads(channels: int, residual: bool, dtype: torch.dtype) -> None:
    shape = (5, channels, 16, 13)
    given, upstream = inputs(shape, residual=residual, dtype=dtype), torch.randn(shape)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(differentiate(fused("native", True), given, upstream))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result[name], value) for result in results for name, value in results[0].items())


@pytest.mark.parametrize("implementation", ["reference", NATIVE])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (3, 2, 1, 1)])
@pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, True)])
def test_registration(residual: bool, relu: bool, shape: tuple[int, ...], implementation: str) -> None:
    given = inputs(shape, residual=residual)
    arguments = tuple(None if given[n] is None else given[n].clone().requires_grad_() for n in NAMES)  # type: ignore[union-attr]
    torch.library.opcheck(torch.ops.fastmoco.batch_norm.default, (*arguments, relu, 1e-5, implementation))
    y, statistics = batch_norm(*arguments[:3], residual=arguments[3], relu=relu)  # type: ignore[arg-type]
    x, weight, bias, _ = (None if a is None else a.detach() for a in arguments)
    saved = y.detach() if residual and relu else None
    back = (torch.ones_like(x), x, saved, weight, bias, statistics, relu, implementation)  # type: ignore[arg-type]
    torch.library.opcheck(torch.ops.fastmoco.batch_norm_backward.default, back)


def test_compiles_whole() -> None:
    given, upstream = inputs((2, 6, 4, 5), residual=True), torch.randn(2, 6, 4, 5)
    plain = differentiate(fused(None, True), given, upstream)
    compiled = torch.compile(fused(None, True), fullgraph=True, backend="aot_eager")
    for name, value in differentiate(compiled, given, upstream).items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 3, 1, 1)}, "at least 2 values a channel"),
        ({"x": torch.zeros(0, 3, 2, 2)}, "at least 2 values a channel"),
        ({"x": torch.zeros(2, 3)}, r"x must be \(N, C, H, W\)"),
        ({"weight": torch.zeros(4)}, r"weight and bias \(C,\)"),
        ({"residual": torch.zeros(2, 3, 2, 1)}, "residual must be"),
        ({"residual": torch.zeros(2, 3, 2, 2).bfloat16()}, "residual must be"),
        ({"x": torch.zeros(2, 3, 2, 2, dtype=torch.long)}, "floating"),
        ({"bias": torch.zeros(3, device="meta")}, "must be on x's device"),
    ],
)
def test_refuses(changes: dict[str, Tensor], message: str) -> None:
    given = {"x": torch.zeros(2, 3, 2, 2), "weight": torch.ones(3), "bias": torch.zeros(3)} | changes
    with pytest.raises(ValueError, match=message):
        batch_norm(**given)  # type: ignore[arg-type]


def torchs(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = functional.batch_norm(x, None, None, weight, bias, training=True)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def penalties(
    function: Callable[..., Tensor], given: dict[str, Tensor | None], trained: tuple[str, ...] = NAMES
) -> list[Tensor]:
    """The gradients of a sum of squared gradients."""
    leaves = {name: value.clone().requires_grad_(name in trained) for name, value in given.items() if value is not None}
    of = [leaf for leaf in leaves.values() if leaf.requires_grad]
    gradients = torch.autograd.grad(function(**(given | leaves)).pow(3).sum(), of, create_graph=True)
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in of]
    return list(torch.autograd.grad(sum(g.square().sum() for g in gradients), of))


@pytest.mark.parametrize("trained", [NAMES, ("x", "residual")])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 4e-6), (torch.bfloat16, 0.05)]
)
def test_second_derivatives_are_torchs(
    dtype: torch.dtype, tolerance: float, residual: bool, relu: bool, trained: tuple[str, ...]
) -> None:
    """Relative, by norms; of what a gradient penalty is made of."""
    given = inputs((3, 5, 4, 3), residual=residual, dtype=dtype)
    wide = {name: None if value is None else value.double() for name, value in given.items()}
    mine = penalties(lambda **given: fused(None, relu)(**given)[0], given, trained)
    for one, other in zip(mine, penalties(lambda **given: torchs(**given, relu=relu), wide, trained), strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def test_a_backward_with_a_graph_stops_at_what_it_was_given() -> None:
    """Of one weight used twice, a weight made from the map, and hooks."""
    x, weight, bias, _ = inputs((3, 5, 4, 3), residual=False, dtype=torch.float64).values()
    assert x is not None and weight is not None and bias is not None

    def twice(norm: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = weight + x.mean((0, 2, 3))
        weight.register_hook(lambda gradient: 10 * gradient)
        return norm(norm(x, weight, bias, None, relu=True).sin(), weight, bias, None, relu=True)

    found = []
    for norm in (torchs, lambda *given, relu: batch_norm(*given[:3], relu=relu)[0]):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        once = torch.autograd.grad(twice(norm, *leaves).pow(3).sum(), leaves, create_graph=True)
        found.append([*once, *torch.autograd.grad(sum(g.square().sum() for g in once), leaves)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_many_gradients_at_once(residual: bool, relu: bool) -> None:
    given = inputs((3, 5, 4, 3), residual=residual, dtype=torch.float32)
    leaves = {name: value.requires_grad_() for name, value in given.items() if value is not None}
    y, _ = fused(None, relu)(**given)
    upstream = torch.randn(4, *y.shape)
    mapped = torch.autograd.grad(y, list(leaves.values()), upstream, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(upstream):
        alone = torch.autograd.grad(y, list(leaves.values()), one, retain_graph=True)
        torch.testing.assert_close([gradient[i] for gradient in mapped], list(alone), rtol=1e-5, atol=1e-5)


def _with_torchs_blocks(encoder: Encoder) -> Encoder:
    for part in encoder.modules():
        if isinstance(part, (BasicBlock, Bottleneck)):
            part.__class__ = torchvision.BasicBlock if isinstance(part, BasicBlock) else torchvision.Bottleneck
    return encoder


def _stages(encoder: Encoder, images: Tensor) -> list[Tensor]:
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=images.dtype == torch.bfloat16):
        return list(encoder(images).stages)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_gives_the_same_stages_and_statistics(
    arch: str, training: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    encoders = [Encoder(arch, seed=3, zero_init_residual=False).to(memory_format=torch.channels_last) for _ in range(3)]
    monkeypatch.setattr(blocks, "LARGE", 0)
    counted = Mock(wraps=batch_norm)
    monkeypatch.setattr(blocks, "batch_norm", counted)
    pairs = Mock(wraps=convolve_norm.convolve_norm)
    monkeypatch.setattr(convolve_norm, "convolve_norm", pairs)
    fused_stages = _stages(encoders[0].train(training), images)
    norms = [part for part in encoders[0].modules() if isinstance(part, nn.BatchNorm2d)]
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_fuses", lambda *_: False)
        patch.setattr(convolve_norm, "_as_one", lambda *_: False)
        plain_stages = _stages(_with_torchs_blocks(encoders[1].train(training)), images)
    assert counted.call_count + pairs.call_count == (len(norms) if training and dispatch.native is not None else 0)
    wide = torch.float32 if dtype == torch.bfloat16 else torch.float64
    exact_stages = _stages(encoders[2].train(training).to(wide), images.to(wide))
    for mine, torchs, wanted in zip(fused_stages, plain_stages, exact_stages, strict=True):
        if training:
            # As near to the wider type's as torch's modules come: there is one rounding in place of three.
            assert (mine.to(wide) - wanted).norm() <= 1.1 * (torchs.to(wide) - wanted).norm()
        else:
            assert torch.equal(mine, torchs)
    counts = [buffer for name, buffer in encoders[0].named_buffers() if name.endswith("num_batches_tracked")]
    assert counts and all(count == int(training) for count in counts)
    mine, torchs, wanted = (
        torch.cat([value for name, value in encoder.named_buffers() if ".running_" in name]) for encoder in encoders
    )
    assert (mine - wanted).norm() <= 1.1 * (torchs - wanted).norm()


def test_every_norm_is_called_as_a_module() -> None:
    """Where weights are shared out over processes, a module's are there only from its call on."""
    images = torch.rand(2, 3, 32, 32).bfloat16().to(memory_format=torch.channels_last)
    encoder = Encoder("resnet50", seed=3).to(memory_format=torch.channels_last)
    called: list[nn.Module] = []
    norms = [part for part in encoder.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, _: called.append(module))
    _stages(encoder, images)
    assert len(called) == len(norms) == len(set(called)) == 53


@pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
def test_running_statistics_move_as_torchs() -> None:
    given = inputs((3, 5, 4, 3), residual=True)
    x, residual = given["x"], given["residual"]
    assert x is not None and residual is not None
    mine, torchs = blocks.FusedBatchNorm2d(5, momentum=0.3), nn.BatchNorm2d(5, momentum=0.3).double()
    for _ in range(3):
        blocks.normalize_relu(mine, nn.ReLU(), x, residual)
        torchs(x.double())
    for name, value in torchs.named_buffers():
        torch.testing.assert_close(mine.get_buffer(name).to(value.dtype), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("channels", [1, 67])
@pytest.mark.parametrize("case", ["plain", "float64", "gaps", "a mode", "another count"])
def test_tracking_is_torchs_lerp(case: str, channels: int, momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    native = Mock(wraps=dispatch.native)
    monkeypatch.setattr(dispatch, "native", dispatch.native and native)
    rows = torch.randn(3, channels)
    count = torch.tensor(41, dtype=torch.int32 if case == "another count" else torch.int64)
    mean, variance = torch.randn(channels), torch.randn(channels)
    if case == "float64":
        mean, variance, rows = mean.double(), variance.double(), rows.double()
    if case == "gaps":
        mean = torch.zeros(2 * channels)[::2].copy_(mean) if channels > 1 else mean.expand(1)
    wanted = torch.lerp(mean.double(), rows[0].double(), momentum), variance.double().lerp(rows[2].double(), momentum)
    versions = [tensor._version for tensor in (mean, variance, count)]
    with FlopCounterMode(display=False) if case == "a mode" else nullcontext():
        track(mean, variance, count, rows, momentum)
    for found, expected in zip((mean, variance), wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    assert count == 42
    plain = case == "plain" or (case == "gaps" and channels == 1)
    assert native.batch_norm_track.call_count == (plain and dispatch.native is not None)
    assert [tensor._version for tensor in (mean, variance, count)] == [version + 1 for version in versions]


def test_statistics_of_other_channels_are_not_tracked() -> None:
    """By torch, which refuses them, not by C++, which would write behind them."""
    for sizes in ((4, 3, 4), (4, 4, 3), (3, 4, 4)):
        mean, variance, rows = torch.zeros(sizes[0]), torch.zeros(sizes[1]), torch.ones(3, sizes[2])
        with pytest.raises(RuntimeError, match="size"):
            track(mean, variance, torch.tensor(0), rows, 0.1)


@pytest.mark.parametrize(
    ("dtype", "layout", "large"),
    [
        (torch.float64, torch.channels_last, 0),
        (torch.float32, torch.contiguous_format, 0),
        (torch.float32, torch.channels_last, 2**17),
    ],
)
def test_other_maps_are_left_to_torch(
    dtype: torch.dtype, layout: torch.memory_format, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, running statistics and gradients included: float64, channels first, and small in float32."""
    monkeypatch.setattr(blocks, "LARGE", large)
    images = torch.rand(2, 3, 64, 64, dtype=dtype)
    encoders = [Encoder("resnet18", seed=3).to(dtype, memory_format=layout) for _ in range(2)]
    _with_torchs_blocks(encoders[1])
    for encoder in encoders:
        sum(stage.square().mean() for stage in encoder(images).stages).backward()
    mine, other = ([*(p.grad for p in e.parameters()), *e.buffers(), *e.eval()(images).stages] for e in encoders)
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_forward_mode_is_left_to_torch() -> None:
    x = inputs((3, 5, 4, 3), residual=False, dtype=torch.float32)["x"]
    assert x is not None
    found = []
    for kind in (blocks.FusedBatchNorm2d, nn.BatchNorm2d):
        norm = kind(5)
        with forward_ad.dual_level():
            y = blocks.normalize_relu(norm, nn.ReLU(), forward_ad.make_dual(x, x.flip(0)))
            found.append([*forward_ad.unpack_dual(y), norm.running_var])
    assert all(torch.equal(mine, torchs) for mine, torchs in zip(*found, strict=True))
    assert not torch.equal(found[0][1], torch.zeros_like(x))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_other_norms_are_left_to_torch(options: dict[str, object]) -> None:
    x = inputs((3, 5, 4, 3), residual=False)["x"]
    mine, torchs = (kind(5, **options) for kind in (blocks.FusedBatchNorm2d, nn.BatchNorm2d))  # type: ignore[arg-type]
    assert torch.equal(blocks.normalize_relu(mine, nn.ReLU(), x), torchs(x).relu())  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["traced", "exported"])
def test_what_leaves_this_package_has_torchs_operations(way: str) -> None:
    net = BasicBlock(8, 8).to(memory_format=torch.channels_last)
    x = torch.rand(4, 8, 64, 64).to(memory_format=torch.channels_last)
    assert blocks._fuses(net.bn1, x, None) == (dispatch.native is not None)
    if way == "traced":
        called = [node.kind() for node in torch.jit.trace(net, x, check_trace=False).inlined_graph.nodes()]
    else:
        called = [str(node.target) for node in torch.export.export(net, (x,)).graph.nodes]
    assert any("batch_norm" in name for name in called) and not any(name.startswith("fastmoco") for name in called)


def test_one_value_a_channel_raises_as_torch_does() -> None:
    x = torch.zeros(1, 5, 1, 1, dtype=torch.bfloat16)
    norm = blocks.FusedBatchNorm2d(5)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        blocks.normalize_relu(norm, nn.ReLU(), x)
