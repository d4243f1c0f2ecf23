"""Several processes that run one function of a test, each as a rank of one world."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch

from bench.ports import free_port
from bridge import INTERFACE, Bridge, enter
from fastmoco.distributed.launch import Launch, joined


def start_server() -> None:
    """Start the server that the processes are forked from, unless it runs.

    Torch, and DeepSpeed where there is one, are imported once, by it: with what DeepSpeed would import as an engine is
    made, seconds in each process. A process has one such server, of the imports that its first user wants: conftest.py
    sees to it that this is the first.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    preload = ["worlds", "fastmoco.cli", "fastmoco.train.pretrain", "deepspeed", "torch._inductor.compile_fx"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    multiprocessing.forkserver.ensure_running()


def in_world(
    size: int, function: Callable[..., Any], *args: Any, timeout: float = 900.0, bridge: Bridge | None = None
) -> list[Any]:
    """What `function(world, *args)` returns in each of `size` processes, by rank, over gloo on this machine.

    With a `bridge` each process is on one of its hosts.

    `function` is one of a module's own, its arguments and results can be pickled. AssertionError, with the tracebacks,
    where any process fails.
    """
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    # As bytes, both ways: handed over themselves, tensors would be memory of the process that made them.
    task = pickle.dumps((function, args))
    port = free_port()
    processes = [
        context.Process(target=_run, args=(rank, size, port, timeout, results, bridge, task), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=timeout) for _ in range(size))
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    failures = [f"rank {rank}:\n{error}" for rank, (error, _) in sorted(found.items()) if error]
    assert not failures, "\n".join(failures)
    return [pickle.loads(found[rank][1]) for rank in range(size)]


def _run(
    rank: int,
    size: int,
    port: int,
    timeout: float,
    results: Any,
    bridge: Bridge | None,
    task: bytes,
) -> None:
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(task)
        launch = Launch("test", rank, size, rank, size, port=port)
        if bridge is not None:
            enter(bridge.namespaces[rank])
            os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
            launch = Launch("test", rank, size, 0, 1, bridge.addresses[0], port)
        with joined("cpu", timeout=timeout, launch=launch) as world:
            result = function(world, *args)
        results.put((rank, ("", pickle.dumps(result))))
    except BaseException:
        results.put((rank, (traceback.format_exc(), b"")))
