"""What every process found, put together, and what is wrong with it in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

# Seconds between clocks: to be mentioned, and from where SLURM refuses a node's messages (munge's time to live).
SKEW, TOO_MUCH_SKEW = 1.0, 300.0
# A connection this much slower than the middle one is to be mentioned.
SLOW_LINK = 0.4
# Seconds to agree on a number that cost a step something.
SLOW_DECISION = 0.02
# Bytes a second with which a checkpoint of a ResNet-50 (0.4 GB) takes more than a minute.
SLOW_FOLDER = 6e6


@dataclass
class Findings:
    """`nodes`: names by number; `reports`: what each rank found (see command.py); lists of sentences: `problems` would
    stop training, `remarks` would slow it."""

    nodes: list[str]
    reports: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> dict[tuple[int, int], float]:
        """Bytes a second between nodes, by their numbers; of both ends' readings the slower."""
        found: dict[tuple[int, int], float] = {}
        for report in self.reports:
            for first, second, speed in report["pairs"]:
                known = found.get((first, second), speed)
                found[first, second] = min(known, speed)
        return found

    def of_speakers(self) -> list[dict[str, Any]]:
        """The report of each node's first process."""
        first: dict[int, dict[str, Any]] = {}
        for report in self.reports:
            first.setdefault(report["node"], report)
        return [first[node] for node in range(len(self.nodes))]


def judge(nodes: Sequence[str], reports: list[dict[str, Any]]) -> Findings:
    """Put `reports`, by rank, together and say what is wrong."""
    found = Findings(list(nodes), reports)
    for name in ("fastmoco", "torch", "device"):
        _same(found, name)
    _disks(found)
    _clocks(found)
    _links(found)
    return found


def _same(found: Findings, name: str) -> None:
    by_value: dict[str, list[str]] = defaultdict(list)
    for rank, report in enumerate(found.reports):
        by_value[report[name]].append(f"rank {rank} on {found.nodes[report['node']]}")
    if len(by_value) > 1:
        said = ", ".join(f"{value} ({ranks[0]} and {len(ranks) - 1} more)" for value, ranks in by_value.items())
        kind = found.problems if name != "device" or _kinds(by_value) > 1 else found.remarks
        kind.append(f"processes differ in their {name}: {said}")


def _kinds(devices: dict[str, list[str]]) -> int:
    return len({device.partition(":")[0] for device in devices})


def _disks(found: Findings) -> None:
    for report in found.of_speakers():
        node = found.nodes[report["node"]]
        for which in ("local", "shared"):
            speed = report[which]
            if speed is None:
                continue
            if speed["problem"]:
                found.problems.append(f"{node} cannot write to its {which} folder: {speed['problem']}")
            elif which == "shared" and speed["write"] < SLOW_FOLDER:
                found.remarks.append(
                    f"{node} writes to --out with {speed['write'] / 1e6:.1f} MB/s: checkpoints will take long"
                )
    for report in found.of_speakers():
        others = [found.nodes[found.reports[rank]["node"]] for rank in report["unseen"]]
        if others:
            found.problems.append(
                f"{found.nodes[report['node']]} does not see what {', '.join(others)} wrote in --out: it is not the "
                "same folder on all nodes"
            )


def _clocks(found: Findings) -> None:
    for report in found.of_speakers():
        skew = report["clock"]
        if abs(skew) > SKEW:
            kind = found.problems if abs(skew) > TOO_MUCH_SKEW else found.remarks
            ahead = "ahead of" if skew > 0 else "behind"
            node = found.nodes[report["node"]]
            kind.append(f"the clock of {node} is {abs(skew):.1f} s {ahead} that of rank 0's node")


def _links(found: Findings) -> None:
    speeds = found.pairs
    middle = median(speeds.values()) if speeds else 0.0
    for (first, second), speed in sorted(speeds.items(), key=lambda item: item[1]):
        if speed < SLOW_LINK * middle:
            found.remarks.append(
                f"{found.nodes[first]} and {found.nodes[second]} send each other {speed / 1e9:.2f} GB/s, where the "
                f"middle pair has {middle / 1e9:.2f}: training is as fast as the slowest"
            )
    slowest = max(report["decision"] for report in found.reports)
    if slowest > SLOW_DECISION:
        found.remarks.append(f"agreeing on a number, which every step does, takes {slowest * 1e3:.0f} ms")
