"""Two machines with addresses of their own: network namespaces of this one, joined by a bridge in a third."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Host:
    """A network namespace: `name`, its `address`, and its network device `device`."""

    name: str
    address: str
    device: str

    def command(self, *args: str) -> list[str]:
        """The command that runs `args` on this host, under its name."""
        inside = ["sh", "-c", 'hostname "$0" && exec "$@"', self.name, *args]
        return ["ip", "netns", "exec", self.name, "unshare", "--uts", *inside]


class Network:
    """Hosts joined by a switch, which may be cut from it."""

    def __init__(self, switch: str, hosts: list[Host]) -> None:
        self.switch = switch
        self.hosts = hosts

    def take_down(self, host: Host) -> None:
        """Take the host's device down, which it sees."""
        _ip("-n", host.name, "link", "set", host.device, "down")

    def unplug(self, host: Host) -> None:
        """Take the host off the switch, where nobody sees it: what is sent is lost without a word."""
        _ip("-n", self.switch, "link", "set", _port(host), "nomaster")

    def restore(self, host: Host) -> None:
        """Undo both."""
        _ip("-n", host.name, "link", "set", host.device, "up")
        _ip("-n", self.switch, "link", "set", _port(host), "master", "switch")


@contextmanager
def network(count: int) -> Iterator[Network]:
    """`count` hosts, 10.77.0.1 and on, while it is open. Where that is not permitted the test is skipped; under CI that
    is a failure.
    """
    # Names are the whole machine's: those of this process are no other's.
    names = [f"fm{os.getpid()}n{number}" for number in range(count)]
    hosts = [Host(name, f"10.77.0.{number + 1}", "eth0") for number, name in enumerate(names)]
    switch = f"fm{os.getpid()}s"
    try:
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", switch, "link", "set", "switch", "up")
            for host in hosts:
                _add(host, switch)
        except (OSError, subprocess.CalledProcessError) as error:
            said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
            reason = f"no network namespaces can be made here: {said}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        yield Network(switch, hosts)
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _add(host: Host, switch: str) -> None:
    _ip("netns", "add", host.name)
    _ip("-n", switch, "link", "add", _port(host), "type", "veth", "peer", "name", host.device, "netns", host.name)
    _ip("-n", switch, "link", "set", _port(host), "master", "switch", "up")
    _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.device)
    for device in ("lo", host.device):
        _ip("-n", host.name, "link", "set", device, "up")


def _port(host: Host) -> str:
    return f"to{host.address.rpartition('.')[2]}"


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)
