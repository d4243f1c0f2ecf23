"""DeLong's test of single runs: what it says beside the intervals of methods, which count more than it can."""

from __future__ import annotations

import numpy as np

from fastmoco.evaluate.delong import Comparison, compare
from fastmoco.study.plots import label_of
from fastmoco.study.report.blocks import Block, Heading, Table, Text
from fastmoco.study.report.gather import FULL, Findings
from fastmoco.study.report.tables import trained_pairs
from fastmoco.study.report.words import NOT_KNOWN, Footnotes, in_points

_FIRST_DRAW = 0
_MEANING = (
    "DeLong's test compares two single runs. It takes the images as independent, also where a patient has several, and "
    "the two encoders and the labels as given: a small p says that these two runs differ, not that their methods do. "
    "The intervals elsewhere redraw patients where they are known, seeds and draws of the labels; the answers go by "
    "those. No p is corrected for the number of tests."
)
_OTHER_KINDS = {
    "multiclass": "the area of several classes is a mean over classes",
    "multilabel": "the area of several labels is a mean over labels",
}


def run_by_run(found: Findings) -> list[Block]:
    """Each variant against MoCo and each method against scratch, fully fine-tuned with the fewest labels and with all:
    a test for each seed, of the first draw of the labels. Nothing before there are two runs to compare.

    Only of two classes there is such a test: of another target a line says so, the second one included.
    """
    if FULL not in found.study.finetuning.modes or not trained_pairs(found):
        return []
    truth = found.truth()
    blocks: list[Block]
    if truth.kind != "binary":
        blocks = [_none_for(found.data.label, truth.kind)]
    elif min(np.bincount(truth.values, minlength=2)) < 2:
        blocks = [Text(text=f"None for {found.data.label}: it needs two test images of each class.")]
    else:
        blocks = _tests(found)
    if blocks and found.data.multilabel:
        blocks.append(_none_for(f"the {len(found.data.multilabel)} labels at once", "multilabel"))
    return [Heading(level=3, text="DeLong's test, run by run"), *blocks] if blocks else []


def _none_for(target: str, kind: str) -> Text:
    return Text(text=f"None for {target}: {_OTHER_KINDS[kind]}, and DeLong's test is of one curve against another.")


def _tests(found: Findings) -> list[Block]:
    rows, footnotes, compared, tests = [], Footnotes(), 0, 0
    for budget in dict.fromkeys((min(found.study.grid.budgets), 1.0)):
        for a, b in trained_pairs(found):
            for seed in found.study.grid.seeds:
                tested = _compared(found, a, b, budget, seed)
                compared += tested is not None
                tests += tested is not None and tested.z is not None
                name = f"{label_of(a)} minus {label_of(b)}"
                rows.append((name, found.asked(budget), str(seed), *_in_words(tested, footnotes)))
    if not compared:
        return []
    caption = f"{found.data.name}. DeLong's test, run by run: full fine-tuning, first draw of the labels"
    table = Table(
        caption=caption,
        header=("difference", "labels", "seed", "points of AUC", "z", "p"),
        rows=tuple(rows),
        notes=footnotes.lines,
        summary=f"{tests} tests, with their 95 % intervals",
    )
    return [Text(text=_MEANING), table]


def _compared(found: Findings, a: str, b: str, budget: float, seed: int) -> Comparison | None:
    """`a` against `b`; None where one of the two runs is missing."""
    first, second = (found.runs(FULL, init, budget).get((seed, _FIRST_DRAW)) for init in (a, b))
    if first is None or second is None:
        return None
    return compare(first[:, 1], second[:, 1], found.truth().values)


def _in_words(tested: Comparison | None, footnotes: Footnotes) -> tuple[str, str, str]:
    """Difference with its interval, z and p."""
    if tested is None:
        return NOT_KNOWN, NOT_KNOWN, NOT_KNOWN
    difference = in_points(tested.difference, tested.low, tested.high)
    if tested.z is None or tested.p is None:
        return footnotes.mark(difference, [tested.note] if tested.note else []), NOT_KNOWN, NOT_KNOWN
    return difference, f"{tested.z:+.2f}", f"{tested.p:.3f}" if tested.p >= 0.001 else "< 0.001"
