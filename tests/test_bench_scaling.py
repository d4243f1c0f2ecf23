"""The benchmarks of many processes: bytes that are not the plan's are said, and rows are whole."""

from __future__ import annotations

import json
import socket
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from bench import published, scaling
from bench.scaling import COLUMNS, ScalingArgs, disagreement, planned, row
from bench.scaling_rank import Setting
from fastmoco.errors import UserError

SMALL: dict[str, Any] = {"size": 32, "batch_size": 4, "rounds": 2, "recipe": "histology-mse-small"}


def test_bytes_that_are_not_the_plans_are_said() -> None:
    setting = Setting(**SMALL)
    expected = planned(setting, 2)
    assert expected["gradients"] > 40e6 and expected["shuffle"] == 3 * 32 * 32 * 2
    assert disagreement(setting, 2, dict(expected)) == ""
    assert "gradients" in disagreement(setting, 2, dict(expected) | {"gradients": 1.01 * expected["gradients"]})
    assert "norms: 100 counted, 0 planned" in disagreement(setting, 2, dict(expected) | {"norms": 100.0})
    assert "keys" in disagreement(setting, 2, {kind: n for kind, n in expected.items() if kind != "keys"})


def test_times_are_the_slowest_ranks_and_processor_times_all() -> None:
    # Two ranks, three rounds, shared and alone.
    seconds = [[[3.0, 1.0], [3.0, 2.0], [5.0, 1.0]], [[4.0, 2.0], [2.0, 1.0], [1.0, 1.0]]]
    found = {"seconds": seconds, "cpu_seconds": seconds, "sent": {"gradients": 2e6, "keys": 1e6}}
    one = row(Setting(**SMALL), 2, found)
    assert (one["shared_p50_ms"], one["alone_p50_ms"], one["outside_ms"]) == (4000.0, 2000.0, 2000.0)
    assert (one["shared_cpu_ms"], one["alone_cpu_ms"]) == (6000.0, 3000.0)
    assert (one["gradients_mb"], one["norms_mb"], one["sent_mb"]) == (2.0, 0.0, 3.0)
    assert set(COLUMNS) <= one.keys()


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(UserError, match="--batch-size 4 cannot be shared out evenly to 3 ranks"):
        scaling.main(ScalingArgs(**SMALL, ranks=(3,)))


def test_a_port_is_asked_for_where_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, int]] = []

    def note(main: object, args: tuple[int, int, Setting, Path], **rest: object) -> None:
        started.append(args[:2])
        args[3].write_text("{}")

    monkeypatch.setattr(scaling, "start_processes", note)
    for world in (1, 2):
        assert scaling.run(Setting(**SMALL), world) == {}
    assert started[0] == (1, 0) and started[1][0] == 2
    # It is free again.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", started[1][1]))


@pytest.mark.system
def test_every_row_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scaling.md"
    assert scaling.main(ScalingArgs(**SMALL, ranks=(1, 2), out=out)) == 0
    one, two = json.loads(out.with_suffix(".json").read_text())
    assert {field.name for field in fields(Setting)} <= one.keys()
    for found in (one, two):
        assert 0 < found["shared_p20_ms"] <= found["shared_p50_ms"] <= found["shared_p80_ms"]
        assert found["alone_p50_ms"] > 0 and found["shared_cpu_ms"] > 0
    assert one["sent_mb"] == 0 and two["gradients_mb"] > 40 and two["shuffle_mb"] > 0
    assert "outside_ms" in capsys.readouterr().out


def test_published_runs_are_met_where_they_were_fitted() -> None:
    cluster = published.fitted()
    for nodes, rows, rate in published.PUBLISHED:
        step = published.predicted(replace(cluster, nodes=nodes), rows).step
        # The largest was not fitted: what is written of it in docs/distributed.md is held to here.
        assert rows / step == pytest.approx(rate / (8 * nodes), rel=1e-3 if nodes < 316 else 0.03)
