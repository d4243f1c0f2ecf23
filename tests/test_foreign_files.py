"""Files of others that wrap the backbone, keep more beside it, or are none that can be read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fastmoco.adapters.accelerated import Accelerated
from fastmoco.adapters.stages import StageLosses
from fastmoco.errors import UserError
from fastmoco.models.foreign import query_backbone, read_checkpoint, state_dict_of
from fastmoco.models.weights import load_encoder

FILE = Path("x.pth")


class Plain:
    """Of a class that torch's reader does not allow."""


class Hostile:
    """What a pickle of it would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def backbone() -> nn.Module:
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    return model


def assert_same(found: dict[str, Tensor], model: nn.Module) -> None:
    wanted = model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(value, wanted[name]) for name, value in found.items())


@pytest.mark.parametrize("name, shown", [("stage_losses", "stage_losses"), ("heads_of_mine.extra", "heads_of_mine")])
@pytest.mark.parametrize("compiled", [False, True])
def test_stage_losses_of_a_module_are_passed_over(name: str, shown: str, compiled: bool) -> None:
    model = backbone()
    losses = StageLosses(model, stages=("layer1", "layer4"), kind="barlow", projector_width=8, size=32)
    beside = {f"{name}.{'_orig_mod.' * compiled}{key}": value for key, value in losses.state_dict().items()}
    assert any("loss.projectors.stage1.0.weight" in key for key in beside)
    state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    found = query_backbone(state | beside, FILE)
    assert_same(found.tensors, model)
    assert found.others == list(beside) and str(found).endswith(f"left out {len(beside)}: {shown}")


@pytest.mark.parametrize(
    "prefix", ["backbone.module.", "backbone._orig_mod.", "encoder.module.", "encoder_q._orig_mod.module.",
               "model.backbone._orig_mod.", "module.base_encoder.module.", "_orig_mod.backbone.module."]
)  # fmt: skip
def test_a_backbone_that_is_wrapped_by_itself_is_found(prefix: str) -> None:
    model = backbone()
    above = next((part for part in ("model.", "_orig_mod.", "module.") if prefix.startswith(part)), "")
    beside = {f"{above}projection_head.layers.0.weight": torch.zeros(4, 4)}
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    last = {f"{prefix}fc.weight": torch.zeros(4, 4)}
    found = query_backbone(state | last | beside, FILE)
    assert_same(found.tensors, model)
    assert len(found.others) == 2


def test_wrappers_themselves_are_read(tmp_path: Path) -> None:
    model = backbone()
    for wrapped in (Accelerated(model), nn.DataParallel(model), torch.compile(model)):
        state = nn.ModuleDict({"backbone": wrapped, "projection_head": nn.Linear(2, 2)}).state_dict()
        torch.save({"state_dict": state}, tmp_path / "x.ckpt")
        assert_same(load_encoder(tmp_path / "x.ckpt").backbone.state_dict(), model)
    # Of numbered children, as lightly's examples have them.
    children = nn.Sequential(*list(model.children())[:-1])
    found = query_backbone(nn.ModuleDict({"backbone": nn.DataParallel(children)}).state_dict(), FILE)
    assert_same(found.tensors, model)


def test_dictionaries_below_the_known_ones_are_named() -> None:
    nested = {"student": {"net.conv1.weight": torch.zeros(1)}, "epoch": 3, "teacher": {"net.conv1.weight": 1}}
    wanted = (
        "x.pth: no state dict of tensors, but dictionaries under student, teacher; save the one with the encoder's "
        "tensors by itself, or under state_dict, model, model_state_dict"
    )
    for loaded in (nested, {"state_dict": nested}):
        with pytest.raises(UserError) as caught:
            state_dict_of(loaded, FILE)
        assert str(caught.value) == wanted
    with pytest.raises(UserError, match=r"^x\.pth: not a state dict of tensors: epoch are none$"):
        state_dict_of({"epoch": 3}, FILE)


def test_files_that_are_damaged_or_no_checkpoints_say_so(tmp_path: Path) -> None:
    state = {"conv1.weight": torch.rand(300), "settings": Plain()}
    files = {"text": b"version https://git-lfs.github.com/spec/v1\n", "words": b"hello world", "page": b"<html>"}
    for name, zipped in (("zip", True), ("legacy", False)):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=zipped)
        whole = (tmp_path / name).read_bytes()
        files |= {f"{name}-{size}": whole[:size] for size in (3, 10)}
    torch.save({"a": torch.rand(300)}, tmp_path / "tensors", _use_new_zipfile_serialization=False)
    files["legacy-tensors"] = (tmp_path / "tensors").read_bytes()[:-10]
    whole = (tmp_path / "zip").read_bytes()
    files |= {f"zip-{size}": whole[:size] for size in (100, len(whole) // 2, len(whole) - 10)}
    at = whole.index(b"data.pkl") + 80
    files["rotten"] = whole[:at] + b"\xff" * 20 + whole[at + 20 :]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: truncated, damaged or no PyTorch file; write or fetch it again"):
            read_checkpoint(tmp_path / name)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(UserError, match=r"empty\.pth: an empty file"):
        read_checkpoint(tmp_path / "empty.pth")


def test_whole_files_that_need_code_are_told_from_damaged_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("raw").write_bytes(pickle.dumps({"a": Hostile()}))
    Path("raw-0").write_bytes(pickle.dumps({"a": Hostile()}, 0))
    torch.save({"a": Hostile()}, "legacy", _use_new_zipfile_serialization=False)
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save("script")
    for name in ("raw", "raw-0", "legacy", "script"):
        with pytest.raises(UserError, match=f"^{name}: not a checkpoint that can be read without executing code"):
            read_checkpoint(Path(name))
    assert not Path("executed").exists()
