"""What matters in pretraining on small sets? Settings compared on training patients held out in turn."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import tyro

from bench.search_scores import FOLDS, Scores, probe, tune
from fastmoco.atomic import write_text
from fastmoco.errors import UserError
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import load_encoder
from fastmoco.study.cells import RANDOM, finetune_settings, make_cells, pretrain_id
from fastmoco.study.command import StudyArgs, compute
from fastmoco.study.config import Mode, Study, read_study
from fastmoco.study.store import Store
from fastmoco.study.typed import read_table
from fastmoco.study.work.context import Context, prepare
from fastmoco.study.work.encoders import encoder_file, is_whole, run_folder
from fastmoco.train.recipes import METHODS

BASE = "base"
SHOWN = {f"stage{s}": f"probe {s}" for s in range(1, 5)} | {"linear": "linear", "full": "tuned"}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Table [[trial]]: settings that differ from those of the study; `data` may name several sets, one trial each."""

    name: str
    """What it is called; "base" is what the others of its data are compared with."""
    data: str
    methods: tuple[str, ...] = METHODS
    """Those of a study, and random: no pretraining."""
    seed: int = 0
    tuned: tuple[Mode, ...] = ()
    """What is fine-tuned besides the probes; those are left out where the encoder is the base's."""
    pretrain: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class SearchArgs:
    """Pretrain with other settings than a study's, and score what comes of it without its test images.

    Scores are AUCs on training patients who are held out in turn, a fifth each: of linear probes on each stage, and of
    fine-tuning. No test image is looked at."""

    config: tyro.conf.Positional[Path] = Path("bench/search.toml")
    """TOML file with the study that the trials differ from, a folder, and the tables [[trial]]."""
    only: tuple[str, ...] = ()
    """Trials whose DATA.NAME match one of these patterns (* and ?); all if not given."""
    again: bool = False
    """Score also what is scored."""
    draws: int = 5
    """Draws of the labels for probes at budgets below 1; fine-tuning has one."""
    out: Path = Path("docs/results/search.json")
    """Results so far, to which those of this run are added; a table goes beside it, as Markdown."""


def changed(study: Study, trial: Trial, out: Path) -> Study:
    """`study` with the settings of `trial`, of its data alone."""
    data = study.named(trial.data)
    data = replace(data, pretrain=_over(data.pretrain, trial.pretrain), finetune=_over(data.finetune, trial.finetune))
    methods = tuple(method for method in METHODS if method in trial.methods)
    grid = replace(study.grid, out=out / f"{trial.data}.{trial.name}", methods=methods, seeds=(trial.seed,), jobs=1)
    return replace(study, grid=grid, data=(data,))


