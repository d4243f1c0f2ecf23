"""The table of parity: every operation holds, and one that does not is caught."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench import paper, parity, parity_checks
from bench.harness import Missing
from bench.parity import ALIKE, APART, COLUMNS, LIMIT, ParityArgs, difference, main, row
from bench.parity_checks import CHECKS, Check, Loss
from bench.timing import cell, environment, save
from fastmoco.ops import definitions


def test_every_operation_is_its_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    out = tmp_path / "parity.md"
    assert main(ParityArgs(out=out)) == 0
    rows = json.loads(out.with_suffix(".json").read_text())
    assert len({line["ours"] for line in rows}) == len(CHECKS) + 1
    assert {line["noise"] for line in rows if line["ours"] == "ops.infonce"} == {APART, ALIKE}
    for line in rows:
        assert line["holds"]
        if line["noise"] != ALIKE:
            assert 0 <= line["value"] <= LIMIT and (line["gradient"] is None or 0 < line["gradient"] <= LIMIT)
        # All but that of whole encoders.
        assert line["ours_off"] is None if "MomentumContrast" in line["ours"] else 0 < line["ours_off"] <= LIMIT
    text = out.read_text()
    assert all(name in text for name in COLUMNS)
    told = capsys.readouterr().out
    assert f"\nall {len(rows)} comparisons hold, limit 1e-05\nwritten: {out} and {out.with_suffix('.json')}\n" in told
    for line in rows:
        gradient = "no gradient" if line["gradient"] is None else f"gradient {line['gradient']:.1e}"
        alike = ", views alike" if line["noise"] == ALIKE else ""
        assert f"{line['ours']}{alike}: value {line['value']:.1e}, {gradient}" in told


@pytest.mark.parametrize("noise", [APART, ALIKE])
def test_ours_is_held_to_float64_too(noise: float) -> None:
    """Also where the peer's own rounding is above the limit."""
    check = check_of("ops.infonce")
    line = row(check, noise)
    assert line["holds"] and (line["gradient"] > LIMIT) is (line["peer_off"] > LIMIT) is (noise == ALIKE)
    wrong = row(replace(check, own=lambda *z: check.own(*z) * (1 + 1e-4)), noise)
    assert wrong["holds"] is False and wrong["ours_off"] > 5e-5


def check_of(ours: str) -> Check:
    return next(check for check in CHECKS if check.ours == ours)


def with_a_push_between(query0: Tensor, key1: Tensor, query1: Tensor, key0: Tensor, bank: Tensor) -> Tensor:
    """The keys of the first direction are among the negatives of the second."""
    query0, key1, query1, key0 = (normalize(z, dim=1) for z in (query0, key1, query1, key0))
    pushed = torch.cat([key1, bank[len(key1) :]]).detach()
    return (paper.info_nce(query0, key1, bank.detach(), 0.2) + paper.info_nce(query1, key0, pushed, 0.2)) / 2


def one_way(view1: Tensor, view2: Tensor, bank: Tensor) -> Tensor:
    moco = parity_checks._symmetric_moco()
    return moco._one_way(view1, view2, normalize(bank.detach(), dim=1), None).losses["infonce"]


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        ("ops.ntxent, margin", lambda a, b: definitions.supcon(a, b, torch.arange(len(a)), temperature=0.2)[0]),
        ("ops.supcon", lambda a, b: definitions.supcon(a, b, torch.arange(len(a)), temperature=0.1)[0]),
        *(
            (f"ops.mixed_crosscorr, {form}", lambda *z: definitions.mixed_crosscorr(*z, torch.arange(len(z[0])), 0.3))
            for form in ("N x N", "D x D")
        ),
        ("adapters.lightly.NTXentLoss.symmetric", with_a_push_between),
        ("train.objective.MomentumContrast, symmetric", one_way),
    ],
)
def test_a_row_tells_its_objective_from_its_neighbour(ours: str, other: Loss) -> None:
    check = check_of(ours)
    assert row(replace(check, theirs=lambda: other))["holds"] is False


def test_what_differs_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = check_of("ops.crosscorr")
    for scale in (1.0001, 1.0):
        wrong = replace(check, own=lambda a, b, scale=scale: scale * check.own(a, b) + (a - a.detach()).sum() * 1e-3)
        assert row(wrong)["holds"] is False
    monkeypatch.setattr(parity, "CHECKS", (wrong,))
    assert main(ParityArgs(out=tmp_path / "x.md")) == 1
    assert "ops.crosscorr" in (said := capsys.readouterr().out) and "DIFFERS" in said
    assert "2 of 3 comparisons DO NOT hold, limit 1e-05: ops.crosscorr\n" in said


def test_nothing_is_written_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> None:
        raise Missing("lightly is not installed")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parity, "CHECKS", (replace(CHECKS[0], theirs=absent),))  # type: ignore[arg-type]
    assert main(ParityArgs()) == 0 and not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert "all 1 comparisons hold, limit 1e-05; 2 left out\n" in said and "written" not in said
    assert f"{CHECKS[0].ours}: left out, lightly: lightly is not installed\n" in said


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_differs_infinitely(number: float) -> None:
    right, wrong = torch.ones(2, 3), torch.ones(2, 3)
    wrong[1, 2] = number
    # `max` passes over a NaN that does not stand first.
    for found, expected in (([right, wrong], [right, right]), ([right, right], [right, wrong])):
        assert difference(found, expected) == math.inf


def test_a_gradient_that_is_not_finite_does_not_hold() -> None:
    check = check_of("ops.crosscorr")
    # The root of 0 adds nothing to the value, and NaN to the gradient.
    line = row(replace(check, own=lambda a, b: check.own(a, b) + (b - b.detach()).sum().sqrt()))
    assert line["value"] <= LIMIT and line["gradient"] == math.inf and line["holds"] is False


def test_a_peer_that_is_not_there_is_named() -> None:
    def absent() -> None:
        raise Missing("lightly is not installed")

    line = row(replace(CHECKS[0], theirs=absent))  # type: ignore[arg-type]
    assert line["holds"] is None and line["peer"] == "lightly: lightly is not installed"


def test_rows_say_where_they_are_from(tmp_path: Path) -> None:
    """Those that were given without it too; what they say of themselves stands."""
    own = {"device": "cpu", "time": "earlier", "threads": 99}
    save([{"device": "cpu", "value": 1.0}, own], tmp_path / "x.md", title="t", command="c", columns=["value"])
    first, second = json.loads((tmp_path / "x.json").read_text())
    assert first.keys() >= {"processor", "threads", "load_1min", "torch", "fastmoco", "time"} and second == own


def test_versions_are_those_installed_imported_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "triton":
            raise metadata.PackageNotFoundError(name)
        return f"{name} 9.9"

    monkeypatch.setattr(metadata, "version", version)
    where = environment()
    assert where["lightly"] == "lightly 9.9" and "triton" not in where and where["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (3, "3"), (0.12345, "0.123"), (1234.5, "1234"), (2e7, "2e+07"), (-1000.4, "-1000")],
)
def test_cells_have_no_exponent_where_three_digits_need_none(value: object, shown: str) -> None:
    assert cell(value) == shown
