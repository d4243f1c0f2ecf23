"""The grid: every cell of a study, with what it depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

from fastmoco.data.views import ViewConfig
from fastmoco.evaluate.finetune import FinetuneConfig
from fastmoco.study.cell import REVISIONS, Cell, Kind
from fastmoco.study.config import SCRATCH, Data, Study
from fastmoco.study.overrides import apply, finetune_config, of_one, recipe_name
from fastmoco.train.config import Config
from fastmoco.train.recipes import METHODS, find
from fastmoco.train.stored import to_json

RANDOM = "random"
# The name of the second target, of several labels.
SECOND = "multilabel"
# What no cell depends on but the one that describes the data, by which the report redraws, and pairs of patients.
OF_DATA = ("patients", "origin")
# Draws of one pretraining seed are numbered from here on, so that no two seeds share one.
_DRAWS_A_SEED = 1000
# Fields of a recipe that do not change what is computed, or only say where; and those of losses that a method has not.
NOT_SETTINGS = {
    "workers",
    "stage",
    "max_bad",
    "out",
    "resume",
    "seed",
    "device",
    "engine",
    "zero",
    "cuda_graph",
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "max_failed_saves",
    "watchdog",
    "knn_every",
}
_OF_BARLOW = {"barlow_scale", "barlow_off_diagonal", "barlow_correlation", "projector_width"}
# Fields that are younger than studies: left out at their defaults, so that what was computed before is found.
_LATER = {"objective": "moco", "symmetric": False, "margin": 0.0, "mix_weight": 0.0}
_NOT_OF_METHOD = {"moco": {"stages", "stage_weight", "grids"} | _OF_BARLOW, "mse": _OF_BARLOW, "barlow": {"grids"}}


def draw_seed(seed: int, draw: int) -> int:
    """The seed of draw number `draw` of the labels beside pretraining seed `seed`: the same for every method."""
    return seed * _DRAWS_A_SEED + draw


def draws(budget: float, count: int) -> range:
    """The draws at `budget`: with all labels there is nothing to draw."""
    return range(1) if budget == 1 else range(count)


def make_cells(study: Study, prints: Mapping[str, Mapping[str, Any]]) -> dict[str, Cell]:
    """All cells by id, each after those that it needs.

    `prints` maps the name of data to what identifies them: "images", "splits", "patients", "label" and "multilabel"
    (SHA-256), "origin" of the splits in words, and the counts "train", "validation" and "test" of their images.
    """
    grid = _Maker(study, prints)
    for data in study.data:
        grid.add_data(data)
    return grid.cells


class _Maker:
    def __init__(self, study: Study, prints: Mapping[str, Mapping[str, Any]]) -> None:
        self.study = study
        self.prints = prints
        self.cells: dict[str, Cell] = {}

    def add_data(self, data: Data) -> None:
        seeds, budgets = self.study.grid.seeds, self.study.grid.budgets
        # The second target's labels touch none but its own cells.
        print_ = self.prints[data.name]
        own: dict[str, Any] = {"name": data.name, "size": data.size}
        own |= {name: value for name, value in print_.items() if name not in (SECOND, *OF_DATA)}
        described = {name: print_[name] for name in OF_DATA}
        n = own["train"] + own["validation"] + own["test"]
        target = {"label": data.label, SECOND: self._second(data)}
        every = {"data": own, "target": data.label, "budgets": list(budgets), "seeds": list(seeds)}
        self._add(f"{data.name}.data", "data", {"data": own, **target, **described}, work=n / 20)
        base = self._add(f"{data.name}.baselines", "baselines", every | {"draws": self.study.probes.draws}, work=n)
        for seed in seeds:
            for method in self.study.pretrained:
                self._add_pretrain(data, own, method, seed)
            for method in (RANDOM, *self.study.pretrained):
                self._add(
                    f"{data.name}.probes.{method}.s{seed}",
                    "probes",
                    {
                        "data": own,
                        "target": data.label,
                        "init": method,
                        "seed": seed,
                        "draws": self.study.probes.draws,
                        "budgets": list(budgets),
                        "resize": evaluation_resize(self.study, data),
                        "views": _lists(dataclasses.asdict(pretraining_views(self.study, data))),
                        **self._start(data, method, seed),
                    },
                    needs=self._needs(data, method, seed),
                    work=base.work + n,
                )
            self._add_similarity(data, own, seed)
            for method in self.study.grid.methods:
                for mode in self.study.finetuning.modes:
                    self._add_finetunes(data, own, method, mode, seed)

    def _add_pretrain(self, data: Data, own: dict[str, Any], method: str, seed: int) -> None:
        config = pretrain_config(self.study, data, method, Path(), Path())
        optim = config.optim
        passes = optim.epochs * (own["train"] + own["validation"])
        if optim.steps is not None:
            passes = optim.steps * optim.batch_size * optim.accumulate
        settings = {"data": own, "method": method, "seed": seed, "config": _pretrain_settings(config)}
        if config.data.pairs == "patient":
            settings["patients"] = self.prints[data.name]["patients"]
        self._add(pretrain_id(data, method, seed), "pretrain", settings, work=2.0 * passes)

    def _add_similarity(self, data: Data, own: dict[str, Any], seed: int) -> None:
        # Two at a time, so that one that diverged leaves out none but its own.
        for pair in combinations_with_replacement((RANDOM, *self.study.pretrained), 2):
            methods = tuple(dict.fromkeys(pair))
            needs = tuple(need for method in methods for need in self._needs(data, method, seed))
            starts = {method: self._start(data, method, seed) for method in methods}
            self._add(
                f"{data.name}.similarity.{'-'.join(methods)}.s{seed}",
                "similarity",
                {"data": own, "seed": seed, "inits": starts, "resize": evaluation_resize(self.study, data)},
                needs=needs,
                work=2.0 * len(methods) * own["test"],
            )

    def _add_finetunes(self, data: Data, own: dict[str, Any], method: str, mode: str, seed: int) -> None:
        if mode == "linear" and method == SCRATCH:
            # A layer on random features: that is the random encoder's.
            method = RANDOM
        config = finetune_settings(self.study, data, mode, method)
        start = self._start(data, RANDOM if method == SCRATCH else method, seed)
        common = {"data": own, "init": method, "mode": mode, "seed": seed, "config": _plain(config), **start}
        common["resize"] = evaluation_resize(self.study, data)
        needs = self._needs(data, method, seed)
        for budget in self.study.grid.budgets:
            images = max(round(budget * own["train"]), 2)
            for draw in draws(budget, self.study.finetuning.draws):
                self._add(
                    finetune_id(data, data.label, method, mode, seed, budget, draw),
                    "finetune",
                    common | {"target": data.label, "budget": budget, "draw": draw},
                    needs=needs,
                    work=_work(config, images, own["validation"]),
                )
        if data.multilabel and mode == "full":
            self._add(
                finetune_id(data, SECOND, method, mode, seed, 1.0, 0),
                "finetune",
                common | {"target": SECOND, SECOND: self._second(data), "budget": 1.0, "draw": 0},
                needs=needs,
                work=_work(config, own["train"], own["validation"]),
            )

    def _second(self, data: Data) -> dict[str, Any]:
        return {"columns": list(data.multilabel), "labels": self.prints[data.name].get(SECOND)}

    def _start(self, data: Data, method: str, seed: int) -> dict[str, str]:
        """What the encoder is, as settings: a run's hash, or an architecture of random weights."""
        if method == RANDOM:
            return {"arch": self.study.grid.arch}
        return {"pretrain": self.cells[pretrain_id(data, method, seed)].hash}

    def _needs(self, data: Data, method: str, seed: int) -> tuple[str, ...]:
        return () if method in (RANDOM, SCRATCH) else (pretrain_id(data, method, seed),)

    def _add(
        self, cell_id: str, kind: Kind, settings: dict[str, Any], needs: tuple[str, ...] = (), work: float = 1.0
    ) -> Cell:
        cell = Cell(id=cell_id, kind=kind, settings=settings | {"revision": REVISIONS[kind]}, needs=needs, work=work)
        self.cells[cell_id] = cell
        return cell


