"""The simulation behind the intervals' coverage: its truth is the truth, and its table says what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import coverage
from bench.coverage import IMAGES, PATIENTS, SETTINGS, CoverageArgs, Setting, predictions, true_area
from fastmoco.evaluate.scores import auc


@pytest.mark.parametrize("setting", [SETTINGS[0], Setting(2, 2, 0.5, 0.8)])
def test_the_truth_is_the_mean_area_of_simulated_runs(setting: Setting) -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(PATIENTS), IMAGES)
    labels = np.repeat([0, 1], PATIENTS // 2)[groups]
    found = []
    for _ in range(200):
        common = coverage.PATIENT * rng.normal(size=PATIENTS)[groups] + coverage.IMAGE * rng.normal(size=len(labels))
        runs = predictions(rng, setting, common, labels)
        assert runs.shape == (setting.seeds, setting.draws, PATIENTS * IMAGES, 2)
        each = runs.reshape(-1, *runs.shape[2:])
        found.append(np.mean([auc(run, labels, class_names=["0", "1"])[0] for run in each]))
    error = np.std(found) / np.sqrt(200)
    assert np.mean(found) == pytest.approx(true_area(setting), abs=4 * error)
    assert error < 0.008


def test_the_table_has_a_line_for_each_estimate_and_patients_cover_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "SETTINGS", (SETTINGS[-1],))
    out = tmp_path / "coverage.md"
    assert coverage.main(CoverageArgs(trials=40, replicates=100, out=out)) == 0
    rows = [line for line in out.read_text().splitlines() if line.startswith("| 3 | 1 |")]
    assert len(rows) == 2
    for row in rows:
        shares = [float(cell.split()[0]) for cell in row.split("|")[6:9]]
        assert shares[0] < shares[1] <= shares[2]
