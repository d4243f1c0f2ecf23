"""What matters in pretraining on small sets? Settings compared on training patients held out in turn."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from bench.command import start
from bench.search_results import SHOWN, Results, Row
from bench.search_scores import Scores, known_features, labelled, probe, tune
from fastmoco.device import device_name, find_device
from fastmoco.errors import UserError
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import load_encoder
from fastmoco.study.cell import digest
from fastmoco.study.cells import finetune_settings, make_cells, pretrain_id
from fastmoco.study.command import StudyArgs, compute
from fastmoco.study.config import Mode, Study, read_study
from fastmoco.study.overrides import check_finetune, check_pretrain, recipe_name
from fastmoco.study.store import Store
from fastmoco.study.typed import read_table
from fastmoco.study.work.context import Context, prepare
from fastmoco.study.work.encoders import encoder_file, is_whole, run_folder
from fastmoco.train.recipes import METHODS

BASE = "base"
Start = Literal["random", "moco", "mse", "barlow"]
# Raised where the scores of the same settings become others.
REVISION = 1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Table [[trial]]: settings that differ from those of the study."""

    name: str
    """What it is called."""
    data: tuple[str, ...]
    """Sets of images, each a trial of its own."""
    than: str = BASE
    """The trial that it is compared with, of the same method where that has it, else of MoCo."""
    methods: tuple[Start, ...] = METHODS
    """random: no pretraining."""
    seed: int = 0
    tuned: tuple[Mode, ...] = ()
    """What is fine-tuned, at budgets below 1, besides the probes."""
    pretrain: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)

    @property
    def probed(self) -> bool:
        """Whether the encoder is one that no other trial has probed."""
        return bool(self.pretrain or self.seed or self.name == BASE)


@dataclass(frozen=True, kw_only=True)
class Search:
    """The file's head: the study that trials differ from, the folder of their runs, and what the table is to say."""

    study: str
    out: str
    note: str = ""


@dataclass(kw_only=True, slots=True)
class SearchArgs:
    """Pretrain with other settings than a study's, and score what comes of it without its test images.

    Scores are AUCs on training patients who are held out in turn, a fifth each: of linear probes on each stage, and of
    fine-tuning. What is scored is not computed again while its settings are the same. No test image enters a score."""

    config: tyro.conf.Positional[Path] = Path("bench/search.toml")
    """TOML file with the keys study, out and note, and the tables [[trial]]."""
    only: tuple[str, ...] = ()
    """Trials whose DATA.NAME match one of these patterns (* and ?); all if not given."""
    draws: int = 5
    """Draws of the labels for probes at budgets below 1; fine-tuning has one."""
    out: Path = Path("docs/results/search.json")
    """Results so far, to which those of this run are added; a table goes beside it, as Markdown."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 ... or auto, which takes a GPU where there is one."""


def read_trials(file: Path) -> tuple[Search, Study, list[Trial]]:
    """What the `file` holds, the study that it names, and its trials, one for each set of images.

    Raises UserError, naming file and table, for what cannot be read or is not known.
    """
    try:
        head = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    entries = head.pop("trial", [])
    search = read_table(Search, head, str(file))
    study, trials = read_study(file.parent / search.study), []
    for entry in entries:
        where = f"{file} [[trial]] {entry.get('name', '')}"
        data = entry.get("data", [])
        trial = read_table(Trial, entry | {"data": [data] if isinstance(data, str) else data}, where)
        check_finetune(trial.finetune, f"{where}: finetune")
        for name in trial.data:
            if name not in [own.name for own in study.data]:
                raise UserError(f"{where}: data: the study has no {name!r}")
            for method in set(trial.methods) & set(METHODS):
                own = study.named(name)
                recipe = recipe_name(own.recipe, method, small=own.small)
                check_pretrain(recipe, method, trial.pretrain, f"{where}: pretrain")
            trials.append(replace(trial, data=(name,)))
    return search, study, trials


