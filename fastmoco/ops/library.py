"""How the operations are registered with torch, so that autograd, torch.compile and torch.export know them."""

from __future__ import annotations

from collections.abc import Callable
from types import new_class
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_library = torch.library.Library("fastmoco", "FRAGMENT")


def define(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Operation:
    """Registers `function` as the operation `schema` on any device; returns it, to be called.

    schema: in torch's notation; sizes are SymInt, so that one compilation holds for all of them.
    fake: gives empty tensors of the shapes, dtypes and strides of the results.
    backward, setup_context: the gradient, as `torch.library.register_autograd` takes them. Without them the operation
        has none.

    A `function` that writes to its arguments tells autograd so itself. torch.library.custom_op does much the same, but
    takes 6 us more of 61 a call, 76 more of 45 for lists of 161 tensors, and 2 s at the first call, in which it imports
    torch's compiler (measured).
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastmoco::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"fastmoco::{name}", backward, setup_context=setup_context, lib=_library)
    gradient = None if backward is None else _differentiable(name, function, backward, setup_context)
    return Operation(getattr(torch.ops.fastmoco, name).default, function, gradient)


class Operation:
    """A registered operation: called by way of torch's dispatcher, or past it with plain tensors where no compiler,
    tracer, transform, mode or profiler is at work.

    The way through it, with a gradient to come, takes 70 us of a call and 50 of its backward, without one 20 (measured
    on a small batch_norm). A bfloat16 step of ResNet-18 at 64 px has 56 such calls, half of them with gradients.
    """

    def __init__(
        self,
        overload: Callable[..., Any],
        function: Callable[..., Any],
        gradient: type[torch.autograd.Function] | None,
    ) -> None:
        self.overload, self.function, self.gradient = overload, function, gradient

    def __call__(self, *args: Any) -> Any:
        """What the operation returns."""
        if watched():
            return self.overload(*args)
        trained = False
        for value in args:
            if not is_plain(value):
                return self.overload(*args)
            trained = trained or (isinstance(value, Tensor) and value.requires_grad)
        if trained and torch.is_grad_enabled():
            return (self.overload if self.gradient is None else self.gradient.apply)(*args)
        return self.function(*args)


def _differentiable(
    name: str, function: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., Any] | None
) -> type[torch.autograd.Function]:
    """`function` with its gradient, for autograd alone, which calls it by `name` in graphs, profiles and errors."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = function(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return new_class(f"fastmoco_{name}", (torch.autograd.Function,), exec_body=lambda body: body.update(methods))


def batched(tensor: Tensor) -> bool:
    """Whether `tensor` stands for many at once, in vmap or a backward of batched gradients."""
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)


def left_to_torch() -> bool:
    """Whether a module does better to call torch's own operations: what is traced or exported should run without this
    package, and torch.func's transforms find no gradient of the operations registered here."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or transformed()


def transformed() -> bool:
    """Whether one of torch.func's transforms or forward-mode derivatives are at work, which find no gradient of the
    operations registered here."""
    # Not by the stack of interpreters, which torch's compiler takes to be there always.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def watched() -> bool:
    """Whether calls are being compiled, traced, mapped, recorded, or taken over by one of torch's modes."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.autograd._profiler_enabled()
    )


def is_plain(value: Any) -> bool:
    """Whether an argument is nothing that the dispatcher would treat in a way of its own: lists of tensors have their
    gradients found by it, subclasses and tensors without memory their implementations, a sign or zeros that are only
    noted are written out, proxies are recorded."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta or value.is_neg():
            return False
        return not value._is_zerotensor() and not torch._is_functional_tensor(value)
    if isinstance(value, (list, tuple)):
        return all(isinstance(part, int) for part in value)
    return value is None or isinstance(value, (int, float, str, torch.dtype))
