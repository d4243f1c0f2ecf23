"""InfoNCE of queries against their keys and a bank of negatives (van den Oord 2018; He et al. 2020, eq. 1).

The bank has no gradient in momentum contrast, so the gradient to a query needs the softmax-weighted mean of the
negatives alone: attention whose values are its keys. Loss and gradients therefore come out of one sweep over the bank,
and nothing of size N x K exists in any implementation:

    s_ij = q_i . bank_j / t      p_i = (q_i . k_i - margin) / t      lse_i = log(exp p_i + sum_j exp s_ij)
    loss = mean(lse - p)         dq_i = (sum_j exp(s_ij - lse_i) bank_j + (exp(p_i - lse_i) - 1) k_i) / (t N)

infonce_reference.py is that sweep in matrix products, for any device and dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoco.ops import dispatch
from fastmoco.ops.derivatives import refuse_second_derivative
from fastmoco.ops.infonce_reference import Options, Result, masked, norm_of, reference, slices
from fastmoco.ops.library import define
from fastmoco.ops.precision import no_autocast, wide

# A fixed maximum of 1/t stands in for the running one while exp(-2/t), the least term, is a normal float32.
FIXED_MAXIMUM_LIMIT = 60.0


class Ranked(NamedTuple):
    """`loss`: 0-d. `rank`: (N,) int64, how many negatives are more similar to a query than its key is (0: top 1)."""

    loss: Tensor
    rank: Tensor


def infonce(query: Tensor, key: Tensor, bank: Tensor, *, temperature: float, **options: Any) -> Tensor:
    """Mean over the batch of `-log(exp(p) / (exp(p) + sum_j exp(q.bank_j/t)))`, `p = (q.k - margin)/t`: a 0-d tensor.

    The loss of `infonce_ranked`, which has the same arguments.
    """
    return infonce_ranked(query, key, bank, temperature=temperature, **options).loss


def infonce_ranked(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    *,
    temperature: float,
    margin: float = 0.0,
    normalized: bool = True,
    unit_bank: bool = False,
    skip: Tensor | None = None,
    implementation: str | None = None,
) -> Ranked:
    """InfoNCE, and the rank of each key among its query's negatives, which costs nothing more.

    `query` and `key` are (N, D), `bank` is (K, D), each of any floating dtype; the arithmetic and the loss are float32,
    or float64 where the query is float64 (a bfloat16 bank is multiplied as it is, with float32 sums). Gradients reach
    `query`, `key` and, where it requires one, `bank`; they are computed with the loss and have no gradient themselves.

    temperature: divides the similarities; a number above 0, which has no gradient.
    margin: subtracted from the similarity of query and key; the rank is without it.
    normalized: whether query and key have unit length. If not they are normalised here, and the gradients are those
        of the inputs.
    unit_bank: the caller's word that no row of the bank is longer than 1. With `normalized=False` and a temperature of
        at least 1/30 the implementations then need no running maximum.
    skip: (N, M) int64, rows of the bank that are no negatives of a query, -1 for none: with the batch itself as the
        bank, the query's own row and its key's (SimCLR).
    implementation: "reference", "native" or "triton"; None has it chosen.

    Raises ValueError for shapes that do not fit, tensors on two devices, a dtype that is not floating, a temperature
    that is not above 0 or a skip that is not int64.
    """
    if query.ndim != 2 or query.shape != key.shape or bank.ndim != 2 or bank.shape[1] != query.shape[1]:
        raise ValueError(
            f"infonce: query and key must be (N, D) and bank (K, D), "
            f"not {tuple(query.shape)}, {tuple(key.shape)} and {tuple(bank.shape)}"
        )
    if query.numel() == 0:
        raise ValueError(f"infonce: query and key of shape {tuple(query.shape)} are empty")
    _check_alike({"key": key, "bank": bank} | ({} if skip is None else {"skip": skip}), query)
    if not temperature > 0:
        raise ValueError(f"infonce: temperature must be above 0, not {temperature}")
    if skip is not None and (skip.ndim != 2 or len(skip) != len(query) or skip.dtype != torch.int64):
        raise ValueError(
            f"infonce: skip must be ({len(query)}, M) int64, not {tuple(skip.shape)} {str(skip.dtype).split('.')[1]}"
        )
    fixed = unit_bank and not normalized and 2 / temperature <= FIXED_MAXIMUM_LIMIT
    key_gradient = key.requires_grad and torch.is_grad_enabled()
    loss, rank, *_ = _infonce(
        query, key, bank, skip, temperature, margin, normalized, fixed, key_gradient, implementation
    )
    return Ranked(loss, rank)


def _check_alike(others: dict[str, Tensor], query: Tensor) -> None:
    for name, tensor in {"query": query, **others}.items():
        if tensor.device != query.device:
            raise ValueError(f"infonce: {name} is on {tensor.device}, but the query on {query.device}")
        if name != "skip" and not tensor.is_floating_point():
            raise ValueError(f"infonce: {name} must have a floating dtype, not {tensor.dtype}")


def _forward(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    skip: Tensor | None,
    temperature: float,
    margin: float,
    normalized: bool,
    fixed_maximum: bool,
    key_gradient: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = Options(temperature, margin, normalized, fixed_maximum, key_gradient)
    with no_autocast(query):
        result: Result = dispatch.pick("infonce", query, implementation)(query, key, bank, skip, options)
        return result


def _fake_forward(query: Tensor, key: Tensor, bank: Tensor, skip: Tensor | None, *rest: Any) -> Result:
    n, d = query.shape
    key_gradient = Options(*rest[:-1]).key_gradient
    dtype = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty((), dtype=dtype),
        query.new_empty((n,), dtype=torch.int64),
        query.new_empty((n,), dtype=dtype),
        query.new_empty((n, d), dtype=dtype),
        query.new_empty((n if key_gradient else 0, d), dtype=dtype),
    )


def _through_bank(
    query: Tensor, bank: Tensor, skip: Tensor | None, lse: Tensor, temperature: float, normalized: bool
) -> Tensor:
    """(K, D), `sum_i exp(s_ij - lse_i) q_i / (t N)`: a second sweep, for banks that are part of the batch."""
    with no_autocast(query):
        q = wide(query)
        if not normalized:
            q = q / norm_of(q)
        gradient = lse.new_empty(bank.shape)
        for start, rows in slices(bank, len(q), q.dtype):
            weights = masked(q @ rows.T, skip, start).div_(temperature).sub_(lse[:, None]).exp_()
            torch.mm(weights.T, q, out=gradient[start : start + len(rows)])
        return gradient.div_(temperature * len(q))


def _fake_bank(
    query: Tensor, bank: Tensor, skip: Tensor | None, lse: Tensor, temperature: float, normalized: bool
) -> Tensor:
    return lse.new_empty(bank.shape)


_bank_gradient = define(
    "infonce_bank(Tensor query, Tensor bank, Tensor? skip, Tensor lse, float temperature, bool normalized) -> Tensor",
    _through_bank,
    _fake_bank,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, bank, skip, temperature, _, normalized, *_ = inputs
    _, rank, lse, dquery, dkey = output
    ctx.mark_non_differentiable(rank, lse, dquery, dkey)
    ctx.set_materialize_grads(False)
    ctx.dtypes = query.dtype, key.dtype
    ctx.temperature, ctx.normalized = temperature, normalized
    # The bank is kept only where it has a gradient: elsewhere keys may be pushed to it before the backward.
    ctx.bank_gradient = bank.requires_grad
    ctx.save_for_backward(dquery, dkey, *((query, bank, skip, lse) if ctx.bank_gradient else ()))


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 10
    refuse_second_derivative("infonce")
    dquery, dkey, *kept = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 10
    for i, gradient in enumerate((dquery, dkey)):
        if ctx.needs_input_grad[i]:
            grads[i] = (gradient * dloss).to(ctx.dtypes[i])
    if ctx.bank_gradient:
        query, bank, skip, lse = kept
        dbank = _bank_gradient(query, bank, skip, lse, ctx.temperature, ctx.normalized)
        grads[2] = (dbank * dloss).to(bank.dtype)
    return tuple(grads)


_infonce = define(
    "infonce(Tensor query, Tensor key, Tensor bank, Tensor? skip, float temperature, float margin, bool normalized, "
    "bool fixed_maximum, bool key_gradient, str? implementation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)


# The best instruction set that the C++ may use, "" for any; tests narrow it.
_INSTRUCTION_SET = ""

_NATIVE_BANKS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _native(query: Tensor, key: Tensor, bank: Tensor, skip: Tensor | None, options: Options) -> Result:
    """Threaded C++: both products and the exponential on 96 rows of the bank at a time, in registers and L1."""
    assert dispatch.native is not None
    n, d = query.shape
    q, k = query.float().contiguous(), key.float().contiguous()
    if bank.dtype not in _NATIVE_BANKS:
        bank = bank.float()
    bank = bank.contiguous()
    skip = None if skip is None else skip.contiguous()
    threads = torch.get_num_threads()
    loss, lse, dquery = q.new_empty(()), q.new_empty(n), torch.empty_like(q)
    dkey = q.new_empty((n if options.key_gradient else 0, d))
    rank = q.new_empty(n, dtype=torch.int64)
    scratch = q.new_empty(dispatch.native.infonce_scratch(n, d, threads))
    dispatch.native.infonce(
        query=q.data_ptr(),
        key=k.data_ptr(),
        bank=bank.data_ptr(),
        skip=0 if skip is None else skip.data_ptr(),
        loss=loss.data_ptr(),
        rank=rank.data_ptr(),
        lse=lse.data_ptr(),
        dquery=dquery.data_ptr(),
        dkey=dkey.data_ptr() if options.key_gradient else 0,
        scratch=scratch.data_ptr(),
        n=n,
        d=d,
        k=len(bank),
        skips=0 if skip is None else skip.shape[1],
        temperature=options.temperature,
        margin=options.margin,
        normalized=options.normalized,
        fixed_maximum=options.fixed_maximum,
        bank_dtype=_NATIVE_BANKS[bank.dtype],
        instruction_set=_INSTRUCTION_SET,
        threads=threads,
    )
    return loss, rank, lse, dquery, dkey


def _triton(query: Tensor, key: Tensor, bank: Tensor, skip: Tensor | None, options: Options) -> Result:
    from fastmoco.kernels.infonce import infonce as launch

    result: Result = launch(query, key, bank, skip, *options)
    return result


_DTYPES = tuple(_NATIVE_BANKS)
dispatch.register("infonce", "reference", reference)
dispatch.register("infonce", "native", _native, device_types=("cpu",), dtypes=_DTYPES, missing=dispatch.NATIVE_MISSING)
dispatch.register("infonce", "triton", _triton, device_types=("cuda",), dtypes=_DTYPES, missing=dispatch.TRITON_MISSING)
