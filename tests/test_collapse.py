"""What is told of embeddings that have become one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmoco.train.collapse import STEPS, Collapse
from fastmoco.train.pretrain import pretrain
from runs import draw_images, small_config


def rows(*spreads: float) -> list[dict[str, float]]:
    return [{"embedding_std": spread} for spread in spreads]


def test_it_is_told_once_after_steps_one_after_the_other() -> None:
    watch = Collapse()
    assert watch.read(rows(*[0.001] * (STEPS - 1))) is None
    assert watch.read(rows(0.2)) is None, "one that is spread begins anew"
    assert watch.read(rows(*[0.0] * (STEPS - 1))) is None
    told = watch.read(rows(0.0))
    assert told is not None and "collapse" in told and "--lr" in told
    assert watch.read(rows(*[0.0] * 2 * STEPS)) is None


def test_numbers_that_are_none_are_no_collapse() -> None:
    assert Collapse().read(rows(*[float("nan")] * 2 * STEPS)) is None


def test_a_run_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmoco.train.collapse.LEAST", 2.0)
    monkeypatch.setattr("fastmoco.train.collapse.STEPS", 3)
    pretrain(small_config(draw_images(tmp_path / "data"), tmp_path / "run", steps=6))
    said = capsys.readouterr()
    assert (said.out + said.err).count("the embeddings of all images have been one for 3 steps") == 1
