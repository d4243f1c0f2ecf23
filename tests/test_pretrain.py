"""Whole runs: what they write, resuming bit for bit, stopping, failing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastmoco
from fastmoco.data.dali import dali_installed
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.models.encoder import Encoder
from fastmoco.train import pretrain as module
from fastmoco.train.config import Config
from fastmoco.train.metrics import read_rows
from fastmoco.train.opening import initial_weights
from fastmoco.train.pretrain import Stopped, pretrain
from fastmoco.train.saving import NonFiniteLoss
from fastmoco.train.stored import to_json
from fastmoco.train.trainer import Trainer
from runs import draw_images, small_config

pytestmark = pytest.mark.usefixtures("undrawn")
LOADERS = ["pillow", pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI here"))]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data"))


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """Send this process a signal in the middle of step `steps`."""
    step = Trainer.step
    count = 0

    def counted(self: Trainer, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == steps:
            os.kill(os.getpid(), number)
        step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "step", counted)


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("*.safetensors"))[-1])


def loss_columns(run: Path) -> list[dict[str, float]]:
    timed = {"pairs_per_s", "data_wait"}
    return [{k: v for k, v in row.items() if k not in timed} for row in read_rows(run / "metrics.jsonl")]


def resumed(config: Config) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.system), "fp32"])
def test_resuming_is_bit_for_bit(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str, precision: str
) -> None:
    """Stopped between two checkpoints, in the middle of an epoch, with accumulation and a short last batch."""
    settings = {"method": "barlow", "loader": loader, "precision": precision, "accumulate": 2, "drop_last": False,
                "batch_size": 5, "warmup_epochs": 1.0, "workers": 1}  # fmt: skip
    whole = small_config(images, tmp_path / "whole", **settings)
    pretrain(whole)
    broken = small_config(images, tmp_path / "broken", **settings)
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(Stopped, match="stopped at step 4 of 6"):
            pretrain(broken)
    pretrain(resumed(broken))
    expected, actual = final_tensors(whole.run.out), final_tensors(broken.run.out)
    assert expected.keys() == actual.keys()
    assert {name.split(".")[0] for name in expected} == {"module", "momentum", "queue", "rng"}
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    assert loss_columns(whole.run.out) == loss_columns(broken.run.out)
    assert len(loss_columns(whole.run.out)) == 6


def test_rows_past_the_checkpoint_are_dropped_on_resume(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(images, tmp_path / "run", log_every=1, checkpoint_every=2)
    monkeypatch.setattr(module, "save_encoder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    monkeypatch.undo()
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    checkpoints[-1].unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')
    pretrain(resumed(config))
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_sigterm_saves_too(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(2, monkeypatch, signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        pretrain(small_config(images, tmp_path / "run"))
    assert stopped.value.signal == signal.SIGTERM
    assert final_tensors(tmp_path / "run")


def test_a_finished_run_resumes_to_itself(images: Path, tmp_path: Path) -> None:
    config = small_config(images, tmp_path / "run")
    pretrain(config)
    before = final_tensors(tmp_path / "run")
    pretrain(resumed(config))
    assert all(torch.equal(value, final_tensors(tmp_path / "run")[name]) for name, value in before.items())


def test_an_existing_run_is_not_overwritten(images: Path, tmp_path: Path) -> None:
    config = small_config(images, tmp_path / "run")
    pretrain(config)
    with pytest.raises(UserError, match="pass --resume"):
        pretrain(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "resnet34"}, "--arch was narrow18, is resnet34"),
        ({"batch_size": 3}, "--batch-size was 4, is 3"),
    ],
)
def test_another_configuration_is_not_resumed(
    images: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    pretrain(small_config(images, tmp_path / "run", steps=2))
    with pytest.raises(UserError, match=message):
        pretrain(resumed(small_config(images, tmp_path / "run", steps=2, **changes)))


def test_a_run_of_before_there_was_a_choice_of_update_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(images, tmp_path / "run", update="torch")
    with monkeypatch.context() as patch:

        def without_new_fields(config: Config) -> dict[str, Any]:
            plain = to_json(config)
            del plain["optim"]["update"], plain["loss"]["queue_dtype"]
            return plain

        patch.setattr("fastmoco.train.trainer.to_json", without_new_fields)
        stop_after(4, patch)
        with pytest.raises(Stopped):
            pretrain(config)
    pretrain(resumed(small_config(images, tmp_path / "run")))
    pretrain(small_config(images, tmp_path / "whole", update="torch"))
    expected = final_tensors(tmp_path / "whole")
    for name, value in final_tensors(tmp_path / "run").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_other_images_are_not_resumed(tmp_path: Path) -> None:
    images = draw_images(tmp_path / "data", 9)
    config = small_config(images, tmp_path / "run", steps=2)
    pretrain(config)
    draw_images(tmp_path / "data", 10)
    with pytest.raises(UserError, match="none is there as it was when it was checked"):
        pretrain(resumed(config))


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step
    count = 0

    def poisoned(self: Trainer, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            self.queue.bank[0] = float("nan")
        step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "step", poisoned)
    config = small_config(images, tmp_path / "run", log_every=50, steps=20)
    with pytest.raises(NonFiniteLoss, match=r"step 5: infonce is not finite.*step-000000003\.safetensors"):
        pretrain(config)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000003.safetensors"]
    assert all(bool(torch.isfinite(v).all()) for v in final_tensors(tmp_path / "run").values() if v.is_floating_point())


def test_weights_that_overflow_are_not_saved(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite losses do not prove finite weights: the update after the last of them may have overflowed."""
    step = Trainer.step

    def poisoned(self: Trainer, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        if self.pairs == 12:
            self.module.key.backbone.conv1.weight[0, 0, 0, 0] = float("inf")

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"step 3: module\.key\.backbone\.conv1\.weight"):
        pretrain(small_config(images, tmp_path / "run"))


