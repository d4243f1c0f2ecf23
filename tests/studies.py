"""Small studies on drawn images, processes for them that compute nothing worth waiting for, and finished cells."""

from __future__ import annotations

import csv
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmoco.study import worker
from fastmoco.study.cell import Cell
from fastmoco.study.config import Study, read_study
from fastmoco.study.pool import Pool
from fastmoco.study.report.blocks import Block, Table, Text
from fastmoco.study.report.gather import Findings
from fastmoco.study.report.statistics import Statistics
from fastmoco.study.store import Store
from fastmoco.study.work import compute
from fastmoco.study.work.encoders import encoder_file
from fastmoco.study.work.numbers import pack

# Test images of the cells that `Cells` makes up, and their classes.
IMAGES = 40
TRUTH = np.arange(IMAGES) % 2

SETTINGS = """
[study]
out = "out"
seeds = [0]
budgets = [0.4, 1.0]
device = "cpu"
{study}

[[data]]
name = "drawn"
images = "images"
labels = "labels.csv"
label = "kind"
multilabel = ["round", "dark"]
size = 32
recipe = "histology"

[pretrain]
steps = 2
batch_size = 8
queue_size = 16
precision = "fp32"
warmup_epochs = 0
{pretrain}

[pretrain.barlow]
projector_width = 16

[probes]
draws = 2

[finetune]
draws = 1
modes = ["full"]
epochs = 1
least_steps = 3
validate_every = 1

[report]
draws = 100
{more}
"""


