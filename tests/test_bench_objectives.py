"""The comparison of objectives: what counts as learned, and what is computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import objectives
from bench.objectives import RANDOM, ObjectivesArgs, main, settings, summary
from fastmoco.errors import UserError


def rows(name: str, scores: list[float], **more: Any) -> list[dict[str, Any]]:
    if name != RANDOM:
        more = {"top1": 0.5, "spread": 0.9} | more
    return [
        {"objective": name, "seed": seed, "kNN": score, "probe": 0.8, "rankme": 10.0} | more
        for seed, score in enumerate(scores)
    ]


def test_an_objective_holds_where_it_gains_twice_the_larger_deviation() -> None:
    random = rows(RANDOM, [0.78, 0.80, 0.82])
    just, short = rows("SimCLR", [0.841, 0.841, 0.841]), rows("MoCo", [0.839, 0.839, 0.839])
    wide = rows("Barlow Twins", [0.80, 0.85, 0.90])
    found = {line["objective"]: line for line in summary(random + just + short + wide)}
    assert found["SimCLR"]["kNN gain"] == pytest.approx(0.041) and found["SimCLR"]["kNN needed"] == pytest.approx(0.04)
    assert found["SimCLR"]["kNN holds"] and not found["MoCo"]["kNN holds"]
    # Its own deviation is the larger one.
    assert found["Barlow Twins"]["kNN needed"] == pytest.approx(0.1) and not found["Barlow Twins"]["kNN holds"]
    # No gain at all, and none asked for: not ahead.
    assert not found["SimCLR"]["probe holds"]


def test_one_seed_has_no_verdict() -> None:
    (_, line) = summary(rows(RANDOM, [0.7, 0.8]) + rows("SimCLR", [0.99]))
    assert line["seeds"] == 1 and "kNN holds" not in line


def test_precisions_that_differ_are_told_in_the_order_of_the_seeds() -> None:
    mixed = rows("SimCLR", [0.8, 0.9])
    mixed[1]["precision"] = "fp32"
    assert summary(rows(RANDOM, [0.7, 0.8]) + mixed[::-1])[1]["precision"] == "bf16, fp32"
    assert summary(rows(RANDOM, [0.7, 0.8]) + rows("SimCLR", [0.8, 0.9]))[1]["precision"] == "bf16"


def test_only_what_is_missing_or_was_of_other_settings_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ObjectivesArgs(
        data=tmp_path, labels=tmp_path / "labels.csv", label="idc", seeds=(0, 1), random_seeds=3,
        only=("SimCLR",), out=tmp_path / "objectives.md",
    )  # fmt: skip
    computed: list[tuple[str, int]] = []

    def compute(args: ObjectivesArgs, name: str, seed: int) -> dict[str, Any]:
        computed.append((name, seed))
        (row,) = rows(name, [0.9 if name != RANDOM else 0.7])
        return row | {"seed": seed, "settings": settings(args, name, seed)}

    monkeypatch.setattr(objectives, "compute", compute)
    assert main(args) == 0
    assert sorted(computed) == [("SimCLR", 0), ("SimCLR", 1), *((RANDOM, seed) for seed in range(3))]
    file = tmp_path / "objectives_rows.json"
    kept = json.loads(file.read_text())
    changed = next(row for row in kept if row["objective"] == "SimCLR")
    changed["settings"]["size"] = 32
    file.write_text(json.dumps(kept))
    computed.clear()
    assert main(args) == 0
    assert computed == [("SimCLR", changed["seed"])]
    assert "| SimCLR | 0.9 |" in args.out.read_text()


def test_an_objective_that_learned_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ObjectivesArgs(
        data=tmp_path, labels=tmp_path / "labels.csv", label="idc", random_seeds=3, only=("SimCLR",),
        out=tmp_path / "objectives.md",
    )  # fmt: skip

    def compute(args: ObjectivesArgs, name: str, seed: int) -> dict[str, Any]:
        return rows(name, [0.7 + 0.01 * seed])[0] | {"seed": seed, "settings": settings(args, name, seed)}

    monkeypatch.setattr(objectives, "compute", compute)
    assert main(args) == 1


def test_one_random_network_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--random-seeds must be at least 2"):
        main(ObjectivesArgs(data=tmp_path, labels=tmp_path / "labels.csv", label="idc", random_seeds=1))
