"""Configuration, recipes and schedules."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import pytest

from fastmoco.data.order import Order
from fastmoco.errors import UserError
from fastmoco.train.config import LossConfig, OptimConfig, RunConfig
from fastmoco.train.recipes import METHODS, RECIPES, find
from fastmoco.train.schedules import learning_rate, plan
from fastmoco.train.stored import changed_fields, to_json


def test_every_recipe_of_the_paper_and_its_small_variant() -> None:
    full = {f"{d}-{m}" for d in ("histology", "chest-xray", "fundus") for m in ("moco", "mse", "barlow")}
    full |= {"mocov2", "mocov2-symmetric", "simclr", "simclr-margin", "supcon", "barlow-twins", "barlow-twins-mixed"}
    assert set(RECIPES) == full | {f"{name}-small" for name in full}
    for name, recipe in RECIPES.items():
        config = recipe(Path("images"), Path("run"))
        assert config.recipe == name
        assert (config.data.data, config.run.out) == (Path("images"), Path("run"))


def test_the_papers_constants() -> None:
    """METHOD: K, m, tau; SGD; batches; grids; weights; views."""
    for name, batch, size in (("histology", 32, 255), ("chest-xray", 16, 512), ("fundus", 8, 299)):
        for method, weight in (("mse", 0.25), ("barlow", 5e-5)):
            config = find(f"{name}-{method}")(Path(), Path())
            loss, optim = config.loss, config.optim
            assert (loss.queue_size, loss.ema, loss.temperature) == (65536, 0.999, 0.07)
            assert (optim.lr, optim.sgd_momentum, optim.weight_decay, optim.schedule) == (0.03, 0.9, 1e-4, "constant")
            assert (optim.batch_size, config.views.size) == (batch, size)
            assert loss.grids == ((1, 1, 1, 1) if name == "histology" else (16, 16, 4, 4))
            assert loss.stage_weight == weight
            assert (loss.barlow_scale, loss.barlow_off_diagonal, loss.projector_width) == (1 / 32, 1.0, 2048)
            assert (config.model.arch, config.model.head, config.model.dim) == ("resnet50", "linear", 128)
            assert config.views.jitter == (0.4, 0.4, 0.4, 0.1)
            assert (config.views.jitter_p, config.views.gray_p, config.views.blur_p) == (0.8, 0.2, 0.5)
    assert find("chest-xray-moco")(Path(), Path()).views.flip_p == 0
    assert find("fundus-moco")(Path(), Path()).views.rotation == 30
    assert find("histology-moco")(Path(), Path()).views.crop_scale == (0.4, 1.0)
    v2 = find("mocov2")(Path(), Path())
    assert (v2.loss.temperature, v2.model.head, v2.optim.schedule, v2.optim.batch_size) == (0.2, "mlp", "cosine", 256)


def test_what_the_search_found_for_small_sets() -> None:
    """docs/results/search.md: colour of what is coloured, epochs, the form and weight of stage losses."""
    for domain, epochs, coloured in (("histology", 40, True), ("fundus", 150, True), ("chest-xray", 100, False)):
        for method in METHODS:
            full, small = (find(f"{domain}-{method}{end}")(Path(), Path()) for end in ("", "-small"))
            loss, optim = small.loss, small.optim
            assert (loss.queue_size, loss.temperature, loss.ema, small.model.head) == (1024, 0.2, 0.99, "mlp")
            assert (optim.batch_size, optim.lr, optim.schedule, optim.epochs) == (64, 0.06, "cosine", epochs)
            weak = dataclasses.replace(full.views, jitter=(0.2, 0.2, 0.1, 0.02), gray_p=0.0)
            assert small.views == (weak if coloured else full.views)
            assert loss.grids == full.loss.grids
            if method == "mse":
                assert loss.stage_weight == 1.0
            if method == "barlow":
                assert (loss.stage_weight, loss.barlow_scale, loss.barlow_off_diagonal) == (5e-4, 1.0, 0.005)
    plain, small = (find(f"mocov2{end}")(Path(), Path()) for end in ("", "-small"))
    assert small.views == plain.views and small.optim.epochs == 60


def test_an_unknown_recipe_names_its_neighbours() -> None:
    with pytest.raises(UserError, match="histology-mse"):
        find("histology-msee")


def test_a_queue_smaller_than_the_batch() -> None:
    config = find("mocov2")(Path(), Path())
    with pytest.raises(UserError, match=r"--queue-size 100 is smaller than --batch-size 256"):
        dataclasses.replace(config, loss=dataclasses.replace(config.loss, queue_size=100))


@pytest.mark.parametrize(
    ("model", "loss", "said"),
    [
        ({"norm_groups": 2}, {"key_shuffle": "local"}, None),
        ({"norm": "sync"}, {"key_shuffle": "global"}, None),
        ({}, {"key_shuffle": "local"}, "give --norm-groups 2 or more"),
        ({"norm_groups": 3}, {}, "--batch-size 32 cannot be shared out evenly to --norm-groups 3"),
        ({"norm_groups": 0}, {}, "--norm-groups must be at least 1"),
        ({"norm": "sync", "norm_groups": 2}, {}, "with --norm sync leave it at 1"),
    ],
)
def test_norms_and_shuffling_that_fit_each_other(
    model: dict[str, object], loss: dict[str, object], said: str | None
) -> None:
    config = find("histology-mse")(Path(), Path())
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, **model),  # type: ignore[arg-type]
            loss=dataclasses.replace(config.loss, **loss),  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: LossConfig(temperature=0), "--temperature"),
        (lambda: LossConfig(ema=1.1), "--ema"),
        (lambda: LossConfig(stages=(1, 5)), "--stages"),
        (lambda: LossConfig(method="mse", stages=()), "--stages"),
        (lambda: LossConfig(grids=(1, 0, 1, 1)), "--grids"),
        (lambda: OptimConfig(accumulate=0), "--accumulate"),
        (lambda: OptimConfig(steps=0), "--steps"),
        (lambda: RunConfig(out=Path(), keep_checkpoints=0), "--keep-checkpoints"),
        (lambda: RunConfig(out=Path(), max_failed_saves=0), "--max-failed-saves"),
        (lambda: RunConfig(out=Path(), watchdog=0.0), "--watchdog"),
        (lambda: RunConfig(out=Path(), watchdog=float("nan")), "--watchdog"),
        (lambda: RunConfig(out=Path(), seed=-1), "--seed"),
    ],
)
def test_values_out_of_range_name_their_option(make: object, option: str) -> None:
    with pytest.raises(UserError, match=option):
        make()  # type: ignore[operator]


def test_a_resumed_configuration_is_compared() -> None:
    config = find("histology-mse")(Path("a"), Path("b"))
    stored = json.loads(json.dumps(to_json(config)))
    assert changed_fields(stored, config) == []
    run = dataclasses.replace(config.run, out=Path("c"), resume=True, log_every=3, watchdog=9.0, max_failed_saves=1)
    moved = dataclasses.replace(config, run=run)
    assert changed_fields(stored, moved) == [], "where it lies and how often it reports may change"
    other = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, lr=1.0),
        model=dataclasses.replace(config.model, arch="resnet18"),
    )
    assert changed_fields(stored, other) == [
        "--arch was resnet50, is resnet18",
        "--lr was 0.03, is 1.0",
    ]


def test_a_configuration_of_before_a_field_existed_counts_as_its_default() -> None:
    config = find("histology-mse")(Path("a"), Path("b"))
    stored = json.loads(json.dumps(to_json(config)))
    del stored["loss"]["queue_dtype"], stored["loss"]["stages"], stored["optim"]["update"]
    assert changed_fields(stored, config) == []
    other = dataclasses.replace(
        config,
        loss=dataclasses.replace(config.loss, queue_dtype="bf16", stages=(1, 2)),
        optim=dataclasses.replace(config.optim, update="torch"),
    )
    assert changed_fields(stored, other) == [
        "--queue-dtype was fp32, is bf16",
        "--stages was [1, 2, 3, 4], is [1, 2]",
    ]
    del stored["data"]["data"], stored["run"]["seed"], stored["model"]
    assert changed_fields(stored, config) == []


def test_a_queue_longer_than_the_set_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    config = find("mocov2-small")(Path(), Path())
    for samples, warned in ((1023, True), (1024, False)):
        plan(config, Order(samples, 64, 0))
        said = f"warning: the queue of 1,024 keys is longer than the {samples:,} images"
        assert capsys.readouterr().out.startswith(said) == warned
    # One of several processes says it; and in less than an epoch no image comes again.
    plan(config, Order(1023, 64, 0, shard=1, shards=2))
    short = dataclasses.replace(config.optim, steps=15, warmup_epochs=0.0)
    plan(dataclasses.replace(config, optim=short), Order(1023, 64, 0))
    assert capsys.readouterr().out == ""


def test_schedules() -> None:
    def lr(step: int, schedule: str = "cosine", warmup: int = 4) -> float:
        return learning_rate(step, peak=2.0, total=24, warmup=warmup, schedule=schedule)

    assert [lr(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert lr(4) == 2.0
    assert lr(14) == pytest.approx(1.0)
    assert lr(23) == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi * 19 / 20)))
    assert [lr(step, "constant", 0) for step in (0, 11, 23)] == [2.0] * 3
    assert all(lr(step) > lr(step + 1) for step in range(4, 23))
