"""Two pieces of work at once on a CPU, each with half of the threads."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

Here = TypeVar("Here")
There = TypeVar("There")

_NAME = "together"


def together(here: Callable[[], Here], there: Callable[[], There]) -> tuple[Here, There]:
    """What `here` and `there`, which have nothing to do with each other, return. Raises what either does, first `here`.

    Threads that share one operation wait for each other at its end, dozens of times in a forward: small operations have
    little to share out, and one thread that loses its core to a loader holds up all. So `there` runs in a thread of its
    own, in the autocast and gradient mode of this one, and each of the two has half of its threads. Where there is but
    one thread, or the number cannot be set, they run one after the other, and so they do within a `there`.
    """
    threads = torch.get_num_threads()
    if threads < 2 or _openmp() is None or threading.current_thread().name.startswith(_NAME):
        return here(), there()
    autocast = torch.autocast(
        "cpu",
        dtype=torch.get_autocast_dtype("cpu"),
        enabled=torch.is_autocast_enabled("cpu"),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
    gradients = torch.is_grad_enabled()

    def run() -> There:
        _use_threads(threads // 2)
        with torch.set_grad_enabled(gradients), autocast:
            return there()

    running = _helper().submit(run)
    products = _use_threads(threads - threads // 2)
    try:
        mine = here()
    finally:
        _use_threads(threads, products)
        # Also where `here` failed: nothing goes on behind the back of what handles that.
        wait([running])
    return mine, running.result()


@cache
def _helper() -> ThreadPoolExecutor:
    """The thread that is always the same: oneDNN keeps what it has prepared for the shapes it meets by the thread."""
    # Weights that autocast has rounded are kept for the whole process, and dropped by each thread that leaves its
    # outermost autocast. This one never does: what the other still goes through would be rounded again or not, and
    # gradients summed otherwise, by which of the two is first.
    return ThreadPoolExecutor(1, thread_name_prefix=_NAME, initializer=torch.autocast_increment_nesting)


# Of a process that is forked there is but the thread that forked.
os.register_at_fork(after_in_child=_helper.cache_clear)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library by which torch's operations start their threads; None where it is not GNU's, or not found.

    `torch.set_num_threads` will not do: it counts for all threads in part, and drops what oneDNN has prepared.
    """
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
        before = torch.get_num_threads()
        library.omp_set_num_threads(before + 1)
        followed = torch.get_num_threads() == before + 1
        library.omp_set_num_threads(before)
    except (OSError, AttributeError):
        return None
    return library if followed else None


@cache
def _mkl() -> Callable[[int], int] | None:
    """Sets the number of threads that MKL's products, which this thread calls, share (0: as in the whole process) and
    returns the one before; None where torch has no MKL.

    It has a number of its own. Threads that it started for `there` would be more than there are cores, and OpenMP's
    then wait asleep rather than at work: waking them takes longer than many an operation.
    """
    try:
        found: Callable[[int], int] = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
    return found


def _use_threads(count: int, products: int | None = None) -> int:
    """Have the operations that this thread calls share their work among `count` threads, and MKL's products among
    `products`, where that is another number. Returns how many MKL's were given before: 0 where nobody had said."""
    library = _openmp()
    assert library is not None
    # The first that a thread asks of torch gives it the number of the process.
    torch.get_num_threads()
    library.omp_set_num_threads(count)
    mkl = _mkl()
    return 0 if mkl is None else mkl(count if products is None else products)
