"""The page of all benchmarks: the committed one is what the JSON files give, and others have its layout."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import page
from bench.e2e import E2eArgs, cases
from bench.page import BEGIN, COMMITTED, END, README, PageArgs, block, main, masked, with_block
from bench.page import page as made
from bench.page_lines import HEADLINE_FILES, OURS, Results, called, headline
from bench.page_sections import SECTIONS
from fastmoco.errors import UserError

FILES = sorted({name for section in SECTIONS for name in section.files})
AGAIN = "python -m bench.page writes it"


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """The committed results with every figure another one, a file missing and another empty."""
    generator = random.Random(0)

    def changed(value: Any) -> Any:
        if isinstance(value, float):
            return value * 10 ** generator.uniform(-4, 4)
        return value

    folder = tmp_path / "results"
    folder.mkdir()
    for name in FILES:
        if (COMMITTED / f"{name}.json").is_file() and name != "scaling":
            rows = json.loads((COMMITTED / f"{name}.json").read_text())
            rows = [{key: changed(value) for key, value in row.items()} for row in rows]
            for row in rows:
                row["processor"], row["holds"] = "Another | with a bar", False
                row["bound"] = generator.choice(["memory", "arithmetic"])
            (folder / f"{name}.json").write_text(json.dumps([] if name == "views" else rows))
    return folder


def test_the_committed_page_is_what_the_results_give() -> None:
    assert (COMMITTED / "README.md").read_text() == made(Results(COMMITTED)), AGAIN
    assert block(Results(COMMITTED)) in README.read_text(), AGAIN
    assert main(PageArgs(check=True)) == 0


def test_other_figures_have_the_same_layout(others: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, old = made(Results(others)), made(Results(COMMITTED))
    assert new != old and masked(new) == masked(old)
    assert masked(block(Results(others))) == masked(block(Results(COMMITTED)))
    before = README.read_text()
    assert main(PageArgs(results=others)) == 0
    assert "not measured, so dashes: " in (said := capsys.readouterr().out) and "scaling" in said and "views" in said
    assert (others / "README.md").read_text() == new and README.read_text() == before


def test_no_results_at_all_give_dashes(tmp_path: Path) -> None:
    nothing = made(Results(tmp_path))
    assert masked(nothing) == masked(made(Results(COMMITTED)))
    cells = [line for line in nothing.splitlines() if line.startswith("| InfoNCE")]
    assert cells and all(line.endswith("| - |") for line in cells) and not re.search(r"\| [\d.]+ \|", "".join(cells))


def test_another_layout_is_told(
    others: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "SECTIONS", SECTIONS[:-1])
    assert main(PageArgs(results=others, check=True)) == 1
    said = capsys.readouterr().out
    assert "-## Sharing a step out" in said and not (others / "README.md").exists()
    # Of the committed ones figures count too.
    monkeypatch.setattr(page, "COMMITTED", others.resolve())
    shutil.copy(COMMITTED / "README.md", others)
    assert main(PageArgs(results=others, check=True)) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("| InfoNCE, N 32 | 5.72 (5.6 to 9.44) | 1e-05 | - |  |", "| InfoNCE, N 32 | # | # | # |  |"),
        ("| x | memory | -23.1 | yes | 2.3e+07 | inf |", "| x | # | # | # | # | # |"),
        ("Ran on: some machine.", "Ran on: "),
        ("Of 32 images 5 are | no | table", "Of 32 images 5 are | no | table"),
        ("| 2 cores | 3 times |", "| 2 cores | 3 times |"),
    ],
)
def test_only_figures_are_masked(line: str, expected: str) -> None:
    assert masked(line) == expected


def test_the_figures_are_those_of_the_rows() -> None:
    rows = json.loads((COMMITTED / "step.json").read_text())
    (fast,) = (row for row in rows if row["implementation"] == "bf16 channels-last")
    text = made(Results(COMMITTED))
    assert f"| {fast['pairs_per_s']:.3g} | {fast['ratio']:.3g} |" in text
    rows = json.loads((COMMITTED / "infonce.json").read_text())
    own = {row["implementation"]: row for row in rows if row["N"] == 32 and row["dtype"] == "float32"}
    native = own["fastmoco native"]
    to_lightly = own["lightly NTXentLoss"]["p50_ms"] / native["p50_ms"]
    line = f"| InfoNCE, N 32, K 65536, D 128, float32 | {native['ratio']:.3g} |  | {to_lightly:.3g} |"
    assert line in README.read_text()
    share = 100 * native["floor_ms"] / native["p50_ms"]
    assert f"| {native['floor_ms']:.3g} | {native['p50_ms']:.3g} | {share:.3g} | {native['bound']} |" in text


def test_the_step_at_the_head_is_in_the_precision_that_a_run_has(tmp_path: Path) -> None:
    """Not in bfloat16 where the processor lacks it."""
    rows = [
        {"implementation": "fp32 channels-last", "ratio": 1.74, "as_run": True},
        {"implementation": "bf16 channels-last", "ratio": 0.6, "as_run": False},
    ]
    (tmp_path / "step.json").write_text(json.dumps(rows))
    assert "| a training step, ResNet-50 | 1.74 |" in block(Results(tmp_path))


def test_a_row_of_another_recipe_batch_or_queue_is_a_dash(tmp_path: Path) -> None:
    args, (case, *_) = E2eArgs(), cases(E2eArgs())
    row = {"implementation": OURS, "arch": case.arch, "size": case.size, "recipe": args.recipe}
    row |= {"batch": case.batch_size, "K": args.queue_size, "ratio": 12.3}
    line = f"| from files to weights: {called(case)} |"
    for number, other in enumerate(({}, {"recipe": "histology-mse"}, {"batch": 1}, {"K": 64})):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "e2e.json").write_text(json.dumps([row | other]))
        assert f"{line} {'-' if other else '12.3'} | - | - |" in block(Results(folder))


def test_the_machines_named_are_those_of_every_file_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    rows = Results.rows

    def note(self: Results, name: str) -> list[dict[str, Any]]:
        read.add(name)
        return rows(self, name)

    monkeypatch.setattr(Results, "rows", note)
    list(headline(Results(COMMITTED)))
    assert read == set(HEADLINE_FILES)


def test_links_of_the_committed_page_lead_somewhere() -> None:
    text = (COMMITTED / "README.md").read_text()
    # Of what was not measured there is no table to link to.
    absent = {f"{name}.{suffix}" for name in FILES for suffix in ("md", "png") if not Results(COMMITTED).rows(name)}
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)} - absent
    assert len(links) > 15
    for link in links:
        assert (COMMITTED / link).exists(), link


def test_readme_without_its_markers_is_refused() -> None:
    assert with_block(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == "a\nnew\nb\n"
    for text in ("nothing", f"{BEGIN} alone", f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(UserError, match="markers"):
            with_block(text, "new")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "step.json").write_text('[{"op": ')
    with pytest.raises(UserError, match=r"step\.json"):
        made(Results(tmp_path))
