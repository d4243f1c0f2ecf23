"""Which engine runs, decided here from the options and the number of processes."""

from __future__ import annotations

from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.train.config import Config
from fastmoco.train.engines.ddp import DataParallel
from fastmoco.train.engines.deepspeed import DeepSpeed, require_deepspeed
from fastmoco.train.engines.engine import Engine
from fastmoco.train.engines.single import SingleProcess
from fastmoco.train.objective import Objective


def engine_name(config: Config, world: World) -> str:
    """The engine that `config` means in `world`. Raises UserError where they do not go together, or it is missing."""
    chosen = config.run.engine
    if chosen == "auto":
        chosen = "single" if world.alone else "ddp"
    if chosen == "single" and not world.alone:
        raise UserError(f"--engine single cannot join {world.size} processes: choose ddp or deepspeed")
    if chosen != "single" and world.alone:
        raise UserError(
            f"--engine {chosen} shares work out to several processes, and there is one: start it with torchrun "
            "--nproc-per-node N -m fastmoco pretrain ..., or with srun"
        )
    if config.run.zero is not None and chosen != "deepspeed":
        raise UserError(f"--zero {config.run.zero} is DeepSpeed's, and this is {chosen}: add --engine deepspeed")
    if chosen == "deepspeed":
        require_deepspeed()
        if config.run.precision == "fp64":
            raise UserError("--engine deepspeed has no --precision fp64: choose fp32, bf16 or fp16, or --engine ddp")
        if config.optim.optimizer == "lars":
            raise UserError("--optimizer lars needs whole weights, which --engine deepspeed shares out: use ddp")
    return chosen


def make_engine(config: Config, module: Objective, *, precision: str, world: World) -> Engine:
    """The engine that runs `module`, on the world's device, in `precision`. Raises UserError as engine_name does."""
    name = engine_name(config, world)
    if name == "deepspeed":
        zero = 1 if config.run.zero is None else config.run.zero
        return DeepSpeed(module, config.optim, precision=precision, world=world, zero=zero)
    if name == "ddp":
        return DataParallel(module, config.optim, precision=precision, world=world)
    return SingleProcess(module, config.optim, precision=precision, world=world)
