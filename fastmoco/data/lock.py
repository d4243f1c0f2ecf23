"""One process at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Network file systems may be mounted without locks.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def alone(folder: Path, doing: str, *, required: bool = True) -> Iterator[None]:
    """Hold the lock of `folder`, its file .lock, waiting for another process that holds it and is `doing` something.

    The kernel lets go of it when its owner ends, however it ends: no lock of a dead process is left to be broken.
    Where the file system has no locks, OSError is raised, or a warning printed if it is not `required`.
    """
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which is {doing} {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if required or error.errno not in _UNSUPPORTED:
                raise
            print(f"warning: {folder} has no locks; see that no other process is {doing} it")
        yield
