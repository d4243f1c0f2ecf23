"""Mean squared error of two feature maps after adaptive average pooling (Kaku et al. 2021, section 3).

Pooling is linear, so one pass over both maps gives all that is needed, the small difference of the pooled maps, and
one pass writes the gradient:

    difference = pool(a) - pool(b)      loss = mean(difference^2)      da = pool'(2 difference / size of difference)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from fastmoco.ops import dispatch
from fastmoco.ops.derivatives import refuse_second_derivative
from fastmoco.ops.library import define
from fastmoco.ops.precision import no_autocast, wide

_NATIVE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def pooled_mse(a: Tensor, b: Tensor, *, grid: int, implementation: str | None = None) -> Tensor:
    """`mean((pool(a) - pool(b))^2)` over all elements, pooled to `grid` x `grid` cells: a 0-d tensor.

    `a` is (N, C, H, W), `b` of the same shape or pooled already, (N, C, grid, grid), each of any floating dtype. Cells
    overlap, or repeat, where the map's side is not a multiple of `grid`, as torch's adaptive pooling defines. Maps are
    read in channels-last memory format; others are copied into it first. The arithmetic and the loss are float32, or
    float64 for float64 inputs. Gradients reach both, deterministically, whole maps' in channels-last memory format;
    they have none themselves, and a backward with `create_graph=True` raises RuntimeError.

    implementation: "reference", "native" or "triton"; None has it chosen.

    Raises ValueError for shapes that do not fit, empty maps, a dtype that is not floating, two devices, or a grid
    below 1.
    """
    if grid < 1:
        raise ValueError(f"pooled_mse: grid must be at least 1, not {grid}")
    whole = a.shape == b.shape
    if a.ndim != 4 or not (whole or b.shape == (*a.shape[:2], grid, grid)):
        raise ValueError(
            f"pooled_mse: a must be (N, C, H, W) and b of its shape or, pooled, (N, C, {grid}, {grid}), "
            f"not {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.numel() == 0:
        raise ValueError(f"pooled_mse: the maps are empty, {tuple(a.shape)}")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"pooled_mse: maps must have a floating dtype, not {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"pooled_mse: both maps must be on one device, not {a.device} and {b.device}")
    dtype = torch.promote_types(a.dtype, b.dtype)
    # A pooled b may be wider than a, which then stays as it is: the large one.
    if whole or dtype == torch.float64:
        a, b = a.to(dtype), b.to(dtype)
    loss, _ = _pooled_mse(a, b, grid, implementation)
    return loss


def _forward(a: Tensor, b: Tensor, grid: int, implementation: str | None) -> tuple[Tensor, Tensor]:
    """The loss () and the difference (N, grid, grid, C) that its gradients are made of."""
    with no_autocast(a):
        result: tuple[Tensor, Tensor] = dispatch.pick("pooled_mse", a, implementation)(a, b, grid)
        return result


def _fake_forward(a: Tensor, b: Tensor, grid: int, implementation: str | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.new_empty((), dtype=dtype), a.new_empty((a.shape[0], grid, grid, a.shape[1]), dtype=dtype)


def _gradient(
    difference: Tensor, dloss: Tensor, height: int, width: int, dtype: torch.dtype, implementation: str | None
) -> Tensor:
    """The gradient to a (N, C, height, width), channels-last; that to a whole b is its negative."""
    with no_autocast(difference):
        run = dispatch.pick("pooled_mse_backward", difference, implementation)
        result: Tensor = run(difference.contiguous(), dloss, height, width, dtype)
        return result


def _fake_gradient(
    difference: Tensor, dloss: Tensor, height: int, width: int, dtype: torch.dtype, implementation: str | None
) -> Tensor:
    n, _, _, c = difference.shape
    return difference.new_empty((n, height, width, c), dtype=dtype).permute(0, 3, 1, 2)


_pooled_mse_backward = define(
    "pooled_mse_backward(Tensor difference, Tensor dloss, SymInt height, SymInt width, ScalarType dtype, "
    "str? implementation) -> Tensor",
    _gradient,
    _fake_gradient,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, _, ctx.implementation = inputs
    _, difference = output
    ctx.mark_non_differentiable(difference)
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype = a.shape, a.dtype
    ctx.whole, ctx.b_dtype = a.shape == b.shape, b.dtype
    ctx.save_for_backward(difference)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return None, None, None, None
    refuse_second_derivative("pooled_mse")
    (difference,) = ctx.saved_tensors
    *_, height, width = ctx.shape
    da = db = None
    if ctx.needs_input_grad[0]:
        da = _pooled_mse_backward(difference, dloss, height, width, ctx.dtype, ctx.implementation)
    if ctx.needs_input_grad[1] and ctx.whole:
        db = -da if da is not None else _pooled_mse_backward(
            difference, -dloss, height, width, ctx.dtype, ctx.implementation
        )
    elif ctx.needs_input_grad[1]:
        db = (difference * (-2 / difference.numel() * dloss)).to(ctx.b_dtype).permute(0, 3, 1, 2)
    return da, db, None, None


_pooled_mse = define(
    "pooled_mse(Tensor a, Tensor b, SymInt grid, str? implementation) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)


def reference(a: Tensor, b: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Any device and dtype: the definition, on the difference of whole maps."""
    if a.shape == b.shape:
        pooled = adaptive_avg_pool2d(wide(a) - wide(b), grid)
    else:
        pooled = adaptive_avg_pool2d(wide(a), grid) - wide(b)
    difference = pooled.permute(0, 2, 3, 1).contiguous()
    return difference.square().mean(), difference


