"""One cell, computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastmoco.study.cell import Cell, Kind
from fastmoco.study.work import baselines, data, finetune, pretrain, probes, similarity
from fastmoco.study.work.context import Context

Work = Callable[[Cell, Context, dict[str, Cell]], dict[str, Any]]
"""Takes the cell, what it shares with others, and the cells that it needs; returns its result as plain JSON."""

WORK: dict[Kind, Work] = {
    "data": data.run,
    "baselines": baselines.run,
    "pretrain": pretrain.run,
    "probes": probes.run,
    "similarity": similarity.run,
    "finetune": finetune.run,
}
