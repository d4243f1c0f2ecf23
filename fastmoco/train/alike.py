"""What all processes of a run must have found alike before it begins: one that differs trains on something else."""

from __future__ import annotations

import json
from typing import Any

from fastmoco.distributed.agreement import largest, texts
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.train.checkpoint import Checkpoint
from fastmoco.train.config import Config
from fastmoco.train.stored import to_json

# Where a machine has its things, and how many processes load there, is its own affair.
_OWN = {"data": {"workers", "stage"}, "run": {"device", "out"}}
_NAMED = 4


def check_settings(world: World, config: Config) -> None:
    """Raise UserError in every process where `config`, with each "auto" resolved, is not the same in all of them."""
    every = [json.loads(text) for text in texts(world, json.dumps(_fields(config)))]
    differing = [name for name in every[0] if any(one.get(name) != every[0][name] for one in every)]
    if differing:
        settings = "; ".join(f"{name} is {_by_rank(world, [one.get(name) for one in every])}" for name in differing)
        raise UserError(
            f"the processes of this run have different settings: {settings}. Start all with the same options, and name "
            "the value where auto means another on each machine"
        )


def check_start(world: World, saved: Checkpoint | None) -> None:
    """Raise UserError in every process where they do not all go on from the same step; `saved` is this one's."""
    step = -1 if saved is None else saved.step
    most, least = largest(world, step, -step)
    if most != -least:
        seen = ["not there" if text == "-1" else f"step {text}" for text in texts(world, str(step))]
        raise UserError(
            f"--resume: the newest checkpoint in --out is {_by_rank(world, seen)}: --out has to name a folder that "
            "all machines share, of which some may hold an old listing; wait a minute and start again"
        )


def _fields(config: Config) -> dict[str, Any]:
    """What has to be the same everywhere, by option."""
    fields: dict[str, Any] = {}
    for group, values in to_json(config).items():
        if not isinstance(values, dict):
            fields[group] = values
            continue
        own = _OWN.get(group, set())
        fields |= {f"--{name.replace('_', '-')}": value for name, value in values.items() if name not in own}
    return fields


def _by_rank(world: World, values: list[Any]) -> str:
    """Which of `values`, by rank, is whose: "bf16 on rank 0 (a), fp32 on ranks 1, 2 (b)". Every process calls it."""
    hosts = texts(world, world.host)
    parts = []
    for value in {str(value): None for value in values}:
        ranks = [rank for rank, one in enumerate(values) if str(one) == value]
        named = ", ".join(str(rank) for rank in ranks[:_NAMED]) + (", ..." if len(ranks) > _NAMED else "")
        where = ", ".join(list(dict.fromkeys(hosts[rank] for rank in ranks))[:_NAMED])
        parts.append(f"{value} on rank{'s' if len(ranks) > 1 else ''} {named} ({where})")
    return ", ".join(parts)
