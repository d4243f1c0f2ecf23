"""What matters in pretraining on small sets? Settings compared by their scores on validation patients alone."""

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

import tyro

from fastmoco.atomic import write_text
from fastmoco.errors import UserError
from fastmoco.study.cells import make_cells
from fastmoco.study.command import StudyArgs, compute
from fastmoco.study.config import SCRATCH, Mode, Study, StudyMethod, read_study
from fastmoco.study.store import Store
from fastmoco.study.typed import read_table
from fastmoco.study.work.context import prepare
from fastmoco.study.work.encoders import is_whole, run_folder

BASE = "base"
STAGES = ("stage1", "stage2", "stage3", "stage4")
SHOWN = {"stage1": "probe 1", "stage4": "probe 4", "linear": "linear", "full": "tuned"}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Table [[trial]]: settings that differ from those of the study; `data` may name several sets, one trial each."""

    name: str
    """What it is called; "base" is what the others of its data are compared with."""
    data: str
    methods: tuple[StudyMethod, ...] = ("moco", "mse", "barlow")
    seeds: tuple[int, ...] = (0,)
    modes: tuple[Mode, ...] = ("full",)
    """What is fine-tuned."""
    pretrain: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class SearchArgs:
    """Pretrain with other settings than a study's, and score what comes of it on validation patients.

    Scores are validation AUCs: of linear probes on each stage with the labels of seven draws, and of fine-tuning all
    weights. No test label is read."""

    config: tyro.conf.Positional[Path] = Path("bench/search.toml")
    """TOML file with the study that the trials differ from, a folder, and the tables [[trial]]."""
    only: tuple[str, ...] = ()
    """Trials whose DATA.NAME match one of these patterns (* and ?); all if not given."""
    jobs: int | None = None
    """Cells computed at a time; as the study says if not given."""
    out: Path = Path("docs/results/search.json")
    """Results so far, to which those of this run are added; a table goes beside it, as Markdown."""


def changed(study: Study, trial: Trial, out: Path) -> Study:
    """`study` with the settings of `trial`, of its data alone."""
    data = study.named(trial.data)
    data = replace(data, pretrain=_over(data.pretrain, trial.pretrain), finetune=_over(data.finetune, trial.finetune))
    grid = replace(study.grid, out=out / f"{trial.data}.{trial.name}", methods=trial.methods, seeds=trial.seeds)
    return replace(study, grid=grid, data=(data,))


def _over(table: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with what `other` says over it, tables in tables too."""
    merged = dict(table)
    for name, value in other.items():
        merged[name] = _over(merged.get(name, {}), value) if isinstance(value, dict) else value
    return merged


def take_encoders(study: Study, folders: Iterable[Path]) -> None:
    """Take over from other `folders` what was pretrained there with the same settings."""
    store = Store(study.out)
    store.make()
    prints = {data.name: prepare(study, data).print for data in study.data}
    for cell in make_cells(study, prints).values():
        for folder in folders if cell.kind == "pretrain" and not is_whole(store, cell) else ():
            other = Store(folder)
            if folder != study.out and is_whole(other, cell):
                shutil.copytree(run_folder(other, cell), run_folder(store, cell), dirs_exist_ok=True)
                shutil.copyfile(other.path(cell.id), store.path(cell.id))
                break


def patterns(trial: Trial, study: Study) -> tuple[str, ...]:
    """The cells that a trial takes: probes of encoders that no other has, and fine-tuning at budgets below 1."""
    small = [budget for budget in study.grid.budgets if budget < 1]
    probed = trial.methods if trial.pretrain or trial.name == BASE else ()
    probes = [f"{trial.data}.probes.{method}.s*" for method in probed if method != SCRATCH]
    each = product(trial.methods, trial.modes, small)
    return (*probes, *(f"{trial.data}.finetune.{method}.{mode}.s*.b{b:g}.d*" for method, mode, b in each))


def row_of(trial: Trial, study: Study, method: str) -> Row:
    """Mean validation AUCs over seeds and draws: "scores" by budget, of "stage1" to "stage4", "full" and "linear"."""
    store = Store(study.out)
    found: dict[str, dict[str, list[float]]] = {}
    for path in sorted(store.cells.glob(f"{trial.data}.*.json")):
        record = store.read(path.stem)
        assert record is not None
        settings = record["settings"]
        if settings.get("init") != method:
            continue
        if record["kind"] == "probes":
            for row in record["result"]["probes"]:
                if row["features"] in STAGES and row.get("validation_auc") is not None:
                    of_budget = found.setdefault(f"{row['budget']:g}", {})
                    of_budget.setdefault(row["features"], []).append(row["validation_auc"])
        else:
            of_budget = found.setdefault(f"{settings['budget']:g}", {})
            of_budget.setdefault(settings["mode"], []).append(record["result"]["validation_score"])
    return {
        "data": trial.data,
        "trial": trial.name,
        "method": method,
        "seeds": list(trial.seeds),
        "pretrain": {k: v for k, v in trial.pretrain.items() if not isinstance(v, dict) or k == method},
        "finetune": trial.finetune,
        "scores": {b: {name: round(mean(v), 4) for name, v in scores.items()} for b, scores in found.items()},
    }


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
            f"| trial | method | seeds | {' | '.join(head)} |",
            "|---" * (3 + len(head)) + "|",
        ]
        for row in own:
            base = next((r for r in own if r["trial"] == BASE and r["method"] == row["method"]), None)
            seeds = " ".join(map(str, row["seeds"]))
            cells = (_score(row, base, budget, name) for budget, name in shown)
            lines.append(f"| {row['trial']} | {row['method']} | {seeds} | {' | '.join(cells)} |")
    return lines


def _score(row: Row, base: Row | None, budget: str, name: str) -> str:
    """The AUC, and in points how much that is above the base's."""
    value = row["scores"].get(budget, {}).get(name)
    other = None if base is None else base["scores"].get(budget, {}).get(name)
    if value is None:
        return "-"
    if base is None or other is None or row is base or row["seeds"] != base["seeds"]:
        return f"{value:.3f}"
    return f"{value:.3f} ({100 * (value - other):+.1f})"


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
    rows = (
        {(r["data"], r["trial"], r["method"]): r for r in json.loads(args.out.read_text())}
        if args.out.is_file()
        else {}
    )
    status = 0
    for trial in chosen:
        own = changed(study, trial, folder)
        take_encoders(own, [study.out, *sorted(folder.glob("*"))])
        print(f"{trial.data}.{trial.name}", flush=True)
        options = StudyArgs(config=args.config, only=patterns(trial, own), report="none", jobs=args.jobs)
        if compute(own, options) == 1:
            status = 1
            continue
        rows |= {(trial.data, trial.name, method): row_of(trial, own, method) for method in trial.methods}
        order = {(t.data, t.name): place for place, t in enumerate(trials)}
        listed = sorted(rows.values(), key=lambda r: order.get((r["data"], r["trial"]), len(order)))
        write_text(args.out, json.dumps(listed, indent=1) + "\n")
        head = f"# What matters on small sets\n\n`python -m bench.search {args.config}`\n\n{text.get('note', '')}"
        write_text(args.out.with_suffix(".md"), "\n".join([head, *table(listed)]) + "\n")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(SearchArgs, prog="python -m bench.search")))
    except UserError as error:
        sys.exit(f"error: {error}")
