"""The encoders that cells begin with: those of finished pretrainings, with their heads, and random ones."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import CHECKPOINTS, QUERY, load_encoder, read_weights, write_weights
from fastmoco.study.cell import Cell
from fastmoco.study.cells import RANDOM, pretrain_id
from fastmoco.study.config import SCRATCH
from fastmoco.study.store import Store
from fastmoco.study.work.context import Context

_OF_QUERY = "module.query."


def run_folder(store: Store, cell: Cell) -> Path:
    """Where `cell` pretrains: a folder of its settings, so that others never go on in it."""
    return store.runs / f"{cell.id}-{cell.hash[:10]}"


def encoder_file(store: Store, cell: Cell) -> Path:
    """The encoder, head included, that `cell` pretrained."""
    return run_folder(store, cell) / QUERY


def is_whole(store: Store, cell: Cell) -> bool:
    """Whether `cell` is finished, and if it pretrains has its encoder still."""
    return store.finished(cell) is not None and (cell.kind != "pretrain" or encoder_file(store, cell).is_file())


def keep_query(run: Path) -> Path:
    """Keep of the newest checkpoint of a finished `run` the query encoder alone, a tenth of its size; return its file.

    The checkpoints are removed.
    """
    newest = max((run / CHECKPOINTS).glob("step-*.safetensors"))
    tensors, meta = read_weights(newest)
    query = {name: value for name, value in tensors.items() if name.startswith(_OF_QUERY)}
    write_weights(run / QUERY, query, {"step": meta["step"], "config": meta["config"]})
    shutil.rmtree(run / CHECKPOINTS)
    return run / QUERY


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_start(context: Context, init: str, seed: int, needed: dict[str, Cell]) -> Encoder:
    """The encoder `init` of `seed`: random weights, from scratch too, or those of the pretraining among `needed`.

    Raises UserError where its file is missing or damaged.
    """
    if init in (RANDOM, SCRATCH):
        return Encoder(context.study.grid.arch, seed=seed)
    return load_encoder(encoder_file(context.store, needed[pretrain_id(context.data, init, seed)]))
