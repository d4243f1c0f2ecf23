"""The guard against slow-downs: noise is none, a slow-down is one, and so is a row that has gone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.check import CheckArgs, compare, expected_spread, is_ours, main, read_rows, row_noise
from bench.timing import quantiles
from fastmoco.errors import UserError

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def row(seconds: np.ndarray, baseline: float = 1.0, **more: Any) -> dict[str, Any]:
    times = quantiles(seconds.tolist())
    return {"op": "ema", "implementation": "fastmoco native", "N": 4, "ratio": 1e3 * baseline / times["p50_ms"],
            "rounds": len(seconds), **times} | more  # fmt: skip


def checked(folder: Path, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> int:
    (folder / "old.json").write_text(json.dumps(old))
    (folder / "new.json").write_text(json.dumps(new))
    return main(CheckArgs(old=folder / "old.json", new=folder / "new.json"))


@pytest.mark.parametrize("repeats", [2, 3, 4, 9, 25])
def test_the_spread_of_a_few_values_is_expected(repeats: int) -> None:
    values = np.random.default_rng(repeats).normal(size=(20000, repeats))
    low, high = np.percentile(values, (20, 80), axis=1)
    assert expected_spread(repeats) == pytest.approx(float((high - low).mean()), rel=0.06)


def test_the_noise_is_that_of_medians() -> None:
    """Of many runs of a benchmark, drawn, ratios deviate by what each run says of itself."""
    rng = np.random.default_rng(0)
    runs = [(rng.normal(1.0, 0.1, 25), rng.normal(3.0, 0.6, 25)) for _ in range(400)]
    ratios = [np.median(other) / np.median(own) for own, other in runs]
    said = np.mean([row_noise(row(own), row(other)).deviation for own, other in runs])
    seen = np.std(np.log(ratios))
    assert 0.8 * seen < said < 1.25 * seen


@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_equal_speeds_are_slower_in_less_than_one_of_a_hundred_rows(repeats: int, tmp_path: Path) -> None:
    """Drawn, with noise in the rows and more in their baseline, from files as benchmarks write them."""
    rng, path = np.random.default_rng(repeats), tmp_path / "x.json"

    def drawn() -> dict[str, Any]:
        rows = []
        for number in range(2000):
            base, own = (np.exp(rng.normal(0, deviation, repeats)) for deviation in (0.2, 0.05))
            theirs = row(base, N=number, implementation="paper") | {"ratio": 1.0}
            rows += [theirs, row(own, float(np.median(base)), N=number)]
        path.write_text(json.dumps(rows))
        return read_rows(path)

    changes = compare(drawn(), drawn())
    assert len(changes) == 2000
    assert sum(change.verdict(0.0) == "slower" for change in changes) < 20
    # One file's noise is known, and something: much slower is told where there are more than two repeats.
    if repeats > 2:
        slow = {name: replace(one, ratio=one.ratio / 20) for name, one in read_rows(path).items()}
        told = [change.verdict(0.0) == "slower" for change in compare(drawn(), slow)]
        assert np.mean(told) > 0.5


def test_what_ran_once_has_no_known_noise(tmp_path: Path) -> None:
    assert checked(tmp_path, [row(np.ones(1))], [row(np.full(1, 2.0))]) == 0


def test_as_fast_as_before_is_seldom_slower(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    results = [checked(tmp_path, [row(rng.normal(1.0, 0.1, 9))], [row(rng.normal(1.0, 0.1, 9))]) for _ in range(200)]
    assert sum(results) <= 6


def test_a_slow_down_beyond_noise_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    old, slow, noisy = (rng.normal(mean, dev, 25) for mean, dev in ((1.0, 0.02), (1.3, 0.02), (1.3, 0.6)))
    assert checked(tmp_path, [row(old)], [row(slow)]) == 1
    assert "slower: ema, fastmoco native, 4: 0.7" in capsys.readouterr().out
    assert checked(tmp_path, [row(old)], [row(noisy)]) == 0
    # The same hardware twice as busy: its baseline is slower too.
    assert checked(tmp_path, [row(old)], [row(2 * old, baseline=2.0)]) == 0
    assert checked(tmp_path, [row(slow)], [row(old)]) == 0
    assert "faster: ema" in capsys.readouterr().out
    # Peers may be as slow as they like.
    peer: dict[str, Any] = {"implementation": "paper, a loop"}
    assert checked(tmp_path, [row(old), row(old, **peer)], [row(old), row(slow, **peer)]) == 0


def test_a_row_that_has_gone_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = np.ones(9)
    assert checked(tmp_path, [row(seconds), row(seconds, N=8)], [row(seconds)]) == 1
    assert "gone: ema, fastmoco native, 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["infonce", "crosscorr", "pooled_mse", "ema", "step", "views", "data", "e2e", "dropin"]
)
def test_committed_results_are_as_fast_as_themselves(name: str) -> None:
    path = RESULTS / f"{name}.json"
    assert main(CheckArgs(old=path, new=path)) == 0
    ours = [one for one in json.loads(path.read_text()) if is_ours(one) and one.get("ratio") is not None]
    # No two rows are one.
    assert len(read_rows(path)) == len(ours)


def test_folders_are_compared_file_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, mean in ((old, 1.0), (new, 1.4)):
        folder.mkdir()
        (folder / "ema.json").write_text(json.dumps([row(rng.normal(mean, 0.02, 25))]))
        (folder / "step.json").write_text(json.dumps([row(rng.normal(1.0, 0.02, 25), op="step")]))
        # Nothing of it is timed.
        (folder / "parity.json").write_text(json.dumps([{"ours": "ops.infonce", "holds": True}]))
    assert main(CheckArgs(old=old, new=new)) == 1
    assert "2 rows compared, 1 slower, 0 gone" in (said := capsys.readouterr().out) and "slower: ema" in said
    (new / "step.json").unlink()
    assert main(CheckArgs(old=old, new=new)) == 1 and "gone: step" in capsys.readouterr().out
    assert main(CheckArgs(old=new, new=new)) == 0
    (old / "ema.json").write_text((new / "ema.json").read_text())
    assert main(CheckArgs(old=old, new=new)) == 1 and main(CheckArgs(old=old, new=new, common=True)) == 0
    assert main(CheckArgs(old=RESULTS, new=RESULTS)) == 0


@pytest.mark.parametrize("common", [False, True])
def test_nothing_in_common_is_no_success(common: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, n in (("old", 4), ("new", 8)):
        (tmp_path / f"{name}.json").write_text(json.dumps([row(np.ones(9), N=n)]))
    assert main(CheckArgs(old=tmp_path / "old.json", new=tmp_path / "new.json", common=common)) == 1
    said = capsys.readouterr().out
    assert "0 rows compared" in said and "nothing was compared: no row of" in said and "same options" in said


def test_what_is_not_there_is_said_not_to_be(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([row(np.ones(9))]))
    for name in ("absent", "absent.json"):
        with pytest.raises(UserError, match=rf"{name}: no such file or folder$"):
            main(CheckArgs(old=tmp_path / "x.json", new=tmp_path / name))


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="not the JSON file of a benchmark"):
        read_rows(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match="no row of ours"):
        read_rows(tmp_path / "x.json")
