"""Pretraining as a cell: a run folder of its own, its encoder and its curves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastmoco.evaluate.numbers import finite
from fastmoco.study.cell import Cell
from fastmoco.study.cells import pretrain_config
from fastmoco.study.work.context import Context, listed_for_pretraining
from fastmoco.study.work.encoders import encoder_file, file_hash, keep_query, run_folder
from fastmoco.study.work.spent import METRICS
from fastmoco.train.curves import LOSS_TITLES
from fastmoco.train.metrics import Row, read_rows
from fastmoco.train.pretrain import pretrain

_POINTS = 100
_PLACES = 7
_CURVES = ("loss", *LOSS_TITLES, *(f"stage{s}" for s in range(1, 5)), "top1", "top5", "embedding_std")


def run(cell: Cell, context: Context, needed: dict[str, Cell]) -> dict[str, Any]:
    """{"encoder" (relative to the study), "sha256", "images", "steps", "curve": rows of means over equal parts}.

    Goes on where it was stopped.
    """
    store, out = context.store, run_folder(context.store, cell)
    file = encoder_file(store, cell)
    if not file.is_file():
        listed = listed_for_pretraining(store, context.data)
        config = pretrain_config(context.study, context.data, cell.settings["method"], listed, out)
        own = replace(config.run, seed=cell.settings["seed"], device=context.device)
        keep_query(pretrain(replace(config, run=own)))
    rows = read_rows(out / METRICS)
    return {
        "encoder": str(file.relative_to(store.out)),
        "sha256": file_hash(file),
        "images": cell.settings["data"]["train"] + cell.settings["data"]["validation"],
        "steps": rows[-1]["step"],
        "curve": thinned(rows),
    }


def thinned(rows: list[Row]) -> list[Row]:
    """At most 100 rows: the means of equal parts of `rows`, each at its last step."""
    size = -(-len(rows) // _POINTS)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    names = [name for name in _CURVES if name in rows[0]]
    return [
        {"step": part[-1]["step"], "epoch": part[-1]["epoch"]} | {n: _mean(part, n) for n in names} for part in parts
    ]


def _mean(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return finite(round(sum(values) / len(values), _PLACES)) if values else None
