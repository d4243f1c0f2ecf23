"""How many steps a run makes, and the learning rate as a pure function of the step: resuming needs only the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastmoco.data.order import Order
from fastmoco.errors import UserError
from fastmoco.train.config import Config


def learning_rate(step: int, *, peak: float, total: int, warmup: int, schedule: str) -> float:
    """The learning rate of step `step` (from 0) of `total`.

    It rises linearly over the first `warmup` steps, reaching `peak` at the last of them, then stays ("constant") or
    follows half a cosine that would reach 0 at step `total` ("cosine", Loshchilov and Hutter 2017, eq. 5).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@dataclass(frozen=True)
class Plan:
    """The run in numbers: micro-batches in an epoch, optimiser steps in all, and of those the warm-up."""

    per_epoch: int
    total: int
    warmup: int


def plan(config: Config, order: Order) -> Plan:
    """How many steps `config` makes over `order`."""
    optim = config.optim
    per_epoch = order.batches_per_epoch
    total = optim.steps or optim.epochs * per_epoch // optim.accumulate
    if total < 1:
        raise UserError(
            f"--accumulate {optim.accumulate} is more than the {optim.epochs * per_epoch} micro-batches of "
            f"{optim.epochs} epochs: no step would be made"
        )
    warmup = round(optim.warmup_epochs * per_epoch / optim.accumulate)
    if warmup >= total > 1 and order.shard == 0:
        print(f"warning: all {total} steps are warm-up, so --lr {optim.lr:g} is never used in full")
    keys = config.loss.keys_per_pair
    held = config.loss.queue_size // keys if keys else 0
    if held > order.samples and total > per_epoch // optim.accumulate and order.shard == 0:
        print(
            f"warning: the queue of {config.loss.queue_size:,} keys is longer than the {order.samples:,} images, so "
            "that an image's own old keys are always among its negatives: choose a --queue-size below that"
        )
    return Plan(per_epoch, total, warmup)
