"""The paper's claim against what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastmoco.evaluate.intervals import Estimate
from fastmoco.study.report.blocks import Block, Heading, Table, Text
from fastmoco.study.report.gather import BASELINES, FULL, baseline_name
from fastmoco.study.report.statistics import Statistics, mean_difference
from fastmoco.study.report.words import points, share

CLAIM = 0.05
Verdict = Literal["met", "refuted", "undecided", "not computed"]
_STAGE4 = "stage4"


def judge(estimate: Estimate | None, threshold: float) -> Verdict:
    """Whether a difference is at least `threshold`: "met" where its whole interval is, "refuted" where none is."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return "not computed"
    if estimate.low >= threshold:
        return "met"
    return "refuted" if estimate.high < threshold else "undecided"


def verdict(statistics: Sequence[Statistics]) -> list[Block]:
    """What was asked and what was answered: the first thing in the report."""
    found = statistics[0].found
    smallest = min(found.study.grid.budgets)
    names = ", ".join(own.found.data.name for own in statistics)
    variants = [method for method in found.study.pretrained if method != "moco"]
    blocks: list[Block] = [
        Heading(level=2, text="What was asked, and the answer"),
        Text(
            text=f"The claim: at the smallest budget, {share(smallest)} of the labels, losses at the intermediate "
            f"layers gain about 5 points of AUC over plain MoCo after full fine-tuning, mean of the domains ({names}). "
            "It is met where the whole 95 % interval of the paired difference lies at or above +5, refuted where the "
            "whole interval lies below, undecided otherwise."
        ),
    ]
    rows = []
    for method in variants if "moco" in found.study.pretrained else []:
        for measure, said in ((FULL, "full fine-tuning"), (_STAGE4, "linear probe, stage 4")):
            mean = mean_difference(statistics, measure, method, "moco", smallest)
            rows.append(
                (f"{baseline_name(method)} minus MoCo", said, points(mean), judge(mean, CLAIM), judge(mean, 0.0))
            )
            if measure == FULL:
                blocks.append(Text(text=_sentence(method, mean), strong=True))
    header = ("difference", "measured by", "points of AUC", "at least +5", "at least 0")
    blocks.append(
        Table(
            caption=f"The claim at {share(smallest)} of the labels, mean of the domains",
            header=header,
            rows=tuple(rows),
        )
    )
    blocks += _against_others(statistics, smallest)
    return blocks


def _sentence(method: str, mean: Estimate | None) -> str:
    name = baseline_name(method)
    state = judge(mean, CLAIM)
    if mean is None or mean.value is None:
        return f"{name}: not computed yet; cells are missing."
    beats = {"met": "it beats MoCo", "refuted": "it is worse than MoCo", "undecided": "it may be better or worse"}
    own = judge(mean, 0.0)
    return f"{name}: the claim is {state}: {points(mean)} points over MoCo; {beats.get(own, 'no interval')}."


def _against_others(statistics: Sequence[Statistics], budget: float) -> list[Block]:
    """Does each method beat scratch, random weights and the baselines at the smallest budget, set by set?"""
    study = statistics[0].found.study
    rows = []
    for own in statistics:
        for method in study.pretrained:
            cells = []
            for measure, other in ((FULL, "scratch"), (_STAGE4, "random"), *((_STAGE4, b) for b in BASELINES)):
                known = own.difference(measure, method, other, budget)
                cells.append(points(known))
            rows.append((own.found.data.name, baseline_name(method), *cells))
    header = (
        "data",
        "method",
        "fine-tuned: minus scratch",
        "probe: minus random weights",
        *(f"probe: minus {name}" for name in BASELINES),
    )
    return [
        Table(
            caption=f"Each against what needs no pretraining, {share(budget)} of the labels, points of AUC",
            header=header,
            rows=tuple(rows),
        )
    ]
