"""Options of `fastmoco pretrain` that do nothing, or more than one thing, where they are given."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastmoco.train.config import Config
from fastmoco.train.opening import barlow_warnings
from fastmoco.train.options import read_options
from fastmoco.train.recipes import RECIPES, find
from fastmoco.train.stored import changed_fields, to_json


def read(recipe: str, *options: str) -> Config:
    return read_options([recipe, "--data", "X", "--out", "Y", *options])


NO_QUEUE = "--objective simclr has no queue and no key encoder"


@pytest.mark.parametrize(
    ("recipe", "options", "why"),
    [
        ("simclr-small", ["--stage-weight", "1"], "--method none has no stage losses"),
        ("mocov2-small", ["--stages", "4"], "--method moco has no stage losses"),
        ("mocov2-small", ["--grids", "2", "2", "2", "2"], "--method moco has no stage losses"),
        ("simclr-small", ["--queue_size=64"], NO_QUEUE),
        ("simclr-small", ["--queue-dtype", "bf16"], NO_QUEUE),
        ("simclr-small", ["--ema", "0.9"], NO_QUEUE),
        ("simclr-small", ["--key-shuffle", "none"], NO_QUEUE),
        ("barlow-twins-small", ["--temperature", "0.1"], "--objective barlow-twins has no temperature"),
    ],
)
def test_an_option_without_effect_is_told(
    recipe: str, options: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read(recipe, *options)
    option = options[0].partition("=")[0].replace("_", "-")
    assert capsys.readouterr() == ("", f"note: {option} has no effect: {why}\n")
    # One of many processes says it.
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "here"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    read(recipe, *options)
    assert capsys.readouterr() == ("", "")


def test_options_with_an_effect_are_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    read("mocov2-small", "--queue-size", "64", "--ema", "0.9", "--queue-dtype", "bf16", "--temperature", "0.1")
    read("histology-mse", "--stage-weight", "1", "--stages", "4", "--grids", "2", "2", "2", "2")
    read("simclr-small", "--method", "mse", "--stage-weight", "1", "--temperature", "0.1")
    read("simclr-small", "--objective", "moco", "--queue-size", "64")
    assert capsys.readouterr() == ("", "")


def test_a_run_goes_on_with_other_values_of_what_it_does_not_use() -> None:
    config = read("simclr-small")
    stored = json.loads(json.dumps(to_json(config)))
    loss = replace(config.loss, queue_size=65536, ema=0.999, stage_weight=1.0)
    assert changed_fields(stored, replace(config, loss=loss)) == []
    warmer = replace(config, loss=replace(loss, temperature=0.5))
    assert changed_fields(stored, warmer) == ["--temperature was 0.2, is 0.5"]
    queued = replace(config, loss=replace(loss, objective="moco", method="mse"))
    changed = {line.split()[0] for line in changed_fields(stored, queued)}
    assert changed == {"--objective", "--method", "--queue-size", "--ema", "--stage-weight"}


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-small")])
def test_every_small_recipe_has_a_small_queue_where_its_objective_is_mocos(name: str) -> None:
    config = find(name)(Path(), Path())
    loss = dataclasses.replace(config.loss, objective="moco", margin=0.0, mix_weight=0.0)
    assert (loss.queue_size, loss.ema) == (1024, 0.99)


def warnings(*options: str, recipe: str = "barlow-twins-small") -> list[str]:
    return list(barlow_warnings(read(recipe, *options)))


def test_the_objectives_constants_are_not_changed_by_accident() -> None:
    """The stages' scale and off-diagonal weight are those of the objective barlow-twins too."""
    beside = ["--method", "barlow", "--stage-weight"]
    form = ["--barlow-scale", "1", "--barlow-off-diagonal", "0.005"]
    scale, off = warnings(*beside, "5e-4", *form)
    assert scale.startswith("--barlow-scale 1 is of --objective barlow-twins too, not of the stages alone")
    assert "the recipe has 0.024" in scale
    assert off.startswith("--barlow-off-diagonal 0.005 is of --objective") and "the recipe has 0.0051" in off
    assert warnings(*beside, "0.02") == warnings(*form) == []
    assert warnings(*beside, "5e-4", *form, recipe="simclr-small") == []
    (heavy,) = warnings(*beside, "0.25")
    assert heavy.startswith("--stage-weight 0.25 is for --method mse; of barlow, 0.02 goes with --objective barlow")
    (heavy,) = warnings(*beside, "0.02", recipe="simclr-small")
    assert heavy.endswith("the paper has 5e-5, and 5e-4 goes with --barlow-scale 1 --barlow-off-diagonal 0.005")
