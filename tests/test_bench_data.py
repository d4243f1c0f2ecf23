"""The benchmark of loading: what it counts, that it refuses what disagrees, and that its rows are whole."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import data, e2e
from bench.data import DataArgs, agreement, deviations
from bench.floors import FLOORS
from bench.loaders import BASELINE, LOADERS, OURS
from bench.photographs import draw_photographs
from bench.process import cpu_seconds, peak_bytes, restart_peak
from bench.turns import Contestant, Missing, Turn, summary, take_turn
from fastmoco.errors import UserError


def test_photographs_are_the_same_and_compress_as_photographs_do(tmp_path: Path) -> None:
    mean = draw_photographs(tmp_path / "a", 3, 512)
    assert 60_000 <= mean <= 100_000
    draw_photographs(tmp_path / "b", 3, 512)
    files = [sorted((tmp_path / name).iterdir()) for name in "ab"]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert len({path.read_bytes() for path in files[0]}) == 3


def test_photographs_that_are_there_are_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mean = draw_photographs(tmp_path / "there", 2, 512)
    monkeypatch.setattr(data, "draw_photographs", lambda *args: pytest.fail("drawn again"))
    # What else lies there is no image.
    (tmp_path / "there" / "notes.txt").write_bytes(bytes(10**6))
    (tmp_path / "there" / "more").mkdir()
    name, manifest = next(data.sets(DataArgs(generated=tmp_path / "there"), tmp_path))
    assert name == f"generated 512 px, {mean / 1000:.0f} kB" and len(manifest) == 2


def test_generated_images_are_there_and_the_only_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It is set for the process, to a folder that is gone by then.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for absent in (DataArgs(generated=tmp_path / "absent"), e2e.E2eArgs(generated=tmp_path / "absent")):
        with pytest.raises(UserError, match=r"--generated .*absent: no such folder"):
            data.main(absent) if isinstance(absent, DataArgs) else e2e.main(absent)
    with pytest.raises(UserError, match="--generated: the images of --quick"):
        data.main(DataArgs(generated=tmp_path, quick=True))
    with pytest.raises(UserError, match="--generated: --quick"):
        e2e.main(e2e.E2eArgs(generated=tmp_path, quick=True))
    with pytest.raises(UserError, match="--generated: --data"):
        e2e.main(e2e.E2eArgs(generated=tmp_path, data=tmp_path))


def busy(seconds: float, started: Any, ended: Any) -> None:
    kept = np.ones(40 << 20, dtype=np.uint8)
    began = time.process_time()
    while time.process_time() < began + seconds:
        kept.sum()
    started.set()
    ended.wait()


def test_the_work_and_memory_of_children_count() -> None:
    context = multiprocessing.get_context("spawn")
    started, ended = context.Event(), context.Event()
    restart_peak()
    cpu, memory = cpu_seconds(), peak_bytes()
    child = context.Process(target=busy, args=(0.4, started, ended))
    child.start()
    started.wait()
    alive = cpu_seconds() - cpu
    assert alive >= 0.39 and peak_bytes() - memory >= 40 << 20
    ended.set()
    child.join()
    assert cpu_seconds() - cpu >= alive - 0.02, "what it used is not forgotten when it ends"


def test_a_turn_counts_what_comes_in_its_time() -> None:
    closed = []

    @contextmanager
    def opened() -> Iterator[Iterator[int]]:
        def items() -> Iterator[int]:
            time.sleep(0.05)
            while True:
                time.sleep(0.01)
                yield 4

        yield items()
        closed.append(True)

    turn = take_turn(opened(), lambda item: item, seconds=0.1, burst=2)
    assert closed == [True]
    assert turn.pairs % 8 == 0 and 0.1 <= turn.seconds < 0.1 + 2 * 0.1
    assert turn.first >= 0.05 and turn.waited >= 0.9 * turn.pairs / 4 * 0.01
    # The first burst, and the opening with it, is outside the time.
    assert turn.pairs / 4 <= turn.seconds / 0.01 and turn.cpu < turn.seconds and turn.peak > 1 << 20


def test_what_is_kept_ready_is_filled_before_the_time_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    used = []

    def use(item: int) -> int:
        used.append(item)
        now[0] += 1.0
        return 1

    turn = take_turn(nullcontext(iter(range(100))), use, seconds=7.0, burst=3, untimed=4.0)
    # In whole bursts: the first item and at least four seconds, then at least seven.
    assert len(used) - turn.pairs == 6 and turn.pairs == 9 and turn.seconds == 9.0


def test_medians_and_cold_starts() -> None:
    turns = [Turn(10, 1.0, 0.5, 2.0, first, 3 << 20) for first in (9.0, 1.0, 2.0)]
    figures = summary([*turns, Turn(30, 1.0, 0.5, 2.0, 3.0, 5 << 20)])
    assert figures["pairs_per_s"] == 10 and figures["fast_pairs_per_s"] > 10
    assert figures["cpu_ms_per_pair"] == 200 and figures["peak_mb"] == 5 and figures["waiting"] == 0.5
    assert figures["first_s"] == 9 and figures["again_s"] == 2


class Pupil:
    def __init__(self, ready: bool) -> None:
        if not ready:
            raise Missing("it is not installed")

    def double(self, x: int) -> int:
        return 2 * x


def test_contestants_live_elsewhere_and_tell_what_went_wrong() -> None:
    with Contestant(Pupil, True) as pupil:
        assert pupil.ask("double", 21) == 42
        with pytest.raises(RuntimeError, match=r"Traceback(.|\n)*TypeError"):
            pupil.ask("double", None)
        assert pupil.ask("double", 4) == 8
    with pytest.raises(Missing, match="it is not installed"):
        Contestant(Pupil, False)


class Spender:
    def peaks(self) -> tuple[int, int, int]:
        """At first, after 80 MiB were there for a moment, and when it is to be forgotten."""
        restart_peak()
        before = peak_bytes()
        kept = np.ones(80 << 20, dtype=np.uint8)
        del kept
        after = peak_bytes()
        restart_peak()
        return before, after, peak_bytes()


def test_the_peak_outlasts_what_was_freed() -> None:
    with Contestant(Spender) as spender:
        before, after, forgotten = spender.ask("peaks")
    assert after - before >= 79 << 20 and abs(forgotten - before) <= 2 << 20


class Parent:
    """A process with a child that holds 30 MiB."""

    def __init__(self) -> None:
        self.started, self.ended = multiprocessing.Event(), multiprocessing.Event()
        self.child = multiprocessing.Process(target=held, args=(self.started, self.ended), daemon=True)
        self.child.start()
        self.started.wait()

    def peak(self) -> int:
        restart_peak()
        return peak_bytes()

    def end(self) -> None:
        self.ended.set()
        self.child.join()


def held(started: Any, ended: Any) -> None:
    kept = np.ones(30 << 20, dtype=np.uint8)
    started.set()
    ended.wait()
    del kept


def test_an_idle_process_beside_changes_no_peak() -> None:
    with Contestant(Parent) as parent:
        alone = parent.ask("peak")
        with Contestant(Pupil, True):
            beside = parent.ask("peak")
        parent.ask("end")
        childless = parent.ask("peak")
    assert abs(beside - alone) <= 1 << 20
    # The child's own, and not the libraries that it has from its parent.
    assert 30 << 20 <= alone - childless < 60 << 20


DEFINED = np.zeros((2, 2))


class Answers:
    """A loader whose views have these statistics, and lie so far from the definition."""

    def __init__(self, statistics: np.ndarray, apart: float) -> None:
        self.answers = {"statistics": statistics, "apart": apart}

    def ask(self, method: str, *args: object) -> Any:
        if method == "apart":
            assert args[1] is DEFINED
        return self.answers[method]


def test_what_loads_other_views_disagrees() -> None:
    rng = np.random.default_rng(0)
    right = [rng.normal(0.4, 0.1, (400, 6)) for _ in LOADERS]
    said: list[str] = []
    loaders = {name: Answers(values, 0.01) for name, values in zip(LOADERS, right, strict=True)}
    assert all(agreement(loaders, DEFINED, 200, said.append).values()) and len(said) == len(LOADERS) - 1 + len(OURS)
    loaders["lightly"] = Answers(right[0] + np.array([0, 0, 0, 0, 0.05, 0]), 0.01)
    loaders[OURS[1]] = Answers(right[1], 1.5)
    assert {name for name, agrees in agreement(loaders, DEFINED, 200, said.append).items() if not agrees} == {
        "lightly",
        OURS[1],
    }
    assert sum("PARITY FAILS" in line for line in said) == 2
    assert deviations(np.full((9, 6), np.nan), right[0]) == np.inf


@pytest.mark.system
def test_every_row_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data.md"
    assert data.main(DataArgs(quick=True, workers=1, out=out)) == 0
    shown = capsys.readouterr().out
    rows = json.loads(out.with_suffix(".json").read_text())
    assert [row["implementation"] for row in rows] == [*LOADERS, *FLOORS]
    for row in rows:
        if f"{row['implementation']}: left out" in shown:
            assert "pairs_per_s" not in row
            continue
        assert 0 < row["slow_pairs_per_s"] <= row["pairs_per_s"] <= row["fast_pairs_per_s"]
        assert row["cpu_ms_per_pair"] > 0 and row["peak_mb"] > 10 and row["first_s"] > 0 and row["turns"] == 2
        assert row["parity"] == (None if row["implementation"] in FLOORS else "agrees")
        assert len(row["every_turn"]) == 2 and row["ratio"] > 0
    assert next(row for row in rows if row["implementation"] == BASELINE)["ratio"] == 1
    assert shown.index("standard errors") < shown.index("pairs/s"), "parity comes before speed"
    assert all(row["implementation"] in out.read_text() for row in rows)
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")


def test_so_many_sets_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def note(name: str, *rest: object) -> list[dict[str, Any]]:
        measured.append(name)
        return []

    monkeypatch.setattr(data, "measure", note)
    # It is set for the process, to a folder that is gone by then.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    draw_photographs(tmp_path / "images", 3, 40)
    for sets, expected in ((1, ["generated 128"]), (None, ["generated 128", "images, 40"])):
        measured.clear()
        assert data.main(data.DataArgs(quick=True, images=(tmp_path / "images",), sets=sets)) == 0
        assert [name[: len(start)] for name, start in zip(measured, expected, strict=True)] == expected
