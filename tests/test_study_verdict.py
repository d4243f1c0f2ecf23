"""What a report says of numbers: verdicts, what is provisional, and what is noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmoco.evaluate.intervals import Estimate
from fastmoco.study.config import read_study
from fastmoco.study.report import record, tables
from fastmoco.study.report.alike import heat_maps, output_distances, reuse
from fastmoco.study.report.blocks import Listing, Picture, Text
from fastmoco.study.report.entries import OF_BASELINES
from fastmoco.study.report.gather import BASELINES, Findings
from fastmoco.study.report.markdown import to_markdown
from fastmoco.study.report.page import to_html
from fastmoco.study.report.settings import settings
from fastmoco.study.report.statistics import Statistics
from fastmoco.study.report.verdict import _gain, _joint, judge, verdict
from fastmoco.study.work.numbers import pack
from studies import IMAGES, Cells, outputs, table, texts


def interval(low: float, high: float) -> Estimate:
    return Estimate(value=(low + high) / 2, low=low, high=high, samples=np.empty(0), seeds=np.empty(0))


@pytest.mark.parametrize(
    ("low", "high", "at_least", "above", "said"),
    [
        (0.051, 0.2, "met", "met", "it beats MoCo"),
        (0.05, 0.06, "met", "met", "it beats MoCo"),
        (0.04, 0.06, "undecided", "met", "it beats MoCo, by 5 points or by fewer"),
        (0.01, 0.04, "refuted", "met", "it beats MoCo, by less than 5 points"),
        (-0.1, 0.049, "refuted", "undecided", "neither a gain nor a loss is shown"),
        (-0.1, -0.01, "refuted", "refuted", "it is worse than MoCo"),
        # No difference at all is neither a gain nor a loss.
        (0.0, 0.0, "refuted", "refuted", "neither a gain nor a loss is shown"),
        (0.0, 0.1, "undecided", "undecided", "neither a gain nor a loss is shown"),
    ],
)  # fmt: skip
def test_the_verdict_goes_by_the_interval(low: float, high: float, at_least: str, above: str, said: str) -> None:
    assert judge(interval(low, high), 0.05) == at_least
    assert judge(interval(low, high), 0.0, above=True) == above
    assert _gain(interval(low, high)) == said
    assert judge(None, 0.05) == "not computed"


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (["met", "met"], "met."), (["met", "refuted"], "refuted."), (["met", "undecided"], "undecided."),
        (["met", "provisional"], "not judged yet."), (["not computed", "met"], "not judged yet."),
        (["provisional", "refuted"], "refuted."),
    ],
)  # fmt: skip
def test_the_claim_is_of_every_variant(states: list[Any], said: str) -> None:
    assert _joint(states) == f"The claim as a whole, of every variant: {said}"


def test_a_claim_is_judged_when_all_seeds_and_draws_are_there(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=3)
    cells.all(moco=0.0, mse=3.0, barlow=3.0)
    found = verdict([cells.statistics()])
    assert [text.partition(":")[0] for text in texts(found)][:2] == ["MoCo + MSE", "MoCo + Barlow"]
    assert all("the claim is met" in text for text in texts(found)[:2])
    assert texts(found)[2] == "The claim as a whole, of every variant: met."
    # What was used where more labels than asked were.
    assert any("at the smallest budget, 40 % (drawn: 14 images, 55 %)" in b.text for b in found if isinstance(b, Text))
    # One run fewer, and it is open again.
    del cells.records["drawn.finetune.mse.full.s1.b0.4.d1"]
    found = verdict([cells.statistics()])
    assert texts(found)[0].startswith("MoCo + MSE: provisional, 2 of 3 seeds, 2 of 2 draws: +")
    assert texts(found)[0].endswith("not judged yet.") and "is met" in texts(found)[1]
    assert texts(found)[2] == "The claim as a whole, of every variant: not judged yet."
    rows = table(found, "The claim at 40 % (drawn: 14 images, 55 %)").rows
    assert rows[0][3:] == ("provisional, 2 of 3 seeds, 2 of 2 draws",) * 2 and rows[2][3:] == ("met", "met")


def test_equal_methods_beat_nobody(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=2)
    cells.all(moco=1.0, mse=1.0, barlow=1.0)
    found = verdict([cells.statistics()])
    said = "the claim is refuted: +0.0 [+0.0, +0.0] points over MoCo; neither a gain nor a loss is shown."
    assert texts(found)[:2] == [f"MoCo + MSE: {said}", f"MoCo + Barlow: {said}"]


def test_a_verdict_of_one_seed_says_so(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=1)
    cells.all(moco=0.0, mse=3.0, barlow=3.0)
    assert texts(verdict([cells.statistics()]))[0].endswith("; of one seed, so that what another would give is not in "
                                                            "the interval.")  # fmt: skip


def test_what_pretraining_is_worth_is_told_as_a_mean_of_the_domains_too(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=2)
    cells.all(scratch=0.0, moco=1.0)
    del cells.records["drawn.finetune.moco.full.s1.b1.d0"]
    one = cells.statistics()
    caption = "Each against what needs no pretraining, points of AUC"
    alone, both = (table(verdict(sets), caption) for sets in ([one], [one, one]))
    assert not any(row[0].startswith("mean") for row in alone.rows)
    means = {row[0]: row[1] for row in both.rows if row[0].startswith("mean of the domains, MoCo, ")}
    own = {row[0]: row[1] for row in alone.rows}
    assert list(means) == ["mean of the domains, MoCo, 40 %", "mean of the domains, MoCo, 100 %"]
    # Of a set and itself the mean is its own, and lacks what it lacks.
    value = own["drawn, MoCo, 40 % (14 images, 55 %)"].partition(" ")[0]
    assert means["mean of the domains, MoCo, 40 %"].startswith(f"{value} ") and float(value) > 0
    assert means["mean of the domains, MoCo, 100 %"].endswith("] ¹")
    assert both.notes[0] == "¹ provisional: 1 of 2 seeds, 1 of 1 draws"


def test_a_study_without_full_fine_tuning_judges_nothing(tmp_path: Path) -> None:
    found = verdict([Cells(tmp_path, seeds=1, modes='["linear"]').statistics()])
    assert texts(found) == [
        "Full fine-tuning, which the claim is about, is not among the modes of this study: it is not judged."
    ]
    header = table(found, "Each against what needs no pretraining").header
    assert header[1] == "probe of stage 4: minus random weights" and "from scratch" not in " ".join(header)


def test_rows_say_how_many_runs_they_are_of_and_what_was_noted(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=3)
    cells.all(moco=1.0, mse=1.0)
    del cells.records["drawn.finetune.mse.full.s2.b1.d0"]
    probes = [
        {"features": "stage4", "budget": budget, "seed": 0, "draw": draw, "validation_auc": 0.5,
         "probabilities": outputs(draw, 1.0), "notes": ["it did not converge"] if draw else []}
        for budget, draw in ((0.4, 0), (0.4, 1), (1.0, 0))
    ]  # fmt: skip
    undefined = {"features": "stage4", "budget": 0.4, "seed": 1, "draw": 0, "notes": ["undefined: it holds NaN"]}
    cells.add("drawn.probes.moco.s0", "probes", {"init": "moco", "seed": 0}, {"probes": [*probes, undefined]})
    found = tables.score_tables(cells.statistics())
    full = table(found, "Full fine-tuning: test AUC")
    assert full.header == ("method", "40 % (14 images, 55 %) of labels", "100 % of labels", "seeds x draws")
    rows = {row[0]: row for row in full.rows}
    assert rows["MoCo"][-1] == "3 x 2, 3 x 1" and rows["MoCo + MSE"][-1] == "3 x 2, 2 x 1"
    assert rows["from scratch"][1:] == ("-", "-", "-, -")
    assert rows["MoCo + MSE"][2].endswith("] ¹") and rows["MoCo + MSE"][1].endswith("]")
    assert full.notes == ("¹ provisional: 2 of 3 seeds, 1 of 1 draws",)
    stage4 = table(found, "Linear probe of stage 4: test AUC")
    assert stage4.notes == (
        "¹ it did not converge (1 run)", "² undefined: it holds NaN (1 run)",
        "³ provisional: 1 of 3 seeds, 2 of 2 draws", "⁴ provisional: 1 of 3 seeds, 1 of 1 draws",
    )  # fmt: skip
    assert next(row for row in stage4.rows if row[0] == "MoCo")[1].endswith("] ¹ ² ³")
    # They are to be read in both files.
    for text in (to_html("t", found), to_markdown("t", found)):
        assert "⁴ provisional: 1 of 3 seeds, 1 of 1 draws" in text


def test_no_row_is_of_what_the_study_has_not(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=1, modes='["full", "linear"]')
    scores = tables.score_tables(cells.statistics())
    assert [row[0] for row in table(scores, "A linear layer alone").rows][:2] == ["random weights", "MoCo"]
    file = tmp_path / "study.toml"
    file.write_text(file.read_text().replace("[study]", '[study]\nmethods = ["moco", "mse"]'))
    own = Statistics(Findings(read_study(file), cells.study.data[0], cells.records), 100)
    rows = table(tables.score_tables(own), "A linear layer alone").rows
    assert [row[0] for row in rows][:2] == ["MoCo", "MoCo + MSE"]
    names = [row[0] for row in table(tables.difference_tables(own), "Full fine-tuning: differences").rows]
    assert "MoCo minus from scratch" not in names and "MoCo minus colour statistics" in names


def test_where_baselines_are_shown_with_all_labels_it_is_said_on_which_images_they_are_fitted(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=1)
    for kind, names in (("probes", ("stage4",)), ("baselines", BASELINES)):
        rows = [
            {"features": name, "budget": budget, "seed": 0, "draw": draw, "validation_auc": 0.5,
             "probabilities": outputs(draw, 1.0)}
            for name in names for budget, draw in ((0.4, 0), (0.4, 1), (1.0, 0))
        ]  # fmt: skip
        cells.add(f"drawn.{kind}", kind, {"init": "moco", "seed": 0}, {"probes": rows})
    own = cells.statistics()
    said = (f"¹ {OF_BASELINES}",)
    scores = table(tables.score_tables(own), "Linear probe of stage 4: test AUC")
    marked = {row[0]: [cell.endswith("] ¹") for cell in row[1:3]] for row in scores.rows}
    assert scores.notes == said and marked["colour statistics"] == marked["gray pixels"] == [False, True]
    assert marked["MoCo"] == [False, False]
    apart = table(tables.difference_tables(own), "Linear probe of stage 4: differences")
    ends = {row[0]: [cell.endswith("] ¹") for cell in row[1:3]] for row in apart.rows}
    assert apart.notes == said and ends["MoCo minus gray pixels"] == [False, True]
    answer = table(verdict([own]), "Each against what needs no pretraining, points of AUC")
    ends = {row[0]: [cell.endswith("] ¹") for cell in row[1:]] for row in answer.rows}
    assert answer.notes == said and ends["drawn, MoCo, 100 %"][-2:] == [True, True]
    assert not any(ends["drawn, MoCo, 40 %"])


def test_baselines_of_more_draws_than_fine_tuning_has_lack_none(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=1, draws=1)
    cells.all(moco=1.0)
    rows = [
        {"features": name, "budget": budget, "seed": 0, "draw": draw, "validation_auc": 0.5,
         "probabilities": outputs(draw, 1.0)}
        for name in BASELINES for budget, draw in ((0.4, 0), (0.4, 1), (1.0, 0))
    ]  # fmt: skip
    cells.add("drawn.baselines", "baselines", {}, {"probes": rows})
    scores = table(tables.score_tables(cells.statistics()), "Full fine-tuning: test AUC")
    runs = {row[0]: row[-1] for row in scores.rows}
    assert runs["MoCo"] == "1 x 1, 1 x 1" and runs["colour statistics"] == "1 x 2, 1 x 1"
    assert scores.notes == (f"¹ {OF_BASELINES}",)


def test_how_training_images_are_augmented_is_said_for_each_that_has_it_otherwise(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=1)
    wide, narrow = {"size": 32, "crop_scale": [0.4, 1.0], "flip_p": 0.5}, {"size": 32, "crop_scale": None}

    def said(*trained: tuple[str, str, dict[str, Any]]) -> tuple[str, ...]:
        for init, mode, views in trained:
            own = {"init": init, "mode": mode, "seed": 0, "draw": 0, "budget": 1.0, "target": "kind"}
            result = {"probabilities": outputs(0, 1.0)}
            cells.add(f"drawn.{init}.{mode}", "finetune", own | {"config": {"views": views}}, result)
        blocks = settings([Findings(cells.study, cells.study.data[0], cells.records)])
        return next(b.items for b in blocks if isinstance(b, Listing) and "augmented" in b.summary)

    crops = "crop_scale 0.4 1, flip_p 0.5"
    assert said(("moco", "full", wide), ("moco", "linear", wide), ("scratch", "full", wide)) == (f"drawn: {crops}",)
    assert said(("scratch", "full", narrow)) == (
        f"drawn, all weights, a linear layer: {crops}", "drawn, from scratch: nothing",
    )  # fmt: skip


def test_outputs_are_compared_class_by_class(tmp_path: Path) -> None:
    told = {"kind": "multiclass", "class_names": ["a", "b", "c"], "test": (np.arange(IMAGES) % 3).tolist()}
    cells = Cells(tmp_path, seeds=1, draws=1, targets={"kind": told})
    shapes = np.random.default_rng(0).dirichlet(np.ones(3), (2, IMAGES))
    for budget, values in zip((0.4, 1.0), shapes, strict=True):
        name = cells.finetune("moco", 0, 0, budget, 1.0)
        cells.records[name]["result"]["probabilities"] = pack(values, "multiclass")
    found = table(output_distances(cells.statistics()), "KS distance")
    assert found.header == ("method and labels", "mean of classes", "a", "b", "c")
    row = next(row for row in found.rows if row[0].startswith("MoCo,"))
    by_class = zip(*np.swapaxes(shapes, 1, 2), strict=True)
    gaps = [max(abs(np.mean(few <= x) - np.mean(full <= x)) for x in [*few, *full]) for few, full in by_class]
    assert row[1:] == (f"{np.mean(gaps):.3f}", *(f"{gap:.3f}" for gap in gaps))
    # Also where the smallest budget, which is drawn, is not computed yet.
    file = tmp_path / "study.toml"
    file.write_text(file.read_text().replace("budgets = [", "budgets = [0.2, "))
    own = Statistics(Findings(read_study(file), cells.study.data[0], cells.records), 100)
    assert table(output_distances(own), "KS distance").rows[-3:] == found.rows[-3:]
    del cells.records[name]
    assert output_distances(cells.statistics()) == []


def test_means_over_seeds_say_which_are_missing(tmp_path: Path) -> None:
    cells = Cells(tmp_path, seeds=3)
    kept = {"mean": 0.8, "std": 0.1, "draws": 50, "size": 30, "images": IMAGES}
    undefined = {"mean": None, "std": None, "draws": 50, "size": 30, "images": IMAGES}
    for seed in range(3):
        name = cells.finetune("moco", seed, 0, 1.0, 1.0)
        own = {"stage1": kept, "stage2": kept if seed else undefined, "stage3": undefined}
        nearer = {"stage1": kept | {"mean": 0.5 + seed / 10}}
        cells.records[name]["result"]["reuse"] = {"linear": own, "rbf": nearer}
    name = cells.finetune("mse", 0, 0, 1.0, 1.0)
    cells.records[name]["result"]["notes"] = ["no feature reuse: of all memory"]
    blocks = reuse(cells.statistics().found)
    found, width = table(blocks, "feature reuse"), "RBF, median distance"
    assert found.rows == (
        ("MoCo", "linear", "0.800 (0.100)", "0.800 (0.100) ¹", "-", "-"),
        ("MoCo", width, "0.600 (0.100)", "-", "-", "-"),
        ("MoCo + MSE ²", "linear", "-", "-", "-", "-"), ("MoCo + MSE ²", width, "-", "-", "-", "-"),
    )  # fmt: skip
    assert found.notes == ("¹ provisional: 2 of 3 seeds", "² no feature reuse: of all memory")
    (drawn,) = (block.figure for block in blocks if isinstance(block, Picture))
    assert [axes.get_title() for axes in drawn.axes] == ["linear", width]
    only = Findings(cells.study, cells.study.data[0], {name: cells.records[name]})
    assert [block.items for block in reuse(only) if isinstance(block, Listing)] == [
        ("MoCo + MSE: no feature reuse: of all memory",)
    ]  # fmt: skip
    pair = {"a": "moco", "b": "mse", "values": np.eye(4).tolist()}
    pairs = [pair | {"kernel": kernel} for kernel in ("linear", "rbf", "paper")]
    cells.add("drawn.similarity.moco-mse.s0", "similarity", {"seed": 0}, {"pairs": pairs})
    maps = heat_maps(cells.statistics().found)
    assert table(maps, "CKA").rows[0][0] == "MoCo, MoCo + MSE ¹" and len(table(maps, "CKA").rows) == 3
    drawn = [block.name for block in maps if isinstance(block, Picture)]
    assert drawn == ["drawn-cka-linear-moco-mse", "drawn-cka-rbf-moco-mse"]


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"patients": {"test": 9}}, "drawn: no patient and no picture is in two splits."),
        ({}, "drawn: no picture is in two splits. Patients are not known, so that one may have pictures in two."),
    ],
)
def test_what_is_known_of_leaks_is_said_set_by_set(tmp_path: Path, described: dict[str, Any], said: str) -> None:
    cells = Cells(tmp_path, seeds=1, **described)
    data = cells.study.data[0]
    blocks = record.leaks([Findings(cells.study, data, cells.records), Findings(cells.study, data, {})])
    assert [block.text for block in blocks[1:] if isinstance(block, Text)] == [
        said, "drawn: not known yet: its first cell is missing."
    ]  # fmt: skip
