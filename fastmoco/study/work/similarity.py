"""How alike two encoders of one seed are, stage by stage, or one's stages: CKA on the test images."""

from __future__ import annotations

from typing import Any

from fastmoco.evaluate.cka import cka_matrix, unbiased_for
from fastmoco.evaluate.numbers import finite
from fastmoco.study.cell import Cell
from fastmoco.study.work.context import Context
from fastmoco.study.work.encoders import load_start

STAGES = ("stage1", "stage2", "stage3", "stage4")
KERNELS = ("linear", "rbf", "paper")


def run(cell: Cell, context: Context, needed: dict[str, Cell]) -> dict[str, Any]:
    """{"pairs": rows {"a", "b", "kernel", "rows", "columns", "values"}}, one a kernel: unbiased CKA of the first
    encoder's stages with the last's, which is itself where the cell has one."""
    seed = cell.settings["seed"]
    pictures = context.images.select(context.splits.test)
    sets = {}
    for init in cell.settings["inits"]:
        features = pictures.features(load_start(context, init, seed, needed), device=context.device)
        sets[init] = {stage: features[stage] for stage in STAGES}
    names = list(sets)
    return {"pairs": [_pair(sets, names[0], names[-1], kernel) for kernel in KERNELS]}


def _pair(sets: dict[str, Any], a: str, b: str, kernel: Any) -> dict[str, Any]:
    images = len(next(iter(sets[a].values())))
    found = cka_matrix(sets[a], sets[b], kernel=kernel, estimator=unbiased_for(images))
    values = [[finite(round(float(v), 6)) for v in row] for row in found.values]
    return {
        "a": a,
        "b": b,
        "kernel": kernel,
        "rows": list(found.rows),
        "columns": list(found.columns),
        "values": values,
    }
