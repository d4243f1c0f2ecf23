"""What processes have to find alike before they train together, and what one of them may lack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco.distributed.agreement import everywhere
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.train.alike import check_settings, check_start
from fastmoco.train.checkpoint import Checkpoint
from fastmoco.train.engines.make import engine_name
from fastmoco.train.opening import initial_weights
from runs import small_config
from worlds import in_world


def _said(world: World, folder: Path) -> list[str]:
    """What each check says where this process differs from the other, and then where none does."""
    config = small_config(folder, folder / f"out{world.rank}", workers=world.rank)
    other = replace(config, run=replace(config.run, precision=("bf16", "fp32")[world.rank]))
    saved = Checkpoint({}, {"step": (20, 10)[world.rank]})
    init = replace(config, model=replace(config.model, init=str(folder / "gone.pth") if world.rank == 1 else None))
    said = []
    for check in (
        lambda: check_settings(world, other),
        lambda: check_start(world, saved),
        lambda: everywhere(world, lambda: initial_weights(world, init, None)),
    ):
        with pytest.raises(UserError) as caught:
            check()
        said.append(str(caught.value))
    check_settings(world, config)
    check_start(world, Checkpoint({}, {"step": 20}))
    check_start(world, None)
    return said


def test_processes_that_differ_all_say_so_before_they_train(tmp_path: Path) -> None:
    results = in_world(2, _said, tmp_path)
    assert results[0] == results[1]
    settings, start, init = results[0]
    host = World().host
    assert f"different settings: --precision is bf16 on rank 0 ({host}), fp32 on rank 1 ({host})." in settings
    assert f"is step 20 on rank 0 ({host}), step 10 on rank 1 ({host}): " in start
    assert init.startswith(f"rank 1 on {host}: ") and str(tmp_path / "gone.pth") in init


def test_one_process_has_nobody_to_differ_from(tmp_path: Path) -> None:
    config = small_config(tmp_path, tmp_path / "out")
    check_settings(World(), config)
    check_start(World(), Checkpoint({}, {"step": 20}))


def test_zero_is_refused_without_its_engine(tmp_path: Path) -> None:
    world = World(size=2)
    for engine, name in (("auto", "ddp"), ("ddp", "ddp")):
        config = small_config(tmp_path, tmp_path, engine=engine)
        assert engine_name(config, world) == name
        with pytest.raises(UserError, match=r"--zero 3 is DeepSpeed's, and this is ddp: add --engine deepspeed"):
            engine_name(replace(config, run=replace(config.run, zero=3)), world)
