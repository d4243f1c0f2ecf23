"""How far long work is said to be."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastmoco import tracking
from fastmoco.tracking import Lines, track


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [50.0]
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_pipe_gets_lines_ten_seconds_apart(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track([*range(8)], "looking"):
        now[0] += 4
    assert capsys.readouterr().out == "looking: 3 of 8, ETA 0:00:20\nlooking: 6 of 8, ETA 0:00:08\n"


def test_parts_are_told_by_their_images(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(range(0, 100, 64), "decoding", each=64, images=100):
        now[0] += 10
    assert capsys.readouterr().out == "decoding: 64 of 100, ETA 0:00:10\ndecoding: 100 of 100, ETA 0:00:00\n"


def test_short_work_and_work_that_nobody_watches_say_nothing(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(track(iter("abc"), "looking", total=3)) == ["a", "b", "c"]
    for _ in track([*range(8)], "looking", progress=False):
        now[0] += 100
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar_and_no_lines(
    now: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    found = []
    for item in track([1, 2], "looking"):
        found.append(item)
        now[0] += 100
    shown = capsys.readouterr().out
    assert found == [1, 2] and "looking" in shown and " of 2, ETA" not in shown
    console = Console(file=io.StringIO(), force_terminal=True)
    lines = Lines(console, 2)
    now[0] += 1000
    lines.say("a line")
    assert isinstance(console.file, io.StringIO) and console.file.getvalue() == ""
