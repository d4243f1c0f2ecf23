"""The paper's claim against what was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastmoco.evaluate.intervals import Estimate
from fastmoco.study.cells import RANDOM
from fastmoco.study.config import SCRATCH
from fastmoco.study.plots import label_of
from fastmoco.study.report.blocks import Block, Heading, Table, Text
from fastmoco.study.report.entries import Entries, lacking
from fastmoco.study.report.gather import BASELINES, FULL
from fastmoco.study.report.statistics import Statistics, mean_difference
from fastmoco.study.report.words import Footnotes, points, share

CLAIM = 0.05
Verdict = Literal["met", "refuted", "undecided", "not computed", "provisional"]
_MOCO, _STAGE4 = "moco", "stage4"


def judge(estimate: Estimate | None, threshold: float, *, above: bool = False) -> Verdict:
    """Whether a difference is at least `threshold` (`above`: above it): "met" where its whole interval is, "refuted"
    where none of it is."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return "not computed"
    if estimate.low > threshold or (estimate.low == threshold and not above):
        return "met"
    if estimate.high < threshold or (estimate.high == threshold and above):
        return "refuted"
    return "undecided"


def verdict(statistics: Sequence[Statistics]) -> list[Block]:
    """What was asked and what was answered: the first thing in the report."""
    study = statistics[0].found.study
    smallest = min(study.grid.budgets)
    asked = _in_words(statistics, smallest)
    names = ", ".join(own.found.data.name for own in statistics)
    blocks: list[Block] = [
        Heading(level=2, text="What was asked, and the answer"),
        Text(
            text=f"The claim: at the smallest budget, {asked} of the labels, losses at the intermediate layers gain "
            f"about 5 points of AUC over plain MoCo after full fine-tuning, mean of the domains ({names}). What is "
            "tested is a gain of 5 points or more: the claim is met where the whole 95 % interval of the paired "
            "difference lies at or above +5, refuted where the whole interval lies below, undecided otherwise. It is "
            "judged when all seeds and draws are computed."
        ),
    ]
    variants = [method for method in study.pretrained if method != _MOCO]
    if not variants or _MOCO not in study.pretrained:
        blocks.append(Text(text="This study has not both MoCo and a variant of it, so that nothing is judged."))
    else:
        blocks += _claim(statistics, variants, smallest, asked)
    return blocks + _against_others(statistics, smallest)


def state(statistics: Sequence[Statistics], measure: str, method: str, budget: float) -> tuple[Verdict, str]:
    """The verdict on `method` against MoCo, mean of the sets of images; where it is provisional, what there is."""
    mean = mean_difference(statistics, measure, method, _MOCO, budget)
    if mean is None or mean.value is None:
        return "not computed", ""
    planned = statistics[0].found.planned(measure, budget)
    each = [own.whole(measure, (method, _MOCO), budget) for own in statistics]
    least = min(seeds for seeds, _ in each), min(draws for _, draws in each)
    if least != planned:
        return "provisional", lacking(least, planned)
    return judge(mean, CLAIM), ""


def _claim(statistics: Sequence[Statistics], variants: Sequence[str], budget: float, asked: str) -> list[Block]:
    modes = statistics[0].found.study.finetuning.modes
    blocks: list[Block] = []
    if FULL in modes:
        blocks += [Text(text=_sentence(statistics, method, budget), strong=True) for method in variants]
        if len(variants) > 1:
            blocks.append(Text(text=_joint([state(statistics, FULL, m, budget)[0] for m in variants]), strong=True))
    else:
        said = "Full fine-tuning, which the claim is about, is not among the modes of this study: it is not judged."
        blocks.append(Text(text=said, strong=True))
    rows, footnotes = [], Footnotes()
    ways = {FULL: "full fine-tuning", _STAGE4: "linear probe, stage 4"}
    for method in variants:
        for measure in (FULL, _STAGE4) if FULL in modes else (_STAGE4,):
            mean = mean_difference(statistics, measure, method, _MOCO, budget)
            found, missing = state(statistics, measure, method, budget)
            told = [f"{found}, {missing}"] * 2 if missing else [found, judge(mean, 0.0, above=True)]
            marked = footnotes.mark(points(mean), () if mean is None else mean.notes)
            rows.append((f"{label_of(method)} minus MoCo", ways[measure], marked, *told))
    header = ("difference", "measured by", "points of AUC", "at least +5", "above 0")
    caption = f"The claim at {asked} of the labels, mean of the domains"
    return [*blocks, Table(caption=caption, header=header, rows=tuple(rows), notes=footnotes.lines)]


