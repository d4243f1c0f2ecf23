"""Cross-correlation losses of two batches of projections (Zbontar et al. 2021, eq. 1; Kaku et al. 2021).

The formulas stand in crosscorr_forms.py, with the two forms they are computed in: through the D x D matrix C, or
through two N x N matrices. Loss and gradients come out together, and nothing else is kept.

On the CPU the Gram form of batches up to 128 is one call of C++ (csrc/crosscorr_gram.h): up to three times as fast as
library products of so small matrices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastmoco.ops import dispatch
from fastmoco.ops.crosscorr_forms import EPSILON, Passes, by_passes, reference
from fastmoco.ops.derivatives import refuse_second_derivative
from fastmoco.ops.library import define
from fastmoco.ops.precision import no_autocast

# The Gram form is the cheaper while 8 N^2 D < 6 N D^2.
GRAM_LIMIT = 0.75


def crosscorr(
    z1: Tensor,
    z2: Tensor,
    *,
    off_diagonal: float = 1.0,
    scale: float = 1.0,
    form: str | None = None,
    implementation: str | None = None,
) -> Tensor:
    """`scale * (sum_i (C_ii - 1)^2 + off_diagonal * sum_{i != j} C_ij^2)` of `C = s(z1)' s(z2) / N`.

    `z1` and `z2` are (N, D), for a 0-d loss, or (S, N, D), for the losses (S,) of S independent pairs, of any floating
    dtype; `s` standardises each column over its batch of N (zero mean, unit biased variance, epsilon 1e-5), as a
    BatchNorm without affine parameters would. `off_diagonal` is 1 in the intermediate-layer paper, where the loss is
    `scale * ||C - I||^2`, and 0.005 in Barlow Twins. The arithmetic and the loss are float32, or float64 for float64
    inputs. Gradients reach both inputs; they are computed with the loss, deterministically, and have no gradient
    themselves.

    form: "gram", through two N x N matrices, or "direct", through the D x D matrix; None takes the cheaper, "gram"
        where N < 0.75 D. The two differ by rounding only.
    implementation: "reference", "native" or "triton"; None has it chosen.

    Raises ValueError for shapes that do not fit, tensors on two devices, a dtype that is not floating, a batch of one,
    which has no correlation, no columns or stages, or another form.
    """
    if z1.ndim not in (2, 3) or z1.shape != z2.shape:
        raise ValueError(
            f"crosscorr: z1 and z2 must be (N, D) or (S, N, D) and of one shape, "
            f"not {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    if not (z1.is_floating_point() and z2.is_floating_point()):
        raise ValueError(f"crosscorr: projections must have a floating dtype, not {z1.dtype} and {z2.dtype}")
    if z1.device != z2.device:
        raise ValueError(f"crosscorr: z1 and z2 must be on one device, not {z1.device} and {z2.device}")
    n, d = z1.shape[-2:]
    if n and not z1.numel():
        raise ValueError(f"crosscorr: z1 and z2 of shape {tuple(z1.shape)} are empty")
    if n < 2:
        raise ValueError(f"crosscorr: a batch of {n} has no cross-correlation; give at least 2 images a batch")
    if form not in (None, "gram", "direct"):
        raise ValueError(f'crosscorr: form must be "gram", "direct" or None, not {form!r}')
    if form is None:
        form = "gram" if n < GRAM_LIMIT * d else "direct"
    if z1.dtype != z2.dtype:
        dtype = torch.promote_types(z1.dtype, z2.dtype)
        z1, z2 = z1.to(dtype), z2.to(dtype)
    gradients = torch.is_grad_enabled() and (z1.requires_grad or z2.requires_grad)
    loss, *_ = _crosscorr(z1, z2, off_diagonal, scale, form, gradients, implementation)
    return loss


def _operation(
    z1: Tensor, z2: Tensor, off_diagonal: float, scale: float, form: str, gradients: bool, implementation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (...) of (..., N, D) pairs and their gradients to z1 and z2, (..., 0, D) where they are not asked for."""
    run = dispatch.pick("crosscorr", z1, implementation)
    if z1.ndim == 3:
        result: tuple[Tensor, Tensor, Tensor] = run(z1, z2, off_diagonal, scale, form, gradients)
        return result
    # Here rather than around the operation, where autograd would record it: at N = 32 calls are what costs.
    loss, dz1, dz2 = run(z1[None], z2[None], off_diagonal, scale, form, gradients)
    return loss[0], dz1[0], dz2[0]


