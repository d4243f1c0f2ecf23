"""What a run imports, which is what it starts with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastmoco.ops import dispatch
from runs import draw_images

RUN = """
import sys
from fastmoco.cli import main
main()
print("imported:", *sorted(sys.modules))
"""
# Seconds of every start each (torch's compiler two), and for nothing.
LEFT_OUT = {"torch._dynamo", "torch._inductor", "torchvision", "triton", "deepspeed", "sklearn", "scipy", "lightly"}


@pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
def test_a_run_imports_nothing_large_that_it_does_not_use(tmp_path: Path) -> None:
    images = draw_images(tmp_path, 8)
    options = f"--data {images} --out {tmp_path}/run --arch resnet18 --size 32 --batch-size 4 --queue-size 8"
    command = [sys.executable, "-c", RUN, "pretrain", "mocov2-small", *options.split(), "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.partition("imported:")[2].split())
    assert {"torch", "fastmoco.train.trainer"} <= imported
    assert not LEFT_OUT & imported
