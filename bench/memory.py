"""Bytes a run needs at its peak beyond what is there when it starts, by the allocator and by the operating system."""

from __future__ import annotations

import ctypes
import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(run: Callable[[], object], device: str) -> dict[str, Any]:
    """`peak_bytes` at torch's allocator, results included; on CPUs `resident_bytes` too, each with how it was read.

    The allocator sees every tensor, those inside an operation as well, but no scratch that C++ takes for itself; the
    rise of the resident set sees both, to a page, and is None where the kernel does not say. Call it after a warm-up.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return {
            "peak_bytes": torch.cuda.max_memory_allocated() - before,
            "resident_bytes": None,
            "memory_method": "torch.cuda.max_memory_allocated above its start",
        }
    return {
        "peak_bytes": _allocated(run),
        "resident_bytes": _resident(run),
        "memory_method": "peak_bytes: torch.profiler's allocator events; resident_bytes: VmHWM above VmRSS",
    }


def _allocated(run: Callable[[], object]) -> int:
    # The profiler's library announces itself on standard error, in some versions.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    live = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    return peak


def _resident(run: Callable[[], object]) -> int | None:
    if not STATUS.exists():
        return None
    gc.collect()
    # What malloc keeps of freed memory would otherwise be used again unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return None
    trim(0)
    try:
        CLEAR.write_text("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
