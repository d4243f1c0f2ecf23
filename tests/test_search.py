"""The search for settings: what it looks at, what it keeps, what it says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from bench.search import Candidate, SearchArgs, main, read_trials
from bench.search_results import Results, table
from bench.search_scores import FOLDS, folds
from fastmoco.errors import UserError
from fastmoco.study.config import read_study
from fastmoco.study.store import Store
from fastmoco.study.work.context import Context, prepare
from studies import draw_study

TRIALS = """
study = "study.toml"
out = "found"

[[trial]]
name = "base"
data = "drawn"
methods = ["random", "moco"]

[[trial]]
name = "other rate"
data = ["drawn"]
methods = ["moco"]
tuned = ["linear"]
[trial.finetune.linear]
lr = 0.01
"""


def written(folder: Path) -> Path:
    draw_study(folder, count=60)
    config = folder / "search.toml"
    config.write_text(TRIALS)
    return config


def test_folds_are_of_whole_patients_and_never_of_the_test(tmp_path: Path) -> None:
    study = read_study(draw_study(tmp_path, count=60))
    data, store = study.data[0], Store(study.out)
    store.make()
    prepared = prepare(study, data)
    prepared.write(store, data)
    context = Context(study, data, store, "cpu", prepared.print)
    parts = list(folds(context))
    held = np.concatenate([held for _, held in parts])
    splits = context.splits
    assert len(parts) == FOLDS and sorted(held) == sorted([*splits.train, *splits.validation])
    for train, out in parts:
        assert not set(context.groups[train]) & set(context.groups[out])
        assert not {*train, *out} & set(splits.test)


@pytest.mark.system
def test_trials_are_scored_once_and_by_no_test_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = written(tmp_path), tmp_path / "scores" / "search.json"
    out.parent.mkdir()
    args = SearchArgs(config=config, out=out, draws=2)
    assert main(args) == 0
    first = out.read_text()
    rows = {(row["trial"], row["method"]): row["scores"] for row in json.loads(first)}
    assert set(rows) == {("base", "random"), ("base", "moco"), ("other rate", "moco")}
    assert set(rows["base", "moco"]["0.4"]) == {"stage1", "stage2", "stage3", "stage4"}
    # The encoder is the base's: only what is trained on it is new, and no pretraining was done for it.
    assert {budget: set(scores) for budget, scores in rows["other rate", "moco"].items()} == {
        "0.4": {"linear"},
        "1": set(),
    }
    assert (tmp_path / "found" / "drawn.other rate" / "cells" / "drawn.pretrain.moco.s0.json").is_file()
    assert len(list((tmp_path / "found").glob("*/logs/*"))) == 1
    assert all(
        len(v) == FOLDS and all(0 <= s <= 1 for s in v) for of in rows.values() for b in of.values() for v in b.values()
    )
    capsys.readouterr()
    assert main(args) == 0 and capsys.readouterr().out == "" and out.read_text() == first

    with (tmp_path / "labels.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    for line in lines:
        if line["split"] == "test":
            line["kind"] = str(1 - int(line["kind"]))
    with (tmp_path / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    again = tmp_path / "scores" / "again.json"
    assert main(SearchArgs(config=config, out=again, draws=2, only=("drawn.base",))) == 0
    assert {(r["trial"], r["method"]): r["scores"] for r in json.loads(again.read_text())} == {
        key: value for key, value in rows.items() if key[0] == "base"
    }


def test_a_table_says_what_is_above_the_base_and_on_how_many_folds() -> None:
    def row(trial: str, scores: list[float], method: str = "moco", seed: int = 0) -> dict:
        own = {
            "data": "d",
            "trial": trial,
            "method": method,
            "than": "base",
            "seed": seed,
            "device": "cpu",
            "labels": {"0.01": "17 labels"},
        }
        return own | {"scores": {"0.01": {"stage4": scores}}}

    other = [0.6, 0.7, 0.8, 0.7, 0.9]
    lines = table(
        [
            row("base", [0.5, 0.6, 0.7, 0.8, 0.9]),
            row("other", other),
            row("other", other, "mse"),
            row("other", other, seed=1),
        ]
    )
    assert lines[3:] == [
        "| trial | method | on | compared with | probe 4, 17 labels |",
        "|---|---|---|---|---|",
        "| base | moco | cpu | - | 0.700 |",
        "| other | moco | cpu | base, moco | 0.740 (+4.0, 3/5) |",
        # Where the other trial has not the method, with MoCo; never with another seed.
        "| other | mse | cpu | base, moco | 0.740 (+4.0, 3/5) |",
        "| other | moco | cpu | - | 0.740 |",
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('data = ["drawn"]', 'data = ["tissue"]', r"\[\[trial\]\] other rate: data: the study has no 'tissue'"),
        ("lr = 0.01", "rate = 0.01", r"\[\[trial\]\] other rate: finetune.*no key 'rate'"),
        ('methods = ["moco"]', 'methods = ["mocco"]', "methods: must be one of random, moco"),
        (
            'methods = ["moco"]',
            'methods = ["moco"]\npretrain = {epoch = 3}',
            "other rate: pretrain.*did you mean epochs",
        ),
        ('out = "found"', "", "out is missing"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, old: str, new: str, said: str) -> None:
    config = written(tmp_path)
    config.write_text(TRIALS.replace(old, new, 2))
    with pytest.raises(UserError, match=said):
        read_trials(config)
    with pytest.raises(UserError, match=r"nowhere\.toml: cannot be read"):
        read_trials(tmp_path / "nowhere.toml")


def test_changed_settings_are_scored_again_and_what_is_no_trial_is_dropped(tmp_path: Path) -> None:
    config = written(tmp_path)
    _, study, trials = read_trials(config)
    first = Candidate(study, trials[1], tmp_path / "found", config).settings("moco", 2)
    config.write_text(TRIALS.replace("lr = 0.01", "lr = 0.02"))
    _, study, changed = read_trials(config)
    other = Candidate(study, changed[1], tmp_path / "found", config)
    assert len({first, other.settings("moco", 2), other.settings("moco", 3)}) == 3
    results = Results(tmp_path / "s.json", [("drawn", "other rate")], tmp_path / "lock", "# head")
    row = {"data": "drawn", "trial": "other rate", "than": "base", "method": "moco", "seed": 0, "device": "cpu",
           "settings": first, "labels": {"1": "all"}, "scores": {"1": {"stage1": [0.5] * FOLDS}}}  # fmt: skip
    results.add(row | {"trial": "gone"})
    results.add(row)
    assert results.has("drawn", "other rate", "moco", first)
    assert not results.has("drawn", "other rate", "moco", other.settings("moco", 2))
    assert [r["trial"] for r in json.loads((tmp_path / "s.json").read_text())] == ["other rate"]


def test_a_name_that_fits_no_trial_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are drawn\.base, drawn\.other rate"):
        main(SearchArgs(config=written(tmp_path), out=tmp_path / "s.json", only=("idc.base",)))