def pretrain_id(data: Data, method: str, seed: int) -> str:
    """The cell that pretrains."""
    return f"{data.name}.pretrain.{method}.s{seed}"


def finetune_id(data: Data, target: str, method: str, mode: str, seed: int, budget: float, draw: int) -> str:
    """The cell that fine-tunes; of the second target it says so."""
    second = "" if target == data.label else ".multilabel"
    return f"{data.name}.finetune{second}.{method}.{mode}.s{seed}.b{budget:g}.d{draw}"


def pretrain_config(study: Study, data: Data, method: str, manifest: Path, out: Path) -> Config:
    """The run that pretrains `method` on the images that the file `manifest` lists; its seed is still to be set."""
    config = find(recipe_name(data.recipe, method, small=data.small))(data.images, out)
    config = dataclasses.replace(
        config,
        # Of small sets, what decodes makes no difference in speed; on every machine it is to be the same.
        data=dataclasses.replace(config.data, labels=manifest, workers=1, loader="pillow"),
        run=dataclasses.replace(
            config.run,
            knn_every=0,
            keep_checkpoints=1,
            resume=True,
            device=study.grid.device,
            # "auto" would be another on another machine, under one hash.
            precision="fp32",
        ),
        views=dataclasses.replace(config.views, size=data.size),
        model=dataclasses.replace(config.model, arch=study.grid.arch),
    )
    for table, where in ((study.pretrain, "[pretrain]"), (data.pretrain, f"[[data]] {data.name}: pretrain")):
        config = apply(config, of_one(table, method, METHODS, where), f"{study.file} {where}")
    return config


