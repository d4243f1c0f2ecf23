"""What stands in a study's folder beside its cells: the lists of images, and what a pretraining took."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fastmoco.errors import UserError
from fastmoco.study.cells import make_cells
from fastmoco.study.config import read_study
from fastmoco.study.store import Store
from fastmoco.study.work.context import Context, listed, prepare
from fastmoco.study.work.spent import counted
from studies import draw_study


def test_a_list_that_became_another_is_not_taken_for_the_images_of_the_cells(tmp_path: Path) -> None:
    study = read_study(draw_study(tmp_path))
    data, store = study.data[0], Store(study.out)
    store.make()
    prepared = prepare(study, data)
    prepared.write(store, data)
    own = make_cells(study, {data.name: prepared.print})["drawn.data"].settings["data"]
    assert len(Context(study, data, store, "cpu", own).manifest) == 48
    path = listed(store, data)
    path.write_text(path.read_text().replace(",validation", ",train", 1))
    with pytest.raises(UserError, match=r"drawn\.csv: the splits are not those that the study began with"):
        _ = Context(study, data, store, "cpu", own).manifest


def test_patients_and_where_splits_come_from_are_part_of_what_identifies_data(tmp_path: Path) -> None:
    study = read_study(draw_study(tmp_path))
    first = prepare(study, study.data[0]).print
    assert first["origin"] == "given: train, test; validation drawn by patient from the training images"
    labels = tmp_path / "labels.csv"
    text = labels.read_text()
    # Two test patients become one.
    labels.write_text(text.replace(",p5,", ",p2,"))
    other = prepare(study, study.data[0]).print
    assert {name for name in first if first[name] != other[name]} == {"patients"}


def test_images_without_a_class_are_refused_by_number_and_file(tmp_path: Path) -> None:
    study = read_study(draw_study(tmp_path))
    labels = tmp_path / "labels.csv"
    header, first, *rest = labels.read_text().splitlines()
    cells = first.split(",")
    cells[header.split(",").index(study.data[0].label)] = ""
    labels.write_text("\n".join([header, ",".join(cells), *rest]) + "\n")
    with pytest.raises(
        UserError, match=r"drawn: 1 image without a class in kind, round, dark; .* the empty cells of .*labels\.csv"
    ):
        prepare(study, study.data[0])


def test_the_time_of_a_pretraining_is_that_of_all_its_processes(tmp_path: Path) -> None:
    # One is killed 30 s after its begin, one is stopped, and one goes on to the end.
    run = tmp_path / "run"
    run.mkdir()
    (run / "spent.json").write_text('{"seconds": 5.0, "began": 1000.0}')
    (run / "metrics.jsonl").touch()
    os.utime(run / "metrics.jsonl", (1030.0, 1030.0))
    with pytest.raises(KeyboardInterrupt), counted(run) as seconds:
        assert 35.0 <= seconds() < 36.0
        time.sleep(0.05)
        raise KeyboardInterrupt
    with counted(run) as seconds:
        assert 35.05 <= seconds() < 36.5
    with counted(None) as seconds:
        assert seconds() < 1.0
