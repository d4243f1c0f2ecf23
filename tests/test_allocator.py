"""Memory that tensors free stays the process's where that is asked for, and the environment has the last word."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Frees tensors of 80 MB twenty times, and counts the pages that the kernel had to clear. Before that the heap grows: to
# align a tensor glibc looks for some bytes more than one has left.
PROGRAM = """
import resource, sys, torch
from fastmoco.allocator import keep_freed_memory
torch.set_num_threads(1)
said = keep_freed_memory() if sys.argv[1] == "kept" else None
def use():
    a, b = torch.ones(20_000_000), torch.zeros(20_000_000)
    return float(a[-1] + b[-1])
for _ in range(10):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    assert use() == 1
print(said, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env=clean | environment, capture_output=True, text=True, check=True
    )
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again_without_the_kernel() -> None:
    (_, anew), (said, kept) = faults("as it is"), faults("kept")
    assert said == "True" and anew > 10_000
    assert kept < anew / 20


def test_what_the_environment_says_stays() -> None:
    assert faults("kept", MALLOC_MMAP_MAX_="65536")[0] == "False"
    assert faults("kept", GLIBC_TUNABLES="glibc.malloc.mmap_max=65536")[0] == "False"
