"""Small images, small runs and a watch on them that several tests need."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.data.loader import Batch
from fastmoco.distributed.world import World
from fastmoco.models.resnet import ARCHS, BasicBlock
from fastmoco.ops import dispatch
from fastmoco.train.config import Config
from fastmoco.train.recipes import find
from fastmoco.train.trainer import Trainer
from objectives import TARGETS

# ResNet-18 with a quarter of its channels, and a sixteenth of its weights: all parts of it, in half of the time.
NARROW = "narrow18"
ARCHS[NARROW] = (BasicBlock, (2, 2, 2, 2), 16)

# On a GPU these wait for it: they bring a number to the host, or have a shape that depends on one. The last stands for
# Tensor.tolist and Tensor.numpy, the only ones to call it.
SYNCHRONISING = {f"aten::{name}" for name in ("item", "_local_scalar_dense", "nonzero", "masked_select", "resolve_neg")}


class NoSync(torch.profiler.profile):
    """Fails at its end if anything would have waited for a GPU, be it inside an operation, a backward or torch's C++.

    Two things go by unseen: Tensor.cpu, which does nothing on the CPU, and what C++ of fastmoco's own reads at the
    addresses it gets; `references_only` keeps that out.
    """

    def __init__(self) -> None:
        # The profiler's library announces itself on standard error, in some versions.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        super().__init__(activities=[torch.profiler.ProfilerActivity.CPU])

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        names = {event.name for event in self.events()}
        assert names, "the profiler saw nothing"
        assert not names & SYNCHRONISING, f"{sorted(names & SYNCHRONISING)} synchronises"


def references_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every operation run its reference, which is what runs on a device that Triton does not know."""
    references = {operation: {"reference": known["reference"]} for operation, known in dispatch._registry.items()}
    monkeypatch.setattr(dispatch, "_registry", references)


def draw_images(folder: Path, count: int = 24, *, seed: int = 0, side: int = 40) -> Path:
    """Write `count` coloured pictures, PNG and JPEG, with labels.csv beside them; return the folder of images."""
    rng = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        coarse = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        name = f"{i:03d}.{'png' if i % 2 else 'jpg'}"
        Image.fromarray(coarse).resize((side + i % 3, side), Image.Resampling.BICUBIC).save(images / name)
        patient = i // 2
        split = "test" if patient % 3 == 2 else "train"
        rows.append({"file": name, "patient": f"p{patient}", "split": split, "kind": patient % 2})
    with (folder / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return images


def small_config(data: Path, out: Path, *, method: str = "mse", **changes: Any) -> Config:
    """A run of seconds: a narrow ResNet-18 at 32 px, batch 4; `changes` set any field by its name."""
    defaults: dict[str, Any] = {
        "size": 32, "arch": NARROW, "dim": 16, "queue_size": 19, "projector_width": 24, "batch_size": 4,
        "steps": 6, "epochs": 100, "log_every": 2, "checkpoint_every": 3, "knn_every": 0, "precision": "fp32",
        "loader": "torchvision", "workers": 0,
    }  # fmt: skip
    # Stage losses and views as in the paper: heavier losses part curves in float32 sooner.
    config, paper = (find(f"histology-{method}{end}")(data, out) for end in ("-small", ""))
    stage_loss = {name: getattr(paper.loss, name) for name in ("stage_weight", "barlow_scale", "barlow_off_diagonal")}
    config = replace(config, views=paper.views, loss=replace(config.loss, **stage_loss))
    changes = defaults | changes
    groups = {}
    for group in ("data", "run", "views", "model", "loss", "optim"):
        section = getattr(config, group)
        groups[group] = replace(section, **{k: changes.pop(k) for k in list(changes) if hasattr(section, k)})
    assert not changes, f"no such field: {sorted(changes)}"
    return replace(config, **groups)


# Divisible by 1, 2, 3 and 4.
BATCH = 12


def shared_trainer(world: World, method: str, **changes: Any) -> Trainer:
    """A trainer of one process of `world`, narrow ResNet-18, 32 px; `changes` as small_config's, or engine "zero2"."""
    settings = {"batch_size": BATCH, "log_every": 99, "lr": 0.05, "warmup_epochs": 0.0, "queue_size": 31} | changes
    if method == "barlow":
        settings |= {"barlow_correlation": "global"}
    engine = settings.pop("engine", "auto")
    if engine.startswith("zero"):
        settings |= {"engine": "deepspeed", "zero": int(engine[-1])}
    else:
        settings["engine"] = engine
    config = small_config(Path(), Path(), method=method, **settings)
    targets = TARGETS if config.loss.objective == "supcon" else None
    t = Trainer(config, precision=config.run.precision, world=world, targets=targets)
    # Residual branches start at zero, and with them most gradients: not a test.
    start = {name: value.clone() for name, value in t.engine.state().items()}
    generator = torch.Generator().manual_seed(9)
    for name, value in start.items():
        if name.startswith("module.query") and value.ndim == 1:
            value += 0.2 * torch.rand(value.shape, generator=generator, dtype=value.dtype).to(value.device)
    t.engine.load(start)
    return t


def shared_batch(world: World, seed: int, n: int = BATCH, side: int = 32) -> Batch:
    """This process's rows of the batch that all of them share."""
    generator = torch.Generator().manual_seed(seed)
    rows = slice(world.rank * n // world.size, (world.rank + 1) * n // world.size)
    q, k = (torch.rand(n, 3, side, side, generator=generator).half()[rows] for _ in range(2))
    nhwc = torch.channels_last
    return Batch(q.contiguous(memory_format=nhwc), k.contiguous(memory_format=nhwc), np.arange(n)[rows])
