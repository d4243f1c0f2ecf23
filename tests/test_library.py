"""Operations are called past torch's dispatcher where nobody is there to see it, and by way of it elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fastmoco.ops import unfold as module
from fastmoco.ops.unfold import unfold


class Subclass(Tensor):
    """One that torch tells of every call."""


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for the overload, and runs it."""
    overload = Mock(wraps=module._unfold_op.overload)
    monkeypatch.setattr(module._unfold_op, "overload", overload)
    return overload


def image(**options: Any) -> Tensor:
    return torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5).requires_grad_(**options)


def run(x: Tensor) -> Tensor:
    return unfold(x, (2, 2))


def operate(x: Tensor) -> Tensor:
    """What `unfold` calls, without what it refuses."""
    rows: Tensor = module._unfold_op(x, (2, 2), (1, 1), (0, 0), None)
    return rows


def mapped(x: Tensor) -> Tensor:
    return torch.func.vmap(lambda part: part * operate(x[:1]).sum())(x.detach())


def counted(x: Tensor) -> Tensor:
    with FlopCounterMode(display=False):
        return run(x)


def profiled(x: Tensor) -> Tensor:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        rows = run(x)
    assert "fastmoco::unfold" in {event.name for event in profile.events()}
    return rows


def forward_differentiated(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return operate(x.detach())


def faked(x: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return run(mode.from_tensor(x))


def on_a_chosen_device(x: Tensor) -> Tensor:
    with torch.device("cpu"):
        return run(x)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("make", [lambda: image(), lambda: nn.Parameter(image(requires_grad=False))])
def test_plain_calls_go_past_it_and_give_the_same(dispatched: Mock, make: Callable[[], Tensor], wanted: bool) -> None:
    x, y = make().requires_grad_(wanted), make().requires_grad_(wanted)
    rows, through = run(x), module._unfold_op.overload(y, (2, 2), (1, 1), (0, 0), None)
    assert dispatched.call_count == 1
    assert torch.equal(rows, through) and rows.requires_grad == through.requires_grad == wanted
    if wanted:
        for result in (rows, through):
            result.square().sum().backward()
        assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)


def test_without_gradients_there_is_no_graph(dispatched: Mock) -> None:
    with torch.no_grad():
        assert run(image()).grad_fn is None
    assert not dispatched.called


@pytest.mark.parametrize("call", [mapped, counted, profiled, forward_differentiated, faked, on_a_chosen_device])
def test_who_watches_sees_the_operation(dispatched: Mock, call: Callable[[Tensor], Tensor]) -> None:
    call(image())
    assert dispatched.called


def test_tracing_records_the_operation() -> None:
    traced = torch.jit.trace(run, (image(requires_grad=False),))
    assert "fastmoco::unfold" in str(traced.inlined_graph)


def test_symbolic_tracing_records_the_operation() -> None:
    function = torch.fx.symbolic_trace(lambda x: module._unfold_op(x, [2, 2], [1, 1], [0, 0], None))
    assert torch.ops.fastmoco.unfold.default in {node.target for node in function.graph.nodes}


def test_subclasses_and_tensors_without_memory_are_the_dispatchers(dispatched: Mock) -> None:
    rows = run(image(requires_grad=False).as_subclass(Subclass))
    assert type(rows) is Subclass and dispatched.call_count == 1
    assert run(torch.empty(2, 3, 4, 5, device="meta")).shape == (2 * 3 * 4, 12) and dispatched.call_count == 2
    negative = torch._neg_view(image(requires_grad=False).contiguous(memory_format=torch.channels_last))
    assert torch.equal(run(negative), -run(image(requires_grad=False))) and dispatched.call_count == 3


def test_graphs_tell_operations_by_name() -> None:
    assert run(image()).grad_fn.name() == "fastmoco_unfoldBackward"  # type: ignore[union-attr]
