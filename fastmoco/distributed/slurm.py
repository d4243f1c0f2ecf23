"""What SLURM tells the processes of a job step through their environment."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from itertools import product

from fastmoco.errors import UserError

# Below the ports that Linux hands out by itself (from 32768), so that none of those is in the way.
_FIRST_PORT, _PORTS = 15_000, 15_000
_LOOKUP_SECONDS = 20


def expand_hosts(text: str) -> list[str]:
    """The names in a SLURM host list: "gpu[01-03,7],login1" is gpu01, gpu02, gpu03, gpu7 and login1.

    Raises UserError where `text` is no such list.
    """
    names: list[str] = []
    # Commas in brackets separate numbers, the others hosts.
    for part in re.split(r",(?![^\[]*\])", text):
        literal, *rest = re.split(r"\[([^\[\]]+)\]", part)
        if not part or re.search(r"[\[\]\s]", literal + "".join(rest[1::2])):
            raise UserError(f"the host list {text!r} cannot be read: expected one such as gpu[01-03,7],login1")
        choices = [[literal]]
        for numbers, after in zip(rest[::2], rest[1::2], strict=True):
            choices.append([number + after for number in _numbers(numbers, text)])
        names += ["".join(words) for words in product(*choices)]
    return names


def _numbers(ranges: str, text: str) -> list[str]:
    found: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise UserError(f"the host list {text!r} cannot be read: {part!r} is no number or range of numbers")
        first, last = match[1], match[2] or match[1]
        found += [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return found


def expand_counts(text: str) -> list[int]:
    """The tasks on each node of a step: "2(x3),1" is 2, 2, 2, 1. Raises UserError where `text` is no such list."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text} cannot be read: expected counts such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def rendezvous_address(environ: Mapping[str, str]) -> str:
    """A name or number of the host of rank 0, the first node of this step. Raises UserError where it is not known."""
    listed = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST")
    if not listed:
        raise UserError("started by srun, but SLURM_STEP_NODELIST is not set: set MASTER_ADDR to the host of rank 0")
    first = expand_hosts(listed)[0]
    try:
        socket.getaddrinfo(first, None)
        return first
    except OSError:
        pass
    # A node's name in SLURM need not be one that the network knows.
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", first))
    if found is None:
        raise UserError(
            f"the first node of this job step, {first}, has no address that can be looked up here: "
            "set MASTER_ADDR to a name or number under which every node reaches it"
        )
    return found[1]


def _scontrol(*words: str) -> str:
    """What scontrol prints, or "" where it is not there or fails, as inside most containers."""
    if shutil.which("scontrol") is None:
        return ""
    try:
        command = ["scontrol", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LOOKUP_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def rendezvous_port(environ: Mapping[str, str]) -> int:
    """A port that all processes of this step agree on, and that other jobs and steps on its nodes rarely have."""
    number = integer(environ, "SLURM_JOB_ID", 0) + 7919 * integer(environ, "SLURM_STEP_ID", 0)
    return _FIRST_PORT + number % _PORTS


def tasks_on_node(environ: Mapping[str, str]) -> int:
    """How many processes of this step run on this node; 1 where SLURM does not say."""
    counts = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = integer(environ, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 1


def integer(environ: Mapping[str, str], name: str, default: int) -> int:
    """The variable `name` as a number, or `default` where it is not set. Raises UserError where it is none."""
    value = environ.get(name, "")
    if not value:
        return default
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{name}={value} in the environment is not a whole number") from error