def reference_backward(difference: Tensor, dloss: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Any device and dtype: products with the pooling's matrices; torch's own backward is not deterministic on GPUs."""
    n, grid, _, c = difference.shape
    scaled = difference * (2 / difference.numel() * dloss)
    rows, columns = (
        adaptive_avg_pool1d(torch.eye(side, dtype=scaled.dtype, device=scaled.device), grid) for side in (height, width)
    )
    gathered = rows @ scaled.view(n, grid, grid * c)
    pixels = columns @ gathered.view(n * height, grid, c)
    return pixels.view(n, height, width, c).to(dtype).permute(0, 3, 1, 2)


def _native(a: Tensor, b: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    assert dispatch.native is not None
    n, c, height, width = a.shape
    whole = a.shape == b.shape
    a = a.contiguous(memory_format=torch.channels_last)
    b = b.contiguous(memory_format=torch.channels_last) if whole else b.float().permute(0, 2, 3, 1).contiguous()
    difference = a.new_empty((n, grid, grid, c), dtype=torch.float32)
    loss = dispatch.native.pooled_mse_forward(
        a.data_ptr(),
        b.data_ptr() if whole else 0,
        0 if whole else b.data_ptr(),
        difference.data_ptr(),
        batch=n,
        height=height,
        width=width,
        channels=c,
        grid=grid,
        dtype=_NATIVE_DTYPES[a.dtype],
        threads=torch.get_num_threads(),
    )
    return difference.new_tensor(loss), difference


def _native_backward(difference: Tensor, dloss: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    assert dispatch.native is not None and difference.is_contiguous()
    n, grid, _, c = difference.shape
    da = difference.new_empty((n, height, width, c), dtype=dtype)
    dispatch.native.pooled_mse_backward(
        difference.data_ptr(),
        da.data_ptr(),
        # On the CPU, the only device this runs on, there is nothing to wait for.
        scale=2 / difference.numel() * dloss.item(),
        batch=n,
        height=height,
        width=width,
        channels=c,
        grid=grid,
        dtype=_NATIVE_DTYPES[dtype],
        threads=torch.get_num_threads(),
    )
    return da.permute(0, 3, 1, 2)


dispatch.register("pooled_mse", "reference", reference)
dispatch.register(
    "pooled_mse",
    "native",
    _native,
    device_types=("cpu",),
    dtypes=tuple(_NATIVE_DTYPES),
    missing=dispatch.NATIVE_MISSING,
)
dispatch.register("pooled_mse_backward", "reference", reference_backward)
dispatch.register(
    "pooled_mse_backward",
    "native",
    _native_backward,
    device_types=("cpu",),
    dtypes=(torch.float32,),
    missing=dispatch.NATIVE_MISSING,
)


def _triton(a: Tensor, b: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    from fastmoco.kernels.pooled_mse import pooled_mse as launch

    result: tuple[Tensor, Tensor] = launch(a, b, grid)
    return result


def _triton_backward(difference: Tensor, dloss: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    from fastmoco.kernels.pooled_mse import pooled_mse_backward as launch

    result: Tensor = launch(difference, dloss, height, width, dtype)
    return result


dispatch.register(
    "pooled_mse",
    "triton",
    _triton,
    device_types=("cuda",),
    dtypes=tuple(_NATIVE_DTYPES),
    missing=dispatch.TRITON_MISSING,
)
dispatch.register(
    "pooled_mse_backward",
    "triton",
    _triton_backward,
    device_types=("cuda",),
    dtypes=(torch.float32,),
    missing=dispatch.TRITON_MISSING,
)
