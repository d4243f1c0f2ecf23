"""What there is to compute, hold and send in a step, counted on the real module without its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastmoco.errors import UserError
from fastmoco.plan.operations import Operations, crosscorr_flops, record
from fastmoco.train.config import LossConfig, ModelConfig
from fastmoco.train.copies import Copies
from fastmoco.train.engines.engine import COMPUTE_DTYPE
from fastmoco.train.objective import Objective
from fastmoco.train.objectives import make_objective

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Counts:
    """Of one process and one micro-batch of `rows` images.

    trained, averaged: elements of the trained parameters and of the key encoder's. copied, copied_trained: elements of
    those weights that are multiplied in half precision, all and the trained. linear, linear_trained: elements of linear
    layers, which DeepSpeed sends in half precision. channels_forward, channels_backward: channels of all BatchNorms, as
    often as they run; norms_forward and norms_backward: how often they do. pooled: numbers of an image's maps that go
    back to its process under --key-shuffle global. kept: bytes that the backward needs.
    """

    rows: int
    trained: int
    averaged: int
    copied: int
    copied_trained: int
    linear: int
    linear_trained: int
    channels_forward: int
    channels_backward: int
    norms_forward: int
    norms_backward: int
    pooled: int
    kept: int
    operations: Operations


def count(
    model: ModelConfig, loss: LossConfig, *, size: int, rows: int, precision: str, world: int = 1
) -> Counts:
    """Counts of one of `world` processes, with `rows` images (rows, 3, size, size) a micro-batch.

    Nothing is allocated or sent. Raises UserError where so few images have no cross-correlation.
    """
    for option, value in (("method", loss.method), ("objective", loss.objective)):
        if value in ("barlow", "barlow-twins") and rows < 2:
            raise UserError(f"--{option} {value} needs at least 2 images a GPU, not {rows}: raise --batch-size")
    with torch.device("meta"):
        # In a world of one its BatchNorms and gathers are the plain ones: what they send is not computed here.
        module = make_objective(replace(model, init=None), replace(loss, key_shuffle="none"), seed=0)
    if precision == "fp64":
        module.double()
    module.to(memory_format=torch.channels_last)
    half = BYTES[precision] == 2
    copies = Copies(module, module.multiplied if half else [])
    view = torch.empty(rows, 3, size, size, device="meta", dtype=COMPUTE_DTYPE[precision])
    view = view.to(memory_format=torch.channels_last)
    beside = _beside(module, model, loss, rows)

    def run() -> Tensor:
        # Copies are bfloat16; float16 moves and multiplies as much.
        bf16 = view.bfloat16() if half else view
        return torch.stack(list(copies(bf16, bf16, *beside).losses.values())).sum()

    given = [*module.parameters(), *module.buffers(), *copies.by_name.values(), view]
    operations, kept = record(run, [*given, *(tensor for tensor in beside if tensor is not None)])
    _add_shared_losses(operations, model, loss, rows=rows, world=world, precision=precision)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    names = set(module.multiplied)
    # By class, as DeepSpeed does: fastmoco's convolutions are of one of their own, which it does not know.
    linear = [p for part in module.modules() if type(part) is nn.Linear for p in part.parameters(recurse=False)]
    query, key = (channels * times for channels, times in zip(_channels_of(module), module.passes, strict=True))
    # A projector normalises each of the two views on its own, forward and backward, and once more the other way round.
    views = 2 * max(loss.keys_per_pair, 1)
    projectors = [views * c for c in _channels(module.stage_loss)] if module.stage_loss else []
    twice = views * len(projectors)
    return Counts(
        rows=rows,
        trained=sum(p.numel() for p in trained.values()),
        averaged=sum(p.numel() for p in module.averages.values()),
        copied=sum(module.get_parameter(name).numel() for name in names),
        copied_trained=sum(p.numel() for name, p in trained.items() if name in names),
        linear=sum(p.numel() for p in linear),
        linear_trained=sum(p.numel() for p in linear if p.requires_grad),
        channels_forward=sum(query) + sum(key) + sum(projectors),
        channels_backward=sum(query) + sum(projectors),
        norms_forward=len(query) + len(key) + twice,
        norms_backward=len(query) + twice,
        pooled=_pooled(module, loss),
        kept=kept,
        operations=operations,
    )


def _beside(module: Objective, model: ModelConfig, loss: LossConfig, rows: int) -> list[Tensor | None]:
    """What the forward takes beside the views: negatives, or classes, order and share."""
    with torch.device("meta"):
        if module.queued:
            return [torch.empty(loss.queue_size, model.dim)]
        numbers = torch.empty(rows, dtype=torch.int64)
        return [numbers, numbers, torch.empty(())] if loss.mix_weight else [numbers]


def _add_shared_losses(
    operations: Operations, model: ModelConfig, loss: LossConfig, *, rows: int, world: int, precision: str
) -> None:
    """Add what every process computes of the losses of all images, beyond those of its own `rows`."""
    together = world * rows
    if loss.barlow_correlation == "global" and loss.method == "barlow":
        stages, d = len(loss.stages) * max(loss.keys_per_pair, 1), loss.projector_width
        more = crosscorr_flops(stages, together, d) - crosscorr_flops(stages, rows, d)
        operations.add(more, 4 * stages * (together - rows) * d * BYTES[precision])
    if loss.barlow_correlation == "global" and loss.objective == "barlow-twins":
        # Mixed samples have products of the same sizes, one more.
        terms = 2 if loss.mix_weight else 1
        more = crosscorr_flops(terms, together, model.dim) - crosscorr_flops(terms, rows, model.dim)
        operations.add(more, 4 * terms * (together - rows) * model.dim * 4)
    if loss.objective in ("simclr", "supcon"):
        # Each of both views against both of all: a sweep for loss and gradient, and one for that of the negatives.
        operations.add(8 * 4 * (together**2 - rows**2) * model.dim, 8 * (together - rows) * model.dim * 4)


def _channels_of(module: Objective) -> tuple[list[int], list[int]]:
    """Channels of the BatchNorms of the query encoder, and of the key encoder, if there is one."""
    query, *key = (_channels(encoder) for encoder in module.encoders)
    return query, key[0] if key else []


def _channels(module: nn.Module) -> list[int]:
    return [part.num_features for part in module.modules() if isinstance(part, _BatchNorm)]


def _pooled(module: Objective, loss: LossConfig) -> int:
    if loss.stage_loss == "none":
        return 0
    grids = loss.grids if loss.stage_loss == "mse" else (1, 1, 1, 1)
    return sum(module.query.stage_widths[s - 1] * grids[s - 1] ** 2 for s in loss.stages)