class Candidate:
    """A trial of one set of images: its study, its cells and its encoders."""

    def __init__(self, study: Study, trial: Trial, folder: Path, config: Path, device: str = "cpu") -> None:
        data = study.named(trial.data[0])
        pretrain, finetune = _over(data.pretrain, trial.pretrain), _over(data.finetune, trial.finetune)
        self.data = replace(data, pretrain=pretrain, finetune=finetune)
        methods = tuple(method for method in METHODS if method in trial.methods)
        grid = replace(
            study.grid,
            out=folder / f"{data.name}.{trial.name}",
            methods=methods,
            seeds=(trial.seed,),
            jobs=1,
            device=device,
        )
        self.study, self.trial, self.config = replace(study, grid=grid, data=(self.data,)), trial, config
        self.store = Store(grid.out)
        self.store.make()
        self.prepared = prepare(self.study, self.data)
        self.prepared.write(self.store, self.data)
        self.context = Context(self.study, self.data, self.store, device, self.prepared.print)
        cells = make_cells(self.study, {data.name: self.prepared.print})
        self.cells = {method: cells[pretrain_id(data, method, trial.seed)] for method in methods}

    def settings(self, method: str, draws: int) -> str:
        """A hash of all that the scores of `method` depend on."""
        start = self.cells[method].hash if method in self.cells else self.study.grid.arch
        tuned = {mode: asdict(finetune_settings(self.study, self.data, mode, method)) for mode in self.trial.tuned}
        identity = {name: self.prepared.print[name] for name in ("images", "splits", "label", "patients")}
        budgets = list(self.study.grid.budgets)
        said = [start, self.trial.seed, tuned, identity, self.data.size, self.trial.probed, budgets, draws, REVISION]
        return digest(json.loads(json.dumps(said)))

    def encoder(self, method: str, folders: Iterable[Path]) -> Encoder | None:
        """Of random weights, or pretrained: in one of the other `folders` with the same settings, else now. None where
        that failed."""
        if method not in self.cells:
            return Encoder(self.study.grid.arch, seed=self.trial.seed)
        cell = self.cells[method]
        for other in map(Store, folders):
            if other.out != self.store.out and not is_whole(self.store, cell) and is_whole(other, cell):
                shutil.copytree(run_folder(other, cell), run_folder(self.store, cell), dirs_exist_ok=True)
                shutil.copyfile(other.path(cell.id), self.store.path(cell.id))
        if not is_whole(self.store, cell):
            compute(self.study, StudyArgs(config=self.config, only=(cell.id,), report="none"))
        return load_encoder(encoder_file(self.store, cell)) if is_whole(self.store, cell) else None

    def scored(self, method: str, encoder: Encoder, draws: int) -> dict[str, Scores]:
        """By budget, the scores on each fold."""
        found: dict[str, Scores] = {f"{budget:g}": {} for budget in self.study.grid.budgets}
        if self.trial.probed:
            sets = {name: values for name, values in known_features(self.context, encoder).items() if name in SHOWN}
            for budget in self.study.grid.budgets:
                found[f"{budget:g}"] |= probe(self.context, sets, budget, draws)
        for mode, budget in product(self.trial.tuned, self.study.grid.budgets):
            if budget < 1:
                settings = finetune_settings(self.study, self.data, mode, method)
                found[f"{budget:g}"][mode] = tune(self.context, encoder, settings, budget, seed=self.trial.seed)
        return found

    def row(self, method: str, encoder: Encoder, draws: int) -> Row:
        """What is kept of the trial."""
        trial = self.trial
        said = {k: v for k, v in trial.pretrain.items() if not isinstance(v, dict) or k == method}
        row = {"data": self.data.name, "trial": trial.name, "than": trial.than, "method": method, "seed": trial.seed}
        row["device"] = device_name(self.context.device)
        row |= {"pretrain": said, "finetune": trial.finetune, "settings": self.settings(method, draws)}
        row["labels"] = {f"{budget:g}": labelled(self.context, budget) for budget in self.study.grid.budgets}
        return row | {"scores": self.scored(method, encoder, draws)}


def _over(table: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with what `other` says over it, tables in tables too."""
    merged = dict(table)
    for name, value in other.items():
        merged[name] = _over(merged.get(name, {}), value) if isinstance(value, dict) else value
    return merged


def main(args: SearchArgs) -> int:
    """Compute what is left of the trials, and write their scores; 1 where one could not be pretrained, else 0."""
    search, study, trials = read_trials(args.config)
    folder = args.config.parent / search.out
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{trial.data[0]}.{trial.name}" for trial in trials]
    chosen = [
        t
        for t, name in zip(trials, names, strict=True)
        if not args.only or any(fnmatchcase(name, p) for p in args.only)
    ]
    if not chosen:
        raise UserError(f"--only: there are {', '.join(names)}")
    head = f"# What matters on small sets\n\n`python -m bench.search {args.config}`\n\n{search.note}"
    shown = [(trial.data[0], trial.name) for trial in trials]
    results, status, device = Results(args.out, shown, folder / "lock", head), 0, str(find_device(args.device))
    for trial in chosen:
        candidate = Candidate(study, trial, folder, args.config, device)
        for method in trial.methods:
            if results.has(trial.data[0], trial.name, method, candidate.settings(method, args.draws)):
                continue
            encoder = candidate.encoder(method, [study.out, *sorted(folder.glob("*.*"))])
            if encoder is None:
                print(f"{trial.data[0]}.{trial.name} {method}: not pretrained", file=sys.stderr)
                status = 1
                continue
            results.add(candidate.row(method, encoder, args.draws))
            print(f"{trial.data[0]}.{trial.name} {method}: done", flush=True)
    return status


if __name__ == "__main__":
    torch.set_num_threads(1)
    start(main, SearchArgs, "search")
