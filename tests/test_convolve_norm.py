"""A convolution and its normalisation as one function: the same bits as the two, and left alone where it would show."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from fastmoco.models import convolution, convolve_norm
from fastmoco.models.convolution import Convolution
from fastmoco.models.norm import FusedBatchNorm2d, normalize_relu
from fastmoco.models.resnet import ResNet
from fastmoco.ops import convolve_norm as ops
from fastmoco.ops import dispatch
from fastmoco.ops.batch_norm import batch_norm
from fastmoco.ops.convolve import convolve
from fastmoco.ops.convolve_native import SETS

DTYPES = [dtype for dtype, names in SETS.items() if names]
SOME = pytest.mark.skipif(not DTYPES, reason=dispatch.NATIVE_MISSING or "this processor has no AVX2")
PAIRS = pytest.mark.skipif(not SETS[torch.bfloat16], reason="this processor has no AVX512-BF16")
Inputs = list[Tensor | None]


def given(dtype: torch.dtype, *, residual: bool, channels: int = 32) -> Inputs:
    """x, kernel, weight, bias, residual."""
    torch.manual_seed(0)
    maps = [torch.randn(3, channels, 5, 6), torch.randn(64, channels, 3, 3), torch.randn(3, 64, 5, 6)]
    x, kernel, beside = (of.to(dtype).contiguous(memory_format=torch.channels_last) for of in maps)
    return [x, kernel, torch.rand(64) + 0.5, torch.randn(64), beside if residual else None]


def as_two(x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return batch_norm(convolve(x, kernel, padding=(1, 1)), weight, bias, residual=residual, relu=relu)[0]


def as_one(x: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    return ops.convolve_norm(x, kernel, weight, bias, residual, ((1, 1), (1, 1), relu, 1e-5))[0]


def leaves(inputs: Inputs) -> Inputs:
    return [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]


def trained(inputs: Inputs) -> list[Tensor]:
    return [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]


@SOME
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels", [32, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_two(dtype: torch.dtype, channels: int, residual: bool, relu: bool) -> None:
    """Also of a map with few channels, whose gradients C++ does not make."""
    found = []
    for form in (as_two, as_one):
        inputs = leaves(given(dtype, residual=residual, channels=channels))
        y = form(*inputs, relu=relu)  # type: ignore[arg-type]
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found.append([y, *torch.autograd.grad(y, trained(inputs), dy)])
        with torch.no_grad():
            assert torch.equal(form(*inputs, relu=relu), y)  # type: ignore[arg-type]
    assert len(found[0]) == 5 + residual
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@SOME
@pytest.mark.parametrize("which", range(5))
def test_only_what_is_trained_has_a_gradient(which: int) -> None:
    inputs = given(DTYPES[0], residual=True)
    every = leaves(inputs)
    wanted = torch.autograd.grad(as_one(*every, relu=True).sum(), trained(every))[which]  # type: ignore[arg-type]
    leaf = inputs[which]
    assert leaf is not None
    leaf.requires_grad_()
    (gradient,) = torch.autograd.grad(as_one(*inputs, relu=True).sum(), leaf)  # type: ignore[arg-type]
    assert torch.equal(gradient, wanted)
    (statistics,) = ops.convolve_norm(*inputs, ((1, 1), (1, 1), True, 1e-5))[1:]  # type: ignore[arg-type]
    assert not statistics.requires_grad


@SOME
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_further_derivatives_and_many_gradients_at_once(dtype: torch.dtype, relu: bool) -> None:
    found = []
    for form in (as_two, as_one):
        inputs = leaves(given(dtype, residual=True))
        y = form(*inputs, relu=relu)  # type: ignore[arg-type]
        first = torch.autograd.grad(y.float().square().sum(), trained(inputs), create_graph=True)
        second = torch.autograd.grad(sum(of.float().square().sum() for of in first), trained(inputs))
        y = form(*inputs, relu=relu)  # type: ignore[arg-type]
        many = torch.autograd.grad(y, trained(inputs), torch.stack([y, 2 * y]).detach(), is_grads_batched=True)
        found.append([*first, *second, *many])
    for actual, wanted in zip(found[1], found[0], strict=True):
        assert (actual - wanted).norm() <= (2**-6 if dtype == torch.bfloat16 else 1e-4) * wanted.norm()


@SOME
def test_a_residual_that_does_not_fit_is_refused() -> None:
    inputs = given(DTYPES[0], residual=True)
    assert inputs[4] is not None
    for other in (inputs[4][:, :, :4], inputs[4].double()):
        with pytest.raises(ValueError, match="residual must be"):
            as_one(*inputs[:4], other, relu=True)  # type: ignore[arg-type]


@pytest.fixture
def layers() -> tuple[Convolution, FusedBatchNorm2d, Tensor]:
    torch.manual_seed(0)
    conv = Convolution(32, 32, 3, padding=1, bias=False, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x = torch.randn(3, 32, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    return conv, FusedBatchNorm2d(32), x


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Mock:
    counted = Mock(wraps=convolve_norm.convolve_norm)
    monkeypatch.setattr(convolve_norm, "convolve_norm", counted)
    monkeypatch.setattr(convolution, "TILES", False)
    return counted


@PAIRS
def test_layers_give_what_their_calls_do(layers: tuple[Convolution, FusedBatchNorm2d, Tensor], counted: Mock) -> None:
    conv, norm, x = layers
    other = FusedBatchNorm2d(32)
    for residual in (None, torch.ones_like(x)):
        one = convolve_norm.convolve_normalize_relu(conv, norm, nn.ReLU(), x, residual)
        two = normalize_relu(other, nn.ReLU(), conv(x), residual)
        assert torch.equal(one, two)
    assert counted.call_count == 2
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)) and buffer.any()


@PAIRS
@pytest.mark.parametrize(
    "change",
    [
        lambda conv, norm, x: conv.register_forward_hook(lambda *_: None),
        lambda conv, norm, x: norm.register_forward_pre_hook(lambda *_: None),
        lambda conv, norm, x: norm.eval(),
        lambda conv, norm, x: setattr(norm, "momentum", None),
        lambda conv, norm, x: setattr(conv, "forward", conv.forward),
        lambda conv, norm, x: setattr(conv, "groups", 2),
        lambda conv, norm, x: setattr(conv.weight, "data", conv.weight.data[:, :16].contiguous()),
    ],
)
def test_what_would_show_is_left_to_the_modules(
    change: Callable[..., object], layers: tuple[Convolution, FusedBatchNorm2d, Tensor], counted: Mock
) -> None:
    change(*layers)
    conv, norm, x = layers
    if conv.weight.shape[1] == 32 and conv.groups == 1:
        convolve_norm.convolve_normalize_relu(conv, norm, nn.ReLU(), x)
    else:
        with pytest.raises(RuntimeError):
            convolve_norm.convolve_normalize_relu(conv, norm, nn.ReLU(), x)
    assert counted.call_count == 0


@PAIRS
def test_a_profiler_sees_both_operations(layers: tuple[Convolution, FusedBatchNorm2d, Tensor], counted: Mock) -> None:
    conv, norm, x = layers
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        convolve_norm.convolve_normalize_relu(conv, norm, nn.ReLU(), x)
    names = {event.key for event in profiler.key_averages()}
    assert {"fastmoco::convolve", "fastmoco::batch_norm"} <= names and counted.call_count == 0


@PAIRS
def test_a_network_s_pairs_go_through_it(counted: Mock) -> None:
    network = ResNet("resnet50").to(torch.bfloat16).to(memory_format=torch.channels_last)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.float()
    network(torch.randn(2, 3, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last))
    # All but the four projections, which no ReLU follows.
    assert counted.call_count == 49


@PAIRS
def test_what_autograd_is_watched_by_sees_the_backward(layers: tuple[Convolution, FusedBatchNorm2d, Tensor]) -> None:
    conv, norm, x = layers
    found = []
    for watch in (False, True):
        y = convolve_norm.convolve_normalize_relu(conv, norm, nn.ReLU(), x.requires_grad_())
        with torch.autograd.profiler.profile(enabled=watch) as profiler:
            found.append(torch.autograd.grad(y, (x, conv.weight, norm.weight), torch.ones_like(y)))
    names = {event.key for event in profiler.key_averages()}
    operations = {"batch_norm_backward", "convolve_map_gradient", "convolve_weight_gradient"}
    assert {f"fastmoco::{name}" for name in operations} <= names
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@SOME
def test_many_gradients_by_vmap() -> None:
    inputs = leaves(given(torch.float32, residual=False))
    y = as_one(*inputs, relu=True)  # type: ignore[arg-type]

    def gradient(dy: Tensor) -> Tensor:
        return torch.autograd.grad(y, trained(inputs)[0], dy, retain_graph=True)[0]

    several = torch.stack([y, 2 * y]).detach()
    found = torch.func.vmap(gradient)(several)
    for one, dy in zip(found, several, strict=True):
        torch.testing.assert_close(one, gradient(dy), rtol=1e-3, atol=1e-4)


@PAIRS
@pytest.mark.parametrize("residual", [torch.ones(1, 32, 1, 1).bfloat16(), torch.ones(3, 32, 4, 4).bfloat16()[:, :1]])
def test_other_residuals_and_activations_are_added_and_called(
    residual: Tensor, layers: tuple[Convolution, FusedBatchNorm2d, Tensor], counted: Mock
) -> None:
    conv, norm, x = layers
    y = convolve_norm.convolve_normalize_relu(conv, norm, nn.ReLU(), x, residual)
    assert y.shape == x.shape
    plain = convolve_norm.convolve_normalize_relu(conv, norm, nn.Identity(), x)
    assert counted.call_count == 0 and plain.min() < 0 <= y.min()


def test_a_bias_that_comes_later_is_added() -> None:
    conv = Convolution(32, 32, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    before = conv(x)
    conv.bias = nn.Parameter(torch.ones(32))
    torch.testing.assert_close(conv(x), before + 1, rtol=1e-4, atol=1e-5)