def draw_study(folder: Path, *, study: str = "", pretrain: str = "", more: str = "", count: int = 48) -> Path:
    """Write study.toml and its `count` images of 36 px; return the file. The rest are lines for the tables."""
    rng = np.random.default_rng(5)
    images = folder / "images"
    if not images.is_dir():
        images.mkdir(parents=True)
        rows = []
        for i in range(count):
            kind, patient = int(rng.integers(2)), i // 2
            coarse = rng.integers(60, 180, (6, 6, 3)).astype(np.float64)
            coarse[..., 0] += 30 * kind
            Image.fromarray(coarse.astype(np.uint8)).resize((36, 36)).save(images / f"{i:03d}.png")
            split = "test" if patient % 3 == 2 else "train"
            drawn = {"round": int(rng.integers(2)), "dark": int(rng.integers(2))}
            rows.append({"file": f"{i:03d}.png", "patient": f"p{patient}", "split": split, "kind": kind, **drawn})
        with (folder / "labels.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    file = folder / "study.toml"
    file.write_text(SETTINGS.format(study=study, pretrain=pretrain, more=more))
    return file


def be_quick(study: Study) -> None:
    """From now on, in this process, a cell's result is its own name; files in the study's folder "ways" say otherwise.

    "ways/ID" holds "fail", "die" or "sleep SECONDS"; "ways/log" gets the name of each cell that is computed.
    """
    ways = study.out / "ways"

    def compute_quickly(cell: Cell, context: object, needed: dict[str, Cell]) -> dict[str, str]:
        with (ways / "log").open("a") as log:
            log.write(f"{cell.id}\n")
        way = (ways / cell.id).read_text().split() if (ways / cell.id).is_file() else []
        if way[:1] == ["fail"]:
            raise RuntimeError("it was to fail")
        if way[:1] == ["die"]:
            os._exit(7)
        if way[:1] == ["sleep"]:
            time.sleep(float(way[1]))
        if cell.kind == "pretrain":
            file = encoder_file(Store(study.out), cell)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        return {"name": cell.id}

    for kind in compute.WORK:
        compute.WORK[kind] = compute_quickly  # type: ignore[assignment]
    worker._Worker.trial = lambda self, size: 1e-4  # type: ignore[method-assign]


def serve_quickly(connection: Connection, study: Study, device: str) -> None:
    """As `worker.serve`, quickly."""
    be_quick(study)
    worker.serve(connection, study, device)


def serve_threads(connection: Connection, study: Study, device: str) -> None:
    """Answer a trial with the number of threads that libraries of this process were told to have."""
    connection.recv()
    connection.send(float(os.environ["OMP_NUM_THREADS"]))


class NoProcesses(Pool):
    """A pool whose cells are computed here, quickly, as soon as they are begun."""

    def __init__(self, study: Study, size: int, device: str) -> None:
        super().__init__(study, size, device)
        self._worker = worker._Worker(study, device)
        self._outcomes: list[worker.Outcome] = []

    @property
    def free(self) -> int:
        return self._size - len(self._outcomes)

    @property
    def running(self) -> list[str]:
        return [outcome.cell for outcome in self._outcomes]

    def start(self, job: worker.Job) -> None:
        self._outcomes.append(self._worker.compute(job))

    def wait(self, seconds: float) -> list[worker.Outcome]:
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def trial(self, size: int) -> float:
        return 1e-4


def outputs(seed: int, strength: float) -> dict[str, Any]:
    """Packed probabilities that tell the classes apart the better the greater `strength` is."""
    rng = np.random.default_rng(seed)
    up = 1 / (1 + np.exp(-(strength * (2 * TRUTH - 1) + rng.normal(size=IMAGES))))
    return pack(np.stack([1 - up, up], axis=1), "binary")


class Cells:
    """Finished cells of a study of `seeds` with all that a report reads of them."""

    def __init__(self, folder: Path, *, seeds: int, draws: int = 2, modes: str = '["full"]', **described: Any) -> None:
        file = draw_study(folder)
        text = file.read_text().replace("seeds = [0]", f"seeds = {list(range(seeds))}")
        text = text.replace("draws = 1\nmodes", f"draws = {draws}\nmodes")
        text = text.replace('modes = ["full"]', f"modes = {modes}")
        file.write_text(text)
        self.study = read_study(file)
        self.seeds, self.draws = seeds, draws
        self.records: dict[str, Any] = {}
        told = {"kind": "binary", "class_names": ["no", "yes"], "test": TRUTH.tolist()}
        self.add(
            "drawn.data", "data", {},
            {"targets": {"kind": told}, "test_groups": list(range(IMAGES)), "patients": None, "leaks": []} | described,
        )  # fmt: skip

    def add(self, name: str, kind: str, settings: dict[str, Any], result: dict[str, Any]) -> None:
        self.records[name] = {"kind": kind, "settings": {"data": {"name": "drawn"}} | settings, "result": result}

    def finetune(self, init: str, seed: int, draw: int, budget: float, strength: float) -> str:
        """A finished fine-tuning."""
        name = f"drawn.finetune.{init}.full.s{seed}.b{budget:g}.d{draw}"
        settings = {"init": init, "mode": "full", "seed": seed, "draw": draw, "budget": budget, "target": "kind"}
        used = {"images": 14, "used": 0.55} if budget < 1 else {"images": 26, "used": 1.0}
        own = {"budget": budget, "seed": seed, "draw": draw, "note": "", **used}
        number = 1000 * seed + 10 * draw + int(10 * budget)
        self.add(name, "finetune", settings, {"probabilities": outputs(number, strength), "budget": own})
        return name

    def all(self, **strengths: float) -> None:
        """Every fine-tuning at 0.4 and at 1, by start."""
        for init, strength in strengths.items():
            for seed in range(self.seeds):
                for draw in range(self.draws):
                    self.finetune(init, seed, draw, 0.4, strength)
                self.finetune(init, seed, 0, 1.0, strength)

    def statistics(self) -> Statistics:
        return Statistics(Findings(self.study, self.study.data[0], self.records), 100)


def texts(blocks: list[Block]) -> list[str]:
    return [block.text for block in blocks if isinstance(block, Text) and block.strong]


def table(blocks: list[Block], caption: str) -> Table:
    return next(block for block in blocks if isinstance(block, Table) and caption in block.caption)
