"""Memory that tensors free stays the process's where that is asked for, and the environment has the last word."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from fastmoco.allocator import keep_freed_memory

# How many pages the kernel has to clear for tensors of 80 MB used twenty times, before and after. In between the heap
# grows: to align a tensor glibc looks for some bytes more than one has left.
PROGRAM = """
import resource, torch
from fastmoco.allocator import keep_freed_memory
torch.set_num_threads(1)
def cleared(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        a, b = torch.ones(20_000_000), torch.zeros(20_000_000)
        assert float(a[-1] + b[-1]) == 1
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
cleared(1)
anew = cleared(20)
assert keep_freed_memory()
cleared(10)
print(anew, cleared(20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again_without_the_kernel() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=clean, capture_output=True, text=True, check=True)
    anew, kept = map(int, done.stdout.split())
    assert anew > 10_000 and kept < anew / 20


@pytest.mark.parametrize("name", ["MALLOC_MMAP_MAX_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()
