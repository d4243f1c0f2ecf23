"""The demo and the benchmark, whole but small. `make test-system`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.system


def run(tmp_path: Path, *command: str) -> str:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_small_demo(tmp_path: Path) -> None:
    command = ["-m", "fastmoco.cli", "demo", "--out", str(tmp_path), "--images", "240", "--epochs", "2"]
    shown = run(tmp_path, *command)
    for word in ("colour statistics", "random", "pretrained", "stage4"):
        assert word in shown
    (folder,) = tmp_path.glob("240-images*")
    made = {path.name for path in folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "curves.png", "checkpoints", "encoder.safetensors", "evaluation"} <= made
    assert "nothing to train" in run(tmp_path, *command), "a second demo does not train again"


def test_a_small_benchmark_of_the_step(tmp_path: Path) -> None:
    out = tmp_path / "step.md"
    command = ["-m", "bench.step", "--arch", "resnet18", "--size", "64", "--batch-size", "8", "--rounds", "2"]
    shown = run(tmp_path, *command, "--out", str(out))
    assert shown.index("first loss, bf16") < shown.index("pairs/s"), "parity comes before speed"
    rows = json.loads(out.with_suffix(".json").read_text())
    variants = ["paper, fp32 NCHW", "fp32 NCHW", "fp32 channels-last", "bf16 channels-last"]
    assert [row["implementation"] for row in rows] == variants
    assert all(row["loss_error"] <= 2e-2 and row["p50_ms"] > 0 and row["processor"] for row in rows)
    assert "--arch resnet18" in out.read_text()
