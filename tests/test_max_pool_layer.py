"""MaxPool: torch's layer, by this package's operation where that takes the map."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastmoco.models import max_pool as layer
from fastmoco.models.max_pool import MaxPool
from fastmoco.models.resnet import ResNet
from fastmoco.ops import dispatch

BUILT = pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")


def image(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for the operation where the module calls it, and runs it."""
    counted = Mock(wraps=layer.max_pool_unchecked)
    monkeypatch.setattr(layer, "max_pool_unchecked", counted)
    return counted


@BUILT
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-24)])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (2, 3)},
        {"kernel_size": [3, 3], "stride": [2, 1], "padding": [1, 0], "dilation": (1, 1)},
    ],
)
def test_the_module_gives_torchs_values(options: dict[str, Any], dtype: torch.dtype, unit: float, called: Mock) -> None:
    x = image((2, 5, 9, 8), dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    mine, torchs = MaxPool(**options)(leaves[0]), nn.MaxPool2d(**options)(leaves[1])
    assert called.call_count == 1 and torch.equal(mine, torchs)
    for y in (mine, torchs):
        y.square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=4 * unit, atol=0)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (image((2, 5, 9, 8), torch.float32).contiguous(), {}),
        (image((2, 5, 9, 8), torch.float32)[0].clone(), {}),
        (image((2, 5, 9, 8), torch.float64), {}),
        (image((2, 5, 9, 8), torch.float16), {}),
        (image((2, 5, 9, 8), torch.float32), {"ceil_mode": True}),
        (image((2, 5, 9, 8), torch.float32), {"dilation": 2}),
        (image((2, 5, 9, 8), torch.float32), {"return_indices": True}),
        (image((2, 5, 40, 40), torch.float32), {"kernel_size": 16}),
        (image((2, 5, 9, 8), torch.float32), {"kernel_size": 5, "stride": 1}),
        (image((2, 5, 9, 8), torch.float32), {"kernel_size": np.int64(3)}),
        (image((2, 5, 9, 8), torch.float32), {"kernel_size": (3,)}),
        (image((2, 5, 9, 8), torch.float32), {"padding": [1]}),
        (torch.zeros(0, 5, 9, 8).to(memory_format=torch.channels_last), {}),
    ],
)
def test_the_rest_is_left_to_torch(given: Tensor, options: dict[str, Any], called: Mock) -> None:
    options = {"kernel_size": 3, "stride": 2, "padding": 1} | options
    results = [kind(**options)(given) for kind in (MaxPool, nn.MaxPool2d)]
    assert not called.called
    for mine, torchs in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert torch.equal(mine, torchs)


@pytest.mark.parametrize("options", [{"kernel_size": 3, "padding": 2}, {"kernel_size": 12}, {"kernel_size": 0}])
def test_what_does_not_fit_raises_as_torch_does(options: dict[str, Any], called: Mock) -> None:
    x = image((2, 5, 9, 8), torch.float32)
    messages = []
    for kind in (MaxPool, nn.MaxPool2d):
        with pytest.raises(RuntimeError) as raised:
            kind(**options)(x)
        messages.append(str(raised.value))
    assert messages[0] == messages[1] and not called.called


def test_transforms_are_left_to_torch(called: Mock) -> None:
    x = image((2, 5, 9, 8), torch.float32)
    found = []
    for pool in (MaxPool(3, 2, 1), nn.MaxPool2d(3, 2, 1)):
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(pool(forward_ad.make_dual(x, x.flip(0))))
        mapped = torch.func.vmap(pool)(x[None])
        found.append([*dual, mapped, torch.func.grad(lambda x, pool=pool: pool(x).square().sum())(x)])
    assert not called.called
    assert all(torch.equal(mine, torchs) for mine, torchs in zip(*found, strict=True))


@pytest.mark.parametrize("way", ["traced", "exported"])
def test_what_leaves_this_package_has_torchs_operation(way: str, called: Mock) -> None:
    net, x = nn.Sequential(MaxPool(3, 2, 1)), image((2, 5, 9, 8), torch.float32)
    if way == "traced":
        names = [node.kind() for node in torch.jit.trace(net, x, check_trace=False).inlined_graph.nodes()]
    else:
        names = [str(node.target) for node in torch.export.export(net, (x,)).graph.nodes]
    assert any("max_pool2d" in name for name in names) and not any(name.startswith("fastmoco") for name in names)
    assert not called.called


@BUILT
def test_a_resnet_pools_by_it(called: Mock) -> None:
    net = ResNet("resnet18").to(memory_format=torch.channels_last)
    net.stages(image((2, 3, 32, 32), torch.float32))
    assert called.call_count == 1 and type(net.maxpool) is MaxPool
