"""DeLong's test of single runs, as a report shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastmoco.evaluate.delong import compare
from fastmoco.study.report.blocks import Block, Table, Text
from fastmoco.study.report.delong import run_by_run
from fastmoco.study.report.gather import Findings
from fastmoco.study.report.markdown import to_markdown
from fastmoco.study.report.page import to_html
from fastmoco.study.work.numbers import unpack
from studies import IMAGES, TRUTH, Cells, table


def of(cells: Cells) -> list[Block]:
    return run_by_run(Findings(cells.study, cells.study.data[0], cells.records))


def said(blocks: list[Block]) -> str:
    return " ".join(block.text for block in blocks if isinstance(block, Text))


def test_each_row_is_the_test_of_two_stored_runs(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=2)
    cells.all(scratch=0.2, moco=0.5, mse=2.5, barlow=2.0)
    del cells.records["drawn.finetune.mse.full.s1.b1.d0"]
    blocks = of(cells)
    found = table(blocks, "DeLong's test, run by run")
    # 2 variants minus MoCo and 3 methods minus scratch, at two budgets, of two seeds; two rows lack a run.
    assert len(found.rows) == 20 and found.summary.startswith("18 tests")
    few = "40 % (14 images, 55 %)"
    starts = {"MoCo": "moco", "MoCo + MSE": "mse", "MoCo + Barlow": "barlow", "from scratch": "scratch"}
    for name, labels, seed, difference, z, p in found.rows:
        first, second = (starts[part] for part in name.split(" minus "))
        budget = {few: "0.4", "100 %": "1"}[labels]
        if (seed, budget) == ("1", "1") and "mse" in (first, second):
            assert (difference, z, p) == ("-", "-", "-")
            continue
        scores = [
            unpack(cells.records[f"drawn.finetune.{init}.full.s{seed}.b{budget}.d0"]["result"]["probabilities"])[:, 1]
            for init in (first, second)
        ]
        wanted = compare(scores[0], scores[1], TRUTH)
        assert wanted.z is not None and wanted.p is not None
        bounds = [100 * value for value in (wanted.difference, wanted.low, wanted.high)]
        assert difference == "{:+.1f} [{:+.1f}, {:+.1f}]".format(*bounds)
        assert z == f"{wanted.z:+.2f}" and p == (f"{wanted.p:.3f}" if wanted.p >= 0.001 else "< 0.001")
    assert {row[5] for row in found.rows} >= {"< 0.001", "-"}
    assert "takes the images as independent" in said(blocks) and "the answers go by those" in said(blocks)


def test_it_is_folded_on_the_page_and_open_in_print(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=1)
    cells.all(moco=1.0, mse=1.0)
    page = to_html("t", of(cells))
    inside = page[page.index("<details>") : page.index("</details>")]
    assert "0 tests, with their 95 % intervals</summary>" in inside and 'class="scroll"' in inside
    # Equal scores leave no test: the note is folded with the table.
    assert "no test: both sets of scores order the images alike" in inside
    assert "details::details-content { content-visibility: visible; }" in page[page.index("@media print") :]
    assert "| MoCo + MSE minus MoCo | 100 % | 0 | +0.0 \\[+0.0, +0.0\\] ¹ | - | - |" in to_markdown("t", of(cells))


@pytest.mark.parametrize(
    ("kind", "names", "values", "why"),
    [
        ("multiclass", ["a", "b", "c"], np.arange(IMAGES) % 3, "None for kind: the area of several classes is a mean"),
        ("binary", ["no", "yes"], np.arange(IMAGES) == 0, "None for kind: it needs two test images of each class."),
    ],
)
def test_where_there_is_no_such_test_a_line_says_why(
    tmp_path: Path, kind: str, names: list[str], values: np.ndarray, why: str
) -> None:
    told = {"kind": kind, "class_names": names, "test": values.astype(int).tolist()}
    cells = Cells(tmp_path, seeds=1, targets={"kind": told})
    blocks = of(cells)
    assert why in said(blocks) and "None for the 2 labels at once: the area of several labels is a" in said(blocks)
    assert not [block for block in blocks if isinstance(block, Table)]


def test_without_two_runs_or_without_full_fine_tuning_there_is_nothing(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=1)
    cells.finetune("moco", 0, 0, 1.0, 1.0)
    assert of(cells) == []
    assert of(Cells(tmp_path / "linear", seeds=1, modes='["linear"]')) == []
