"""How the processes of a run find each other: started by torchrun, by srun, or one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastmoco.device import find_device
from fastmoco.distributed import slurm
from fastmoco.distributed.world import World
from fastmoco.errors import UserError


@dataclass(frozen=True)
class Launch:
    """What the launcher `by` ("torchrun", "srun" or "alone") says of this process, and where rank 0 listens."""

    by: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """How this process was started, from its environment. Raises UserError where that is incomplete."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _of_torchrun(environ)
    # A job step, started by srun; the batch script itself has the job's variables without these.
    if "SLURM_PROCID" in environ and slurm.integer(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _of_srun(environ)
    return Launch("alone")


def _of_torchrun(environ: Mapping[str, str]) -> Launch:
    size = slurm.integer(environ, "WORLD_SIZE", 1)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if missing and size > 1:
        raise UserError(
            f"started by torchrun without {' and '.join(missing)}: set rank 0's host and a port that is free there"
        )
    return Launch(
        "torchrun",
        slurm.integer(environ, "RANK", 0),
        size,
        slurm.integer(environ, "LOCAL_RANK", 0),
        slurm.integer(environ, "LOCAL_WORLD_SIZE", 1),
        environ.get("MASTER_ADDR", "127.0.0.1"),
        slurm.integer(environ, "MASTER_PORT", 29500),
    )


def _of_srun(environ: Mapping[str, str]) -> Launch:
    """The rendezvous is that of MASTER_ADDR and MASTER_PORT where they are set, else taken from the job step."""
    return Launch(
        "srun",
        slurm.integer(environ, "SLURM_PROCID", 0),
        slurm.integer(environ, "SLURM_STEP_NUM_TASKS", 1),
        slurm.integer(environ, "SLURM_LOCALID", 0),
        slurm.tasks_on_node(environ),
        environ.get("MASTER_ADDR") or slurm.rendezvous_address(environ),
        slurm.integer(environ, "MASTER_PORT", 0) or slurm.rendezvous_port(environ),
    )


@contextmanager
def joined(device: str, *, timeout: float = 300.0, launch: Launch | None = None) -> Iterator[World]:
    """The world of this process while it is open; `device` as --device names it, on several GPUs the local rank's.

    timeout: seconds that processes wait for each other at the start, and that a collective may take, those of `control`
    apart, until the processes watch over each other (monitor.py).

    Raises UserError where the device cannot be used, or would be that of several processes, or the others do not come.
    """
    launch = launch or find_launch()
    if launch.size == 1:
        yield World(device=find_device(device))
        return
    if device.startswith("cuda:") and launch.local_size > 1:
        raise UserError(
            f"--device {device} is one GPU, and {launch.local_size} processes of this machine would share it: leave it "
            "out, or give --device cuda, and each takes its own"
        )
    where = find_device(f"cuda:{_own_gpu(launch)}" if _wants_gpu(device) else device)
    backend = "nccl" if where.type == "cuda" else "gloo"
    if where.type == "cuda":
        torch.cuda.set_device(where)
    wait = timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            backend, init_method=f"tcp://{launch.address}:{launch.port}", rank=launch.rank, world_size=launch.size,
            timeout=wait,
        )  # fmt: skip
    except (RuntimeError, ValueError, OSError) as error:
        raise _unmet(launch, error) from error
    try:
        yield World(
            launch.rank, launch.size, launch.local_rank, launch.local_size, where, dist.group.WORLD, _control(launch)
        )
    finally:
        dist.destroy_process_group()


def _control(launch: Launch) -> Any:
    try:
        # What is waited for here may be a look at all images, or their copy. That a process is gone is seen elsewhere.
        return dist.new_group(backend="gloo", timeout=timedelta(days=7))
    except (RuntimeError, ValueError, OSError) as error:
        raise _unmet(launch, error) from error


def _unmet(launch: Launch, error: Exception) -> UserError:
    # gloo listens at the address of the host's own name, which on some is 127.0.1.1.
    hint = "; where a machine has several networks, or its own name stands for 127.0.1.1, name the one to meet over in "
    hint += "GLOO_SOCKET_IFNAME (`ip -br addr` lists them)"
    return UserError(
        f"rank {launch.rank} of {launch.size}, started by {launch.by}, could not meet the others at "
        f"{launch.address}:{launch.port}: {error}{hint if launch.size > launch.local_size else ''}"
    )


def _wants_gpu(device: str) -> bool:
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def _own_gpu(launch: Launch) -> int:
    # With --gpus-per-task and the like, SLURM shows each process one GPU, which is number 0 there.
    bound = launch.by == "srun" and torch.cuda.device_count() == 1
    return 0 if bound else launch.local_rank
