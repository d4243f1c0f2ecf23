"""JSON messages, one a line, over TCP, where nothing ever waits for the other side."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import weakref
from typing import Any

# More than this unsent or unfinished is no heartbeat: the other side does not read, or is none of ours.
_LIMIT = 1 << 16

_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_all() -> None:
    for connection in list(_open):
        connection.close()


# A loader's worker that outlives its process would keep the connection open, and its end unseen.
os.register_at_fork(after_in_child=_close_all)


class Closed(Exception):
    """The other side closed the connection."""


class Line:
    """One connection. The system drops it by itself once the other side's machine is silent for `patience` seconds.

    That is the machine, which acknowledges what is sent also while the process there is busy or stopped.
    """

    def __init__(self, connection: socket.socket, patience: float) -> None:
        self.connection = connection
        self._unsent = b""
        self._unread = b""
        _open.add(connection)
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(patience * 1000))

    def fileno(self) -> int:
        """For select."""
        return self.connection.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send `message`, or what the system takes of it now. Raises OSError where the connection is lost."""
        if len(self._unsent) < _LIMIT:
            self._unsent += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(BlockingIOError):
            self._unsent = self._unsent[self.connection.send(self._unsent) :]

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come. Raises Closed, or OSError where the connection is lost, once none is left."""
        try:
            found = self.connection.recv(_LIMIT)
        except BlockingIOError:
            return []
        if not found:
            raise Closed
        *lines, self._unread = (self._unread + found).split(b"\n")
        if len(self._unread) > _LIMIT:
            raise OSError("more than a message came")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise OSError("something else than messages came") from error

    def end(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