def _sentence(statistics: Sequence[Statistics], method: str, budget: float) -> str:
    name, mean = label_of(method), mean_difference(statistics, FULL, method, _MOCO, budget)
    found, missing = state(statistics, FULL, method, budget)
    if found == "not computed":
        return f"{name}: not computed yet; cells are missing."
    if found == "provisional":
        return f"{name}: provisional, {missing}: {points(mean)} points over MoCo; not judged yet."
    of_one = "; of one seed, so that what another would give is not in the interval"
    alone = of_one if len(statistics[0].found.study.grid.seeds) == 1 else ""
    return f"{name}: the claim is {found}: {points(mean)} points over MoCo; {_gain(mean)}{alone}."


def _gain(mean: Estimate | None) -> str:
    """What is shown beside the claim: a gain of any size, a loss, or neither."""
    if mean is None or mean.low is None or mean.high is None:
        return "there is no interval"
    if mean.low > 0:
        if mean.low >= CLAIM:
            return "it beats MoCo"
        return "it beats MoCo, by less than 5 points" if mean.high < CLAIM else "it beats MoCo, by 5 points or by fewer"
    return "it is worse than MoCo" if mean.high < 0 else "neither a gain nor a loss is shown"


def _joint(states: Sequence[Verdict]) -> str:
    """The claim is of all variants: refuted where it is of one."""
    if "refuted" in states:
        found = "refuted"
    elif "provisional" in states or "not computed" in states:
        return "The claim as a whole, of every variant: not judged yet."
    else:
        found = "met" if set(states) == {"met"} else "undecided"
    return f"The claim as a whole, of every variant: {found}."


def _in_words(statistics: Sequence[Statistics], budget: float) -> str:
    """A budget, with the sets of images that had more: "1 % (idrid: 14 images, 5.7 %)"."""
    used = {own.found.data.name: own.found.used(budget) for own in statistics}
    more = [f"{name}: {found}" for name, found in used.items() if found is not None and found.more]
    return share(budget) + (f" ({'; '.join(more)})" if more else "")


def _against_others(statistics: Sequence[Statistics], smallest: float) -> list[Block]:
    """Does each method beat scratch, random weights and the baselines, with the fewest labels and with all?"""
    study = statistics[0].found.study
    others = [(_STAGE4, RANDOM), *((_STAGE4, name) for name in BASELINES)]
    if FULL in study.finetuning.modes and SCRATCH in study.grid.methods:
        others.insert(0, (FULL, SCRATCH))
    entries, rows = Entries(), []
    for budget in dict.fromkeys((smallest, 1.0)):
        for own in statistics:
            for method in study.pretrained:
                cells = (entries.difference(own, measure, method, other, budget) for measure, other in others)
                rows.append((f"{own.found.data.name}, {label_of(method)}, {own.found.asked(budget)}", *cells))
        if len(statistics) > 1:
            for method in study.pretrained:
                cells = (entries.mean_difference(statistics, m, method, other, budget) for m, other in others)
                rows.append((f"mean of the domains, {label_of(method)}, {share(budget)}", *cells))
    if not rows:
        return []
    ways = {FULL: "fine-tuned", _STAGE4: "probe of stage 4"}
    header = ("data, method, labels", *(f"{ways[measure]}: minus {label_of(other)}" for measure, other in others))
    caption = "Each against what needs no pretraining, points of AUC"
    return [Table(caption=caption, header=header, rows=tuple(rows), notes=entries.footnotes.lines)]
