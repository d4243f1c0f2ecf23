"""A small run of several processes that something befalls, and what it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastmoco.train.metrics import read_rows

STEPS, EVERY = 30, 5


def command(images: Path, out: Path, *more: str) -> list[str]:
    # 12 images can be shared out among 1, 2, 3 and 4 processes, whose number then makes no difference but rounding.
    return [
        "pretrain", "histology-barlow-small", "--data", str(images), "--out", str(out), "--resume",
        "--loader", "pillow", "--arch", "resnet18", "--size", "32", "--dim", "32", "--batch-size", "12",
        "--queue-size", "31", "--projector-width", "64", "--steps", str(STEPS), "--log-every", "1",
        "--checkpoint-every", str(EVERY), "--workers", "1", "--precision", "fp32", "--norm", "sync",
        "--barlow-correlation", "global", *more,
    ]  # fmt: skip


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*.safetensors"))


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def done(out: Path) -> int:
    return len(read_rows(out / "metrics.jsonl"))


def losses(out: Path) -> list[dict[str, Any]]:
    timed = {"pairs_per_s", "data_wait"}
    return [{k: v for k, v in row.items() if k not in timed} for row in read_rows(out / "metrics.jsonl")]
