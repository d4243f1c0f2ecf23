"""The plan set beside a GPU: what is planned is what is built; without a GPU it says so."""

from __future__ import annotations

import pytest
import torch

from bench.planned import PlannedArgs, main, plan
from bench.step import StepArgs, Variant, build


@pytest.mark.parametrize("recipe", ["mocov2", "histology-barlow"])
def test_the_plan_is_of_what_is_built(recipe: str) -> None:
    args = StepArgs(recipe=recipe, arch="resnet18", size=32, batch_size=2)
    said = plan(args, "h100")
    trainer = build(args, Variant("bf16", channels_last=True))
    trained = sum(p.numel() for p in trainer.engine.trainable.values())
    assert said.counts.trained == trained
    assert said.memory["queue"] >= trainer.queue.bank.nbytes


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(PlannedArgs()) == 2
    assert "sees none here" in capsys.readouterr().err