def _pretrain_settings(config: Config) -> dict[str, Any]:
    """What of a run's configuration its result depends on, as plain JSON."""
    plain = to_json(config)
    without = _NOT_OF_METHOD[config.loss.method] | NOT_SETTINGS
    if config.loss.objective == "barlow-twins":
        without -= _OF_BARLOW - {"projector_width"}
    groups = ("run", "views", "model", "loss", "optim")
    settings = {
        group: {k: v for k, v in plain[group].items() if k not in without and (k not in _LATER or v != _LATER[k])}
        for group in groups
    }
    # Likewise of the data.
    return settings if config.data.pairs == "image" else settings | {"data": {"pairs": config.data.pairs}}


def pretraining_views(study: Study, data: Data) -> ViewConfig:
    """The views of the domain, with what is said of them for all methods."""
    config = find(recipe_name(data.recipe, "moco", small=data.small))(data.images, Path())
    for table in (study.pretrain, data.pretrain):
        config = apply(config, {name: value for name, value in table.items() if name not in METHODS}, str(study.file))
    return dataclasses.replace(config.views, size=data.size)


def evaluation_resize(study: Study, data: Data) -> float:
    """What of its size an image's shorter side is resized to before its centre is evaluated: as of the views."""
    resize = pretraining_views(study, data).resize
    return 1.0 if resize is None else resize


def finetune_settings(study: Study, data: Data, mode: str, start: str) -> FinetuneConfig:
    """How a network is fine-tuned, one of random weights too: augmented as in pretraining, unless said otherwise."""
    trained = SCRATCH if start == SCRATCH else mode
    views = pretraining_views(study, data)
    tables = (study.finetuning.options, data.finetune)
    return finetune_config(tables, trained, mode=mode, arch=study.grid.arch, views=views)


def _work(config: FinetuneConfig, images: int, validation: int) -> float:
    """Images through the network and back while fine-tuning, looks at the validation images a third each."""
    per_epoch, steps = config.batches(images), config.steps(images)
    looks = steps / max(per_epoch, config.validate_every)
    back = 1.0 if config.mode != "linear" else 0.35
    return steps * images / per_epoch * back + looks * validation / 3


def _plain(config: FinetuneConfig) -> dict[str, Any]:
    """As JSON, less what the cell says itself."""
    values = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in _lists(values).items() if k not in ("mode", "arch")}


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lists(item) for name, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (tuple, list)) else value
