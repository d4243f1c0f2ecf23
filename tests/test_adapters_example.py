"""The loops in docs/adapters.md run as they stand there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.models.weights import load_encoder
from runs import draw_images

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adapters.md"
SMALL = {
    "size=64, batch_size=32": "size=32, batch_size=4, workers=0, loader='pillow'",
    "pl.Trainer(": "pl.Trainer(accelerator='cpu', enable_progress_bar=False, ",
}


def block(having: str) -> str:
    """The page's block of Python with `having` in it."""
    (code,) = (block for block in PAGE.read_text().split("```python\n")[1:] if having in block.split("```")[0])
    return code.split("```")[0]


def run(having: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the names of the page's block with `having` in it stand for, run on 12 images."""
    monkeypatch.chdir(folder)
    draw_images(folder / "IMAGES", 12)
    code = block(having)
    for large, small in SMALL.items():
        code = code.replace(large, small)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    exec(compile(code, PAGE.name, "exec"), found)
    return found


def check_encoder(backbone: torch.nn.Module) -> None:
    """backbone.pth is `backbone`, to what float64 leaves of the order of sums."""
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(
        load_encoder("backbone.pth").double()(x).embedding, backbone.double().eval()(x), rtol=1e-10, atol=1e-12
    )


def test_the_loop_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("for epoch in range(2)", tmp_path, monkeypatch)
    assert found["loss"].isfinite()
    check_encoder(found["backbone"])


def test_the_objectives_are_losses() -> None:
    names = ["z0", "z1", "query0", "key1", "query1", "key0"]
    found: dict[str, Any] = {name: torch.randn(6, 128, requires_grad=True) for name in names}
    found |= {"x0": torch.rand(6, 3, 8, 8), "x1": torch.rand(6, 3, 8, 8), "targets": torch.tensor([0, 1, 0, -1, 2, 1])}
    found |= {"backbone": torch.nn.Flatten(), "head": torch.nn.Linear(192, 128)}
    lines = block("criterion.symmetric").splitlines()
    losses = [line for line in lines if line.startswith(("NTXent", "SupCon", "Barlow", "Mixed", "criterion.s"))]
    for line in lines:
        exec(f"loss = {line}" if line in losses else line, found)
        if line in losses:
            assert found["loss"].shape == () and found["loss"].requires_grad and found["loss"].isfinite(), line
    assert len(losses) == 6


def test_the_lightning_module_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_lightning", reason="PyTorch Lightning is not installed")
    found = run("class MoCo(pl.LightningModule)", tmp_path, monkeypatch)
    model, trainer = found["model"], found["trainer"]
    state = trainer.train_dataloader.state_dict()
    assert trainer.global_step == 6 and (state["epoch"], state["batch"]) == (2, 0)
    assert [*model.stage_losses.losses] == ["layer1", "layer2", "layer3", "layer4"]
    assert all(loss.isfinite() for loss in model.stage_losses.losses.values())
    for own, average in ((model.backbone, model.backbone_momentum), (model.head, model.head_momentum)):
        for weight, followed in zip(own.parameters(), average.parameters(), strict=True):
            assert not followed.requires_grad and not torch.equal(weight, followed)
    check_encoder(model.backbone)
