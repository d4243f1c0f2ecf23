"""What needs no network: colour statistics and gray pixels, probed as encoders' features are."""

from __future__ import annotations

from typing import Any

from fastmoco.evaluate.baselines import colour_statistics, gray_pixels
from fastmoco.study.cell import Cell
from fastmoco.study.work.context import Context
from fastmoco.study.work.probing import probe_all

COLOUR, GRAY = "colour statistics", "gray pixels"


def run(cell: Cell, context: Context, needed: dict[str, Cell]) -> dict[str, Any]:
    """{"probes", "budgets"}, with the label draws of every seed.

    With all labels they are fitted on the validation images too: what is to be beaten has every label there is.
    """
    sets = {COLOUR: colour_statistics(context.manifest, workers=1), GRAY: gray_pixels(context.manifest, workers=1)}
    probes, budgets = [], []
    for seed in cell.settings["seeds"]:
        found, said = probe_all(cell, context, sets, seed, whole=True)
        probes += found
        budgets += said
    return {"probes": probes, "budgets": budgets}
