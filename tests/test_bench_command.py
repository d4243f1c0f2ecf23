"""How benchmarks tell what is wrong with their command line."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from bench.command import start
from fastmoco.errors import UserError


@dataclass
class Args:
    """Count."""

    count: int = 2
    """How many."""


def _main(args: Args) -> int:
    if args.count == 3:
        raise UserError("three is one too many")
    if args.count == 4:
        raise ModuleNotFoundError("No module named 'lightly'")
    if args.count == 5:
        raise KeyboardInterrupt
    return args.count


@pytest.mark.parametrize(
    ("count", "status"),
    [(0, 0), (1, 1), (3, "error: three is one too many"), (4, "error: No module named 'lightly'"), (5, 130)],
)
def test_a_benchmark_ends_with_a_status_or_a_line(
    monkeypatch: pytest.MonkeyPatch, count: int, status: int | str
) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--count", str(count)])
    with pytest.raises(SystemExit) as stop:
        start(_main, Args, "x")
    assert stop.value.code == status


def test_an_unknown_option_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--number", "1"])
    with pytest.raises(SystemExit) as stop:
        start(_main, Args, "x")
    said = capsys.readouterr()
    assert stop.value.code == 2 and "--number" in said.err + said.out and "python -m bench.x" in said.err + said.out
