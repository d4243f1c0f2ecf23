"""Hosts with addresses of their own on this machine: network namespaces on a bridge, whose interfaces count."""

from __future__ import annotations

import array
import ctypes
import fcntl
import itertools
import os
import socket
import struct
import subprocess
from pathlib import Path
from types import TracebackType

import pytest

INTERFACE = "eth0"
_CLONE_NEWNET = 0x40000000
_SIOCETHTOOL = 0x8946
# Large packets that a network card would cut are counted whole, without the headers they will have: ETHTOOL_STSO, SGSO
# and SGRO put an end to that.
_OFFLOADS = (0x1F, 0x24, 0x2C)
_numbers = itertools.count()


class Bridge:
    """`hosts` network namespaces, each with the interface "eth0" on one bridge and the address `addresses[i]`.

    A context manager; where namespaces cannot be made the test is skipped, under CI that is a failure.
    """

    def __init__(self, hosts: int) -> None:
        self._prefix = f"fm{os.getpid()}b{next(_numbers)}"
        self.switch = f"{self._prefix}s"
        self.namespaces = [f"{self._prefix}h{i}" for i in range(hosts)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(hosts)]

    def __enter__(self) -> Bridge:
        try:
            self._make()
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__(None, None, None)
            said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
            reason = f"network namespaces cannot be made here (they take root, and ip of iproute2): {said}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        return self

    def _make(self) -> None:
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        for i, (name, address) in enumerate(zip(self.namespaces, self.addresses, strict=True)):
            _ip("netns", "add", name)
            ends = ("link", "add", INTERFACE, "type", "veth", "peer", "name", f"port{i}", "netns", self.switch)
            _ip("-n", name, *ends)
            _ip("-n", self.switch, "link", "set", f"port{i}", "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", device, "up")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in (*self.namespaces, self.switch):
            if Path("/run/netns", name).exists():
                _ip("netns", "delete", name)


    def command(self, host: int, *args: str) -> list[str]:
        """The command that runs `args` on a host, which is named as its namespace."""
        name = self.namespaces[host]
        inside = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name, *args)
        return ["ip", "netns", "exec", name, *inside]

    def take_down(self, host: int) -> None:
        """Take the host's interface down, which it sees."""
        _ip("-n", self.namespaces[host], "link", "set", INTERFACE, "down")

    def unplug(self, host: int) -> None:
        """Take the host off the bridge, which nobody sees: what is sent is lost without a word."""
        _ip("-n", self.switch, "link", "set", f"port{host}", "nomaster")

    def restore(self, host: int) -> None:
        """Undo both."""
        _ip("-n", self.namespaces[host], "link", "set", INTERFACE, "up")
        _ip("-n", self.switch, "link", "set", f"port{host}", "master", "bridge")


def enter(namespace: str) -> None:
    """Move this thread, and those that it will start, to `namespace`, where packets are no larger than the MTU."""
    descriptor = os.open(Path("/run/netns", namespace), os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    finally:
        os.close(descriptor)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command in _OFFLOADS:
            value = array.array("B", struct.pack("II", command, 0))
            fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("16sP", INTERFACE.encode(), value.buffer_info()[0]))


def counted() -> tuple[int, int]:
    """Bytes that this host's interface has sent, and received, headers of every packet included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            fields = counters.split()
            return int(fields[8]), int(fields[0])
    raise AssertionError(f"no {INTERFACE} here")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
