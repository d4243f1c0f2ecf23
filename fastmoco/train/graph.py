"""A micro-batch as one CUDA graph: the device is told once what to do, and then only to do it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.train.config import Config
from fastmoco.train.objective import Output

MicroBatch = Callable[..., Output]
Capture = Callable[[Callable[[], None]], Callable[[], None]]

# DistributedDataParallel settles its buckets, and looks at the graph of autograd, within its first steps; torch's notes
# on CUDA graphs ask for eleven.
WARM_UP = 11


def check_capturable(config: Config, world: World) -> None:
    """Raise UserError where `config` asks for a CUDA graph that cannot be had in `world`."""
    if not config.run.cuda_graph:
        return
    if world.device.type != "cuda":
        raise UserError(f"--cuda-graph is for GPUs, and this run is on {world.device}: leave it out")
    if config.run.engine == "deepspeed":
        raise UserError("--cuda-graph: DeepSpeed's steps read from the device and cannot be captured: use --engine ddp")
    if config.optim.accumulate > 1:
        raise UserError("--cuda-graph needs --accumulate 1: gradients of several micro-batches are added up in place")


def use_own_stream(device: torch.device) -> None:
    """Have this thread work on a stream of its own from now on.

    What is captured must not touch the default stream, and autograd stays with the stream that it began on.
    """
    torch.cuda.set_stream(torch.cuda.Stream(device))


class GraphedMicroBatch:
    """`run(*inputs) -> Output` of tensors, or None for one, captured after a few calls and replayed from then on.

    Every input is copied to where the capture read it, and every call returns the same tensors with new values, so that
    they are to be read before the next. Shapes must not change. What was counted in the world's `sent` during the
    capture is counted again at each replay.
    """

    def __init__(
        self, run: MicroBatch, world: World, *, capture: Capture | None = None, warm_up: int = WARM_UP
    ) -> None:
        self._run, self._world = run, world
        self._capture = capture or _cuda_capture
        self._left = warm_up
        self._inputs: list[Tensor | None] = []
        self._replay: Callable[[], None] | None = None
        self._output: Output | None = None
        self._sent: Counter[str] = Counter()

    @property
    def captured(self) -> bool:
        """Whether the next call will be a replay."""
        return self._replay is not None

    def __call__(self, *given: Tensor | None) -> Output:
        if self._left > 0:
            self._left -= 1
            return self._run(*given)
        if self._replay is None:
            self._inputs = [None if value is None else value.clone() for value in given]
            before = Counter(self._world.sent)
            self._replay = self._capture(self._once)
            # A capture sends nothing yet.
            self._sent = self._world.sent - before
            self._world.sent.subtract(self._sent)
        for place, value in zip(self._inputs, given, strict=True):
            if place is not None and value is not None:
                place.copy_(value, non_blocking=True)
        self._replay()
        self._world.sent.update(self._sent)
        assert self._output is not None
        return self._output

    def _once(self) -> None:
        self._output = self._run(*self._inputs)


def _cuda_capture(once: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # Loader threads go on using the device meanwhile.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        once()
    return graph.replay
