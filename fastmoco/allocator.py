"""What the C library does with memory that tensors on a CPU have freed."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# How many want it kept now; what is kept goes back with the last.
_holders = 0
# By which a user says otherwise.
_CHOICES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Have this process keep what it frees for what it asks for next; whether the C library was told so.

    By default glibc takes every tensor of more than 32 MB from the kernel anew and gives it back when it is freed, and
    what lies free at the end of its heap too. The kernel then clears each page once more, a page at a time: a sixth of
    a step of ResNet-50 in float32 on 16 images of 224 pixels, a twentieth of one of ResNet-18 on 32 of 64. The process
    then stays as large as it ever was, in these two runs a seventh larger. It is the first thread's heap that is kept;
    those of other threads, of at most 64 MB, are given back as before.

    Only glibc on Linux is told. Where the environment says when malloc is to give back (MALLOC_MMAP_THRESHOLD_,
    MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_, glibc.malloc in GLIBC_TUNABLES), that is left as it is.
    """
    global _holders
    _holders += 1
    return _tell({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1})


def give_back_freed_memory() -> None:
    """Take back one `keep_freed_memory`; with the last, the C library gives back what this process has freed.

    Its thresholds are then those that glibc's own grow to, the first time that a block of 32 MB is freed.
    """
    global _holders
    _holders -= 1
    if not _holders and _tell({_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def freed_memory_kept(device_type: str) -> Iterator[None]:
    """Within the block freed memory is kept, where it is a CPU that trains."""
    if device_type != "cpu":
        yield
        return
    keep_freed_memory()
    try:
        yield
    finally:
        give_back_freed_memory()


def _tell(options: dict[int, int]) -> bool:
    """Whether glibc was told all of `options`: not where there is none, nor where the environment has the say."""
    if sys.platform != "linux" or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if any(name in os.environ for name in _CHOICES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        # musl has none.
        return False
    return all(bool(mallopt(option, value)) for option, value in options.items())
