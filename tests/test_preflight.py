"""`fastmoco doctor --distributed`: what it measures between processes, and what it says of it."""

from __future__ import annotations

import contextlib
import errno
import io
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastmoco import cli
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.preflight.command import preflight_in, show
from fastmoco.preflight.disk import measure_disk, unseen
from fastmoco.preflight.findings import judge
from fastmoco.preflight.links import clock_offsets, pair_bandwidths, rounds, whole_bandwidth
from worlds import in_world

SHARED = {"write": 1e9, "read": 2e9, "sync": 0.001, "problem": ""}


def report(node: int, **changes: Any) -> dict[str, Any]:
    """What the one process of `node` found, all being well."""
    well = {
        "node": node, "fastmoco": "0.1.0", "torch": "2.14.1", "device": "cuda: H100", "clock": 0.001, "met": 0.5,
        "pairs": [[0, 1, 10e9], [0, 2, 11e9], [1, 2, 12e9]], "decision": 0.0005, "whole": 20e9,
        "local": SHARED, "shared": SHARED, "unseen": [],
    }  # fmt: skip
    return well | changes


def judged(**changes: Any) -> tuple[str, str]:
    """Problems and remarks of three nodes, the second of which differs by `changes`."""
    found = judge(["n0", "n1", "n2"], [report(0), report(1, **changes), report(2)])
    return "\n".join(found.problems), "\n".join(found.remarks)


def test_where_all_is_well_nothing_is_said() -> None:
    assert judged() == ("", "")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"torch": "2.13"}, "processes differ in their torch: 2.14.1 (rank 0 on n0 and 1 more), 2.13 (rank 1 on n1"),
        ({"device": "cpu"}, "processes differ in their device: "),
        ({"clock": -400.0}, "the clock of n1 is 400.0 s behind that of rank 0's node"),
        ({"unseen": [0, 2]}, "n1 does not see what n0, n2 wrote in --out"),
        ({"shared": SHARED | {"problem": "/x: Read-only"}}, "n1 cannot write to its shared folder: /x: Read-only"),
        ({"local": SHARED | {"problem": "/tmp: No space left"}}, "n1 cannot write to its local folder: /tmp: No space"),
    ],
)
def test_what_would_stop_training(changes: dict[str, Any], sentence: str) -> None:
    problems, remarks = judged(**changes)
    assert sentence in problems and not remarks


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clock": 2.0}, "the clock of n1 is 2.0 s ahead of that of rank 0's node"),
        ({"device": "cuda: A100"}, "processes differ in their device: "),
        ({"pairs": [[0, 1, 1e9], [1, 2, 12e9]]}, "n0 and n1 send each other 1.00 GB/s, where the middle pair has 11"),
        ({"decision": 0.05}, "agreeing on a number, which every step does, takes 50 ms"),
        ({"shared": SHARED | {"write": 2e6}}, "n1 writes to --out with 2.0 MB/s"),
    ],
)
def test_what_is_to_be_mended(changes: dict[str, Any], sentence: str) -> None:
    problems, remarks = judged(**changes)
    assert sentence in remarks and not problems


def test_without_a_shared_folder_the_table_says_so() -> None:
    found = judge(["n0", "n1"], [report(0, shared=None, pairs=[]), report(1, shared=None, pairs=[])])
    text = io.StringIO()
    show(found, None, Console(file=text, width=120))
    assert "name the one for the run folders with --out" in text.getvalue()
    assert "2 processes on 2 nodes can train together" in text.getvalue()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_every_pair_meets_once_and_no_node_twice_a_round(count: int) -> None:
    found = rounds(count)
    assert sorted(pair for pairs in found for pair in pairs) == list(combinations(range(count), 2))
    for pairs in found:
        partners = [node for pair in pairs for node in pair]
        assert len(set(partners)) == len(partners)


def test_disks(tmp_path: Path) -> None:
    speed = measure_disk(tmp_path, 8 * 2**20)
    assert not speed.problem and speed.write > 1e5 and speed.read > 1e5 and 0 < speed.sync < 60
    assert not list(tmp_path.iterdir())
    assert measure_disk(tmp_path / "nowhere", 1).problem == f"{tmp_path / 'nowhere'}: No such file or directory"


def _links(world: World) -> dict[str, Any]:
    # Ranks 0 and 1 are the first node's.
    speakers = [0, 2, 3]
    return {
        "pairs": pair_bandwidths(world, speakers, 2**16),
        "clock": clock_offsets(world, speakers),
        "whole": whole_bandwidth(world, 2**16),
    }


def test_links_between_nodes_of_several_processes() -> None:
    found = in_world(4, _links)
    assert [sorted(one["pairs"]) for one in found] == [[(0, 1), (0, 2)], [], [(0, 1), (1, 2)], [(0, 2), (1, 2)]]
    assert all(speed > 0 for one in found for speed in (one["whole"], *one["pairs"].values()))
    assert [sorted(one["clock"]) for one in found] == [[0], [], [1], [2]]
    # One machine, one clock.
    assert all(abs(offset) < 0.5 for one in found for offset in one["clock"].values())


def _unseen(world: World, folders: list[Path]) -> list[int]:
    return unseen(world, folders[world.rank], speaks=world.rank != 1, patience=0.3)


def test_folders_that_are_not_the_same(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    assert in_world(3, _unseen, [one, one, one]) == [[], [], []]
    assert in_world(3, _unseen, [one, one, other]) == [[2], [2], [0]]
    assert in_world(3, _unseen, [one, one, tmp_path / "nowhere"])[2] == [0, 2]
    assert not list(one.iterdir()) and not list(other.iterdir())


def test_a_folder_that_was_made_read_only_is_one_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, *args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    # So such a mount answers to both, also where there is nothing to remove.
    for name in ("open", "write_text", "unlink"):
        monkeypatch.setattr(Path, name, refused)
    monkeypatch.setattr("fastmoco.preflight.disk.texts", lambda world, text: [text])
    assert measure_disk(tmp_path, 1).problem == f"{tmp_path}: Read-only file system"
    assert unseen(World(), tmp_path, speaks=True, patience=0.1) == [0]


def _preflights(world: World, outs: list[Path]) -> list[tuple[int, str]]:
    """The status and what is printed, for each of `outs`."""
    found = []
    for out in outs:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            status = preflight_in(world, out, met=0.1, node=f"n{world.rank}")
        found.append((status, said.getvalue()))
    return found


@pytest.mark.system
def test_the_whole_of_it(tmp_path: Path) -> None:
    ((well, table), (ill, other)), others = in_world(2, _preflights, [tmp_path, tmp_path / "nowhere"])
    assert well == 0 and "n0, n1" in table and "2 processes on 2 nodes can train together" in table
    assert ill == 1 and f"would stop training: n1 cannot write to its shared folder: {tmp_path}/nowhere" in other
    # Rank 0 speaks for all.
    assert others == [(0, ""), (0, "")]


def test_mistakes() -> None:
    with pytest.raises(UserError, match="start it as the training, with srun"):
        cli.dispatch(["doctor", "--distributed"])
    with pytest.raises(UserError, match="give both"):
        cli.dispatch(["doctor", "--out", "x"])
