"""Where the GPU's tests run and how they compare.

FASTMOCO_GPU_TESTS=cpu runs them on the CPU, where what is CUDA's own (graphs, synchronisation, its allocator) is left
out of each: a check of the tests themselves.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICE = torch.device(os.environ.get("FASTMOCO_GPU_TESTS", "cuda"))

# Relative, by norms: float32 sums of some thousand terms; bfloat16 and float16 round what is given and returned.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def on_cuda() -> bool:
    return DEVICE.type == "cuda"


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian numbers on DEVICE, the same wherever the test runs."""
    return torch.randn(shape, dtype=torch.float32).to(DEVICE, dtype)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str, *, least: float = 1e-30) -> None:
    """Within `tolerance` of the float64 `expected`, relative to its norm or `least`, what its terms have before they
    cancel; NaN and infinity are never near."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    error = float((actual.detach().double() - expected.double()).norm())
    scale = max(float(expected.double().norm()), least)
    assert math.isfinite(error), f"{what}: not finite"
    assert error <= tolerance * scale, f"{what}: off by {error / scale:.2e}, over {tolerance:g}"


def assert_same_bits(run: Callable[[], Sequence[Tensor]]) -> None:
    """Three runs give the same bits."""
    first = [tensor.clone() for tensor in run()]
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True)), "runs differ"


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """An error where the host would wait for the device."""
    if not on_cuda():
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_peak_below(limit: int, run: Callable[[], object]) -> None:
    """`run`, after a warm-up, takes less than `limit` bytes beyond what is there, results included."""
    run()
    if not on_cuda():
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < limit, f"{peak / 2**20:.1f} MiB at the peak, over {limit / 2**20:.1f}"


def replay(step: Callable[[], object], times: int, *, between: Callable[[], object] | None = None) -> None:
    """`step` captured in a CUDA graph and replayed; on a CPU, called. Capturing does not run it.

    With `between`, `step` runs once before, on the stream that captures it, and `between` there, before the replays.
    """
    if not on_cuda():
        if between is not None:
            step(), between()
        for _ in range(times):
            step()
        return
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    if between is not None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
    with torch.cuda.graph(graph, stream=stream):
        step()
    if between is not None:
        with torch.cuda.stream(stream):
            between()
    torch.cuda.synchronize()
    for _ in range(times):
        graph.replay()
    torch.cuda.synchronize()