def test_pretraining_from_an_earlier_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(small_config(images, tmp_path / "a", steps=2))
    config = small_config(images, tmp_path / "b", steps=1, init=str(tmp_path / "a"))
    expected = fastmoco.load_encoder(tmp_path / "a").backbone.state_dict()
    capsys.readouterr()
    backbone = initial_weights(World(), config, None)
    file = tmp_path / "a" / "checkpoints" / "step-000000002.safetensors"
    said = f"starting from {file}: narrow18, 120 tensors in the layout of fastmoco, at step 2 (query.*); left out "
    assert capsys.readouterr().out.startswith(said)
    trainer = Trainer(config, precision="fp32", world=World(), backbone=backbone)
    assert initial_weights(World(1, 2), config, None) is not None and capsys.readouterr().out == ""
    for encoder in (trainer.module.query, trainer.module.key):
        assert all(torch.equal(value, expected[name]) for name, value in encoder.backbone.state_dict().items())
    with pytest.raises(UserError, match="holds a narrow18, not --arch resnet34"):
        pretrain(small_config(images, tmp_path / "c", arch="resnet34", init=str(tmp_path / "a")))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_to_begin_with_that_are_not_finite_are_named(bad: float, images: Path, tmp_path: Path) -> None:
    state = Encoder("narrow18").backbone.state_dict()
    state["layer1.0.bn1.running_var"][2] = state["layer2.0.conv1.weight"][0, 1] = bad
    torch.save(state, tmp_path / "bad.pth")
    config = small_config(images, tmp_path / "run", init=str(tmp_path / "bad.pth"))
    wanted = r"--init .*bad\.pth: NaN or infinite values in layer1\.0\.bn1\.running_var and 1 more tensors; give other"
    with pytest.raises(UserError, match=wanted):
        pretrain(config)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_bad_files_are_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = draw_images(tmp_path / "data", 9)
    (images / "000.jpg").write_bytes(b"not an image")
    pretrain(small_config(images, tmp_path / "run", steps=2))
    assert "left out 1 file, the first 000.jpg: " in capsys.readouterr().out
    assert (tmp_path / "run" / "skipped.txt").read_text().startswith("000.jpg: ")


def test_the_stored_configuration_says_what_ran(images: Path, tmp_path: Path) -> None:
    pretrain(small_config(images, tmp_path / "run", steps=1, loader="auto", precision="auto"))
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"]["loader"] == ("dali" if dali_installed() else "pillow")
    assert stored["run"]["precision"] in ("bf16", "fp32")
    assert stored["run"]["device"].startswith(("cpu", "cuda"))


def test_a_refused_resume_changes_nothing(images: Path, tmp_path: Path) -> None:
    config = small_config(images, tmp_path / "run", steps=2)
    pretrain(config)
    before = (tmp_path / "run" / "config.json").read_text()
    other = draw_images(tmp_path / "other", 10, seed=1)
    with pytest.raises(UserError, match="none is there as it was when it was checked"):
        pretrain(resumed(dataclasses.replace(config, data=dataclasses.replace(config.data, data=other))))
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_resuming_does_not_need_the_weights_it_began_with(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(small_config(images, tmp_path / "a", steps=1))
    config = small_config(images, tmp_path / "b", init=str(tmp_path / "a"))
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stopped):
            pretrain(config)
    (tmp_path / "a").rename(tmp_path / "moved")
    pretrain(resumed(config))
    assert len(loss_columns(tmp_path / "b")) == 6


def test_a_batch_of_one_is_refused_before_training(images: Path, tmp_path: Path) -> None:
    config = small_config(images, tmp_path / "run", method="mse", batch_size=1)
    with pytest.raises(UserError, match="--batch-size 1: BatchNorm"):
        pretrain(config)


def test_resuming_where_there_is_no_checkpoint_says_so(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resumed(small_config(images, tmp_path / "run", steps=1))
    pretrain(config)
    assert f"no checkpoint in {tmp_path / 'run'}: begins at step 0\n" in capsys.readouterr().out


def test_a_place_where_there_can_be_no_folder_is_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    with pytest.raises(UserError, match=r"^--out .*file/run could not be written: Not a directory \(.*file.*\)$"):
        pretrain(small_config(images, out, steps=1))


def test_images_that_fill_no_batch_are_told(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for drop_last in (True, False):
        pretrain(small_config(images, tmp_path / str(drop_last), steps=1, batch_size=5, drop_last=drop_last))
        assert ("images fill no batch and are left out of an epoch" in capsys.readouterr().out) == drop_last
