"""What is heard on the port that processes report to, and by whom it is believed."""

from __future__ import annotations

import socket
import time

from fastmoco.distributed.beats import Hub
from fastmoco.distributed.roll import Pulse, Roll


def test_strangers_are_not_taken_for_ranks() -> None:
    roll = Roll(2, 60.0, 1.0, 3.0, time.monotonic())
    hub = Hub(lambda: Pulse(0), roll, token=5, clock=time.monotonic)
    wrong = (b'{"token": 4, "rank": 1}\n', b'{"token": 5, "rank": 7}\n', b'{"token": 5, "step": 1}\n')
    for said in (b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b"x" * 99999, *wrong):
        with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
            stranger.sendall(said)
            stranger.settimeout(5)
            for _ in range(20):
                assert hub.turn(0.02) is None
    assert not roll.known[1].spoke
    hub.part(0.1)
