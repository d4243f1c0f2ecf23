"""Memory that tensors free stays the process's where that is asked for, and the environment has the last word."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from fastmoco.allocator import freed_memory_kept, give_back_freed_memory, keep_freed_memory

# How many pages the kernel has to clear for twenty tensors of 80 MB, anew and where freed memory is kept, and for two
# of 320 MB before and after that, made a second time. In between the heap grows: to align a tensor glibc
# looks for some bytes more than one has left. Small blocks above large ones leave holes in it, whose memory is given
# back while their addresses stay the heap's: only what fits into none of them surely comes from the kernel afterwards.
PROGRAM = """
import resource, torch
from fastmoco.allocator import freed_memory_kept
torch.set_num_threads(1)
BLOCK, LARGE = 20_000_000, 80_000_000
def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize() >> 20
def pair(elements):
    a, b = torch.ones(elements), torch.zeros(elements)
    assert float(a[-1] + b[-1]) == 1
    return a, b
def cleared(times, elements):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        pair(elements)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
cleared(1, BLOCK)
anew, anew_large = cleared(10, BLOCK), cleared(1, LARGE)
with freed_memory_kept("cpu"):
    low = pair(BLOCK)
    above = [torch.ones(1000) for _ in range(10_000)]
    del low
    cleared(10, BLOCK)
    kept = cleared(10, BLOCK)
    held = resident()
given_back = held - resident()
cleared(1, LARGE)
print(anew, kept, given_back, anew_large, cleared(1, LARGE))
"""

CHOICES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
@pytest.mark.skipif(HUGE.exists() and "[always]" in HUGE.read_text(), reason="pages are large and few as it is")
def test_freed_memory_is_used_again_without_the_kernel() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=clean, capture_output=True, text=True, check=True)
    anew, kept, given_back, anew_large, after = map(int, done.stdout.split())
    assert anew > 10_000 and kept < anew / 5 and given_back > 100
    assert anew_large > 10_000 and after > anew_large / 2


@pytest.mark.parametrize(
    ("name", "value", "stays"),
    [
        ("MALLOC_MMAP_MAX_", "65536", True),
        ("MALLOC_TRIM_THRESHOLD_", "131072", True),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=65536", True),
        ("GLIBC_TUNABLES", "glibc.cpu.x86_rep_movsb_threshold=4096", False),
        ("MALLOC_ARENA_MAX", "2", False),
    ],
)
def test_what_the_environment_says_of_it_stays(
    name: str, value: str, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Mock(return_value=1)
    trimmed = Mock()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=told, malloc_trim=trimmed))
    monkeypatch.setenv(name, value)
    assert keep_freed_memory() is not stays
    assert [call.args for call in told.call_args_list] == ([] if stays else [(-4, 0), (-1, -1)])
    give_back_freed_memory()
    assert trimmed.called is not stays


def test_memory_goes_back_with_the_last_who_wants_it_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = Mock()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *_: 1, malloc_trim=trimmed))
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    keep_freed_memory()
    with freed_memory_kept("cpu"), freed_memory_kept("cpu"):
        pass
    assert not trimmed.called
    give_back_freed_memory()
    assert trimmed.call_count == 1


def test_on_a_gpu_malloc_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Mock(return_value=1)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=told))
    with freed_memory_kept("cuda"):
        pass
    assert not told.called