def _over(table: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with what `other` says over it, tables in tables too."""
    merged = dict(table)
    for name, value in other.items():
        merged[name] = _over(merged.get(name, {}), value) if isinstance(value, dict) else value
    return merged


def pretrained(study: Study, trial: Trial, config: Path, folders: Iterable[Path]) -> dict[str, Encoder]:
    """The encoders of a trial by method: from other `folders` where the same was pretrained there, else made now."""
    store = Store(study.out)
    store.make()
    data = study.data[0]
    cells = make_cells(study, {data.name: prepare(study, data).print})
    wanted = {method: cells[pretrain_id(data, method, trial.seed)] for method in study.grid.methods}
    for cell, folder in product(wanted.values(), folders):
        other = Store(folder)
        if folder != study.out and not is_whole(store, cell) and is_whole(other, cell):
            shutil.copytree(run_folder(other, cell), run_folder(store, cell), dirs_exist_ok=True)
            shutil.copyfile(other.path(cell.id), store.path(cell.id))
    if not all(is_whole(store, cell) for cell in wanted.values()):
        names = tuple(cell.id for cell in wanted.values())
        compute(study, StudyArgs(config=config, only=names, report="none"))
    encoders: dict[str, Encoder] = {}
    encoders |= {m: load_encoder(encoder_file(store, cell)) for m, cell in wanted.items() if is_whole(store, cell)}
    if RANDOM in trial.methods:
        encoders[RANDOM] = Encoder(study.grid.arch, seed=trial.seed)
    return encoders


def scored(study: Study, trial: Trial, method: str, encoder: Encoder, draws: int) -> dict[str, Scores]:
    """By budget, the scores on each fold."""
    data, store = study.data[0], Store(study.out)
    prepared = prepare(study, data)
    prepared.write(store, data)
    context = Context(study, data, store, "cpu", prepared.print)
    budgets = study.grid.budgets
    found: dict[str, Scores] = {f"{budget:g}": {} for budget in budgets}
    if trial.pretrain or trial.name == BASE:
        sets = context.images.features(encoder, device="cpu")
        sets = {name: values for name, values in sets.items() if name in SHOWN}
        for budget in budgets:
            found[f"{budget:g}"] |= probe(context, sets, budget, draws)
    for mode, budget in product(trial.tuned, budgets):
        if budget < 1:
            settings = finetune_settings(study, data, mode, method)
            found[f"{budget:g}"][mode] = tune(context, encoder, settings, budget, 1, seed=trial.seed)
    return found


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown, a table for each set of images."""
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        every = {(b, name) for row in own for b, scores in row["scores"].items() for name in scores}
        shown = [(b, n) for b in sorted({b for b, _ in every}, key=float) for n in SHOWN if (b, n) in every]
        head = [f"{SHOWN[name]}, {float(budget):.0%}" for budget, name in shown]
        lines += [
            "",
            f"## {data}",
            "",
            f"| trial | method | {' | '.join(head)} |",
            "|---" * (2 + len(head)) + "|",
        ]
        for row in own:
            base = next((r for r in own if r["trial"] == BASE and r["method"] == row["method"]), None)
            cells = (_score(row, base, budget, name) for budget, name in shown)
            lines.append(f"| {row['trial']} | {row['method']} | {' | '.join(cells)} |")
    return lines


def _score(row: Row, base: Row | None, budget: str, name: str) -> str:
    """The mean AUC; how many points that is above the base's, and on how many folds it is above."""
    own = row["scores"].get(budget, {}).get(name)
    other = None if base is None else base["scores"].get(budget, {}).get(name)
    if own is None:
        return "-"
    if other is None or row is base:
        return f"{mean(own):.3f}"
    better = sum(a > b for a, b in zip(own, other, strict=True))
    return f"{mean(own):.3f} ({100 * (mean(own) - mean(other)):+.1f}, {better}/{FOLDS})"


def main(args: SearchArgs) -> int:
    """Compute what is left of the trials, and write their scores; the exit status."""
    text = tomllib.loads(args.config.read_text(encoding="utf-8"))
    study = read_study(args.config.parent / text["study"])
    folder = args.config.parent / text["out"]
    trials = [
        read_table(Trial, entry | {"data": data}, f"{args.config} [[trial]]")
        for entry in text["trial"]
        for data in ([entry["data"]] if isinstance(entry["data"], str) else entry["data"])
    ]
    chosen = [t for t in trials if not args.only or any(fnmatchcase(f"{t.data}.{t.name}", p) for p in args.only)]
    if not chosen:
        raise UserError(f"--only: there are {', '.join(f'{t.data}.{t.name}' for t in trials)}")
    order = {(t.data, t.name): place for place, t in enumerate(trials)}
    for trial in chosen:
        own = changed(study, trial, folder)
        missing = [m for m in trial.methods if args.again or (trial.data, trial.name, m) not in _stored(args.out)]
        if not missing:
            continue
        encoders = pretrained(own, trial, args.config, [study.out, *sorted(folder.glob("*"))])
        for method in missing:
            if method not in encoders:
                print(f"{trial.data}.{trial.name} {method}: not pretrained", file=sys.stderr)
                continue
            said = {k: v for k, v in trial.pretrain.items() if not isinstance(v, dict) or k == method}
            row = {"data": trial.data, "trial": trial.name, "method": method, "seed": trial.seed, "pretrain": said}
            row |= {"finetune": trial.finetune, "scores": scored(own, trial, method, encoders[method], args.draws)}
            # Several may search at once.
            rows = _stored(args.out) | {(trial.data, trial.name, method): row}
            listed = sorted(rows.values(), key=lambda r: order.get((r["data"], r["trial"]), len(order)))
            write_text(args.out, json.dumps(listed, indent=1) + "\n")
            head = f"# What matters on small sets\n\n`python -m bench.search {args.config}`\n\n{text.get('note', '')}"
            write_text(args.out.with_suffix(".md"), "\n".join([head, *table(listed)]) + "\n")
            print(f"{trial.data}.{trial.name} {method}: done", flush=True)
    return 0


def _stored(out: Path) -> dict[tuple[str, str, str], Row]:
    rows = json.loads(out.read_text()) if out.is_file() else []
    return {(row["data"], row["trial"], row["method"]): row for row in rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        sys.exit(main(tyro.cli(SearchArgs, prog="python -m bench.search")))
    except UserError as error:
        sys.exit(f"error: {error}")