def _fake(
    z1: Tensor, z2: Tensor, off_diagonal: float, scale: float, form: str, gradients: bool, implementation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    *stages, n, d = z1.shape
    dtype = torch.promote_types(z1.dtype, torch.float32)
    dz1, dz2 = (z1.new_empty((*stages, n if gradients else 0, d), dtype=dtype) for _ in range(2))
    return z1.new_empty(stages, dtype=dtype), dz1, dz2


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, dz1, dz2 = output
    ctx.mark_non_differentiable(dz1, dz2)
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(dz1, dz2)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 7
    if dloss is not None:
        refuse_second_derivative("crosscorr")
        factor = dloss[:, None, None] if dloss.ndim else dloss
        for i, gradient in enumerate(ctx.saved_tensors):
            if ctx.needs_input_grad[i]:
                grads[i] = (gradient * factor).to(ctx.dtype)
    return tuple(grads)


_crosscorr = define(
    "crosscorr(Tensor z1, Tensor z2, float off_diagonal, float scale, str form, bool gradients, str? implementation) "
    "-> (Tensor, Tensor, Tensor)",
    _operation,
    _fake,
    backward=_backward,
    setup_context=_setup_context,
)


def _sizes(z: Tensor) -> dict[str, int]:
    stages, batch, features = z.shape
    return {"stages": stages, "batch": batch, "features": features, "threads": torch.get_num_threads()}


def _native_standardize(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z1, z2 = z1.float().contiguous(), z2.float().contiguous()
    assert dispatch.native is not None
    s1, s2 = torch.empty_like(z1), torch.empty_like(z2)
    r1, r2, diagonal = z1.new_empty((3, len(z1), z1.shape[2])).unbind()
    addresses = (tensor.data_ptr() for tensor in (z1, z2, s1, s2, r1, r2, diagonal))
    dispatch.native.crosscorr_standardize(*addresses, epsilon=EPSILON, **_sizes(z1))
    return s1, s2, r1, r2, diagonal


def _native_gradient(
    left: Tensor, right: Tensor, alpha: float, other: Tensor, weight: Tensor, s: Tensor, r: Tensor
) -> Tensor:
    assert dispatch.native is not None
    product = torch.bmm(left, right)
    addresses = (tensor.data_ptr() for tensor in (product, other, weight, s, r))
    dispatch.native.crosscorr_through_standardize(*addresses, alpha=alpha, **_sizes(s))
    return product


# Each pass once through memory, with sums in double.
_native_passes = partial(by_passes, Passes(_native_standardize, _native_gradient))

# The largest batch whose Gram form C++ takes alone. At 256 a library's products are as fast on one thread (measured),
# and sums in double keep a digit that float loses.
_FUSED_ROWS = dispatch.native.CROSSCORR_GRAM_ROWS if dispatch.native else 0

# The best instruction set that it may use, "" for any; tests narrow it.
_INSTRUCTION_SET = ""

_NATIVE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _native(
    z1: Tensor, z2: Tensor, off_diagonal: float, scale: float, form: str, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    stages, n, d = z1.shape
    if form != "gram" or n > _FUSED_ROWS or 0 in (stages, d):
        return _native_passes(z1, z2, off_diagonal, scale, form, gradients)
    assert dispatch.native is not None
    z1, z2 = z1.contiguous(), z2.contiguous()
    loss = z1.new_empty(stages, dtype=torch.float32)
    dz1, dz2 = (z1.new_empty((stages, n if gradients else 0, d), dtype=torch.float32) for _ in range(2))
    scratch = loss.new_empty(dispatch.native.crosscorr_gram_scratch(stages, n, d))
    addresses = (tensor.data_ptr() for tensor in (z1, z2, loss, dz1, dz2, scratch))
    dispatch.native.crosscorr_gram(
        *addresses,
        off_diagonal=off_diagonal,
        scale=scale,
        epsilon=EPSILON,
        dtype=_NATIVE_DTYPES[z1.dtype],
        instruction_set=_INSTRUCTION_SET,
        **_sizes(z1),
    )
    return loss, dz1, dz2


dispatch.register("crosscorr", "reference", reference)
dispatch.register(
    "crosscorr",
    "native",
    _native,
    device_types=("cpu",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    missing=dispatch.NATIVE_MISSING,
)


def _triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastmoco.kernels.crosscorr import crosscorr as launch

    with no_autocast(arguments[0]):
        result: tuple[Tensor, Tensor, Tensor] = launch(*arguments)
    return result


dispatch.register(
    "crosscorr",
    "triton",
    _triton,
    device_types=("cuda",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    missing=dispatch.TRITON_MISSING,
)
