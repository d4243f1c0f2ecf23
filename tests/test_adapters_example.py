"""The loop in docs/adapters.md runs as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmoco.models.weights import load_encoder
from runs import draw_images

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adapters.md"


def test_the_loop_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "IMAGES", 12)
    (loop,) = (block for block in PAGE.read_text().split("```python\n") if "for epoch in range(2)" in block)
    code = loop.split("```")[0].replace("size=64, batch_size=32", "size=32, batch_size=4, workers=0, loader='pillow'")
    torch.manual_seed(0)
    found: dict[str, object] = {}
    exec(compile(code, PAGE.name, "exec"), found)
    loss = found["loss"]
    assert isinstance(loss, torch.Tensor) and loss.isfinite()
    encoder = load_encoder("backbone.pth")
    backbone = found["backbone"]
    assert isinstance(backbone, torch.nn.Module)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(encoder(x).embedding, backbone.eval()(x))
