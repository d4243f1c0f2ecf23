"""Checkpoints of other libraries: laid out as theirs are, each gives the encoder that it was made of."""

from __future__ import annotations

import argparse
import enum
import functools
import importlib
import os
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastmoco.cli import export
from fastmoco.errors import UserError
from fastmoco.models.encoder import Encoder
from fastmoco.models.foreign import query_backbone, read_checkpoint, state_dict_of
from fastmoco.models.weights import EXPORTED, QUERY, load_encoder, write_weights

State = dict[str, Tensor]


def prefixed(prefix: str, state: State, *, fc: bool = True) -> State:
    return {prefix + name: value for name, value in state.items() if fc or not name.startswith("fc.")}


def of_children(model: nn.Module) -> State:
    """As lightly's examples take a backbone: a Sequential of all children but the last."""
    return dict(nn.Sequential(*list(model.children())[:-1]).state_dict())


class Settings:
    """An object of a class that torch's reader does not allow, as trainers put into their checkpoints."""

    def __init__(self) -> None:
        self.lr = {"encoder": 0.1}

    def __setstate__(self, state: Any) -> None:
        Path("executed").touch()


class Hostile:
    """What runs as it is read by pickle alone."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("__import__('pathlib').Path('executed').touch()",))


class Attributes(dict[str, Any]):
    """A dict as Lightning keeps its settings in."""


class Stages(list[Any]):
    pass


class Stage(enum.Enum):
    FITTING = "fit"


class Data:
    """A datamodule among the settings, with what it reaches: the paper's code saves one, and with it the trainer."""

    def __init__(self) -> None:
        self.settings, self.stages = Attributes(lr=0.1, size=64), Stages([Stage.FITTING, 2])
        self.states = defaultdict(list, {"a": [1], "b": [2]})
        self.by_stage, self.stages_done = {Stage.FITTING: 3}, {Stage.FITTING}
        # By getattr, and what is called is what it gave.
        self.bound, self.made = self.settings.update, Called()
        self.noise, self.part = np.arange(3), functools.partial(max, 1)


class Called:
    def __reduce__(self) -> tuple[Any, ...]:
        return (self.made, (2,))

    @staticmethod
    def made(number: int) -> int:
        return number


def layouts(model: nn.Module, other: nn.Module) -> dict[str, Any]:
    """Checkpoints by library, with `model` as the query encoder and `other` as the key encoder."""
    own, key = dict(model.state_dict()), dict(other.state_dict())
    queue = {"queue": torch.zeros(4, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    linear = {"weight": torch.zeros(4, 4), "bias": torch.zeros(4)}
    moco = prefixed("encoder_q.", own) | prefixed("encoder_k.", key) | queue
    mlp = {name: value for name, value in moco.items() if ".fc." not in name}
    mlp |= prefixed("encoder_q.fc.0.", linear) | prefixed("encoder_q.fc.2.", linear)
    projectors = {f"p{s}.projector.0.weight": torch.zeros(4, 4) for s in range(1, 5)}
    projectors["p1.bn.running_mean"] = torch.zeros(4)
    hyper = {"hyper_parameters": argparse.Namespace(lr=0.1), "pytorch-lightning_version": "1.1", "callbacks": {}}
    names = {
        "torchvision": own,
        "timm": OrderedDict(own),
        "moco": {"epoch": 200, "arch": "resnet18", "state_dict": prefixed("module.", moco), "optimizer": {"state": {}}},
        "moco, mlp": {"state_dict": prefixed("module.", mlp)},
        "moco v3": {
            "state_dict": prefixed("module.base_encoder.", own)
            | prefixed("module.momentum_encoder.", key)
            | prefixed("module.predictor.0.", linear)
        },
        "the paper": hyper | {"state_dict": moco | projectors},
        "lightly, example": of_children(model)
        and prefixed("backbone.", of_children(model))
        | prefixed("backbone_momentum.", of_children(other))
        | prefixed("projection_head.layers.0.", linear)
        | prefixed("projection_head_momentum.layers.0.", linear)
        | {"criterion.memory_bank.bank": torch.zeros(4, 4)},
        "lightly, benchmark": hyper
        | {
            "state_dict": prefixed("backbone.", own, fc=False)
            | prefixed("key_backbone.", key, fc=False)
            | prefixed("projection_head.layers.0.", linear)
            | prefixed("key_projection_head.layers.0.", linear)
            | prefixed("online_classifier.classification_head.", linear)
        },
        "solo-learn": hyper
        | {
            "state_dict": prefixed("backbone.", own, fc=False)
            | prefixed("momentum_backbone.", key, fc=False)
            | prefixed("projector.0.", linear)
            | prefixed("momentum_projector.0.", linear)
            | prefixed("classifier.", linear)
            | {"queue": torch.zeros(2, 4, 8), "queue_ptr": torch.zeros(1)}
        },
        "barlowtwins, checkpoint": {
            "epoch": 1,
            "model": prefixed("module.backbone.", own, fc=False)
            | prefixed("module.projector.0.", linear)
            | {"module.bn.running_mean": torch.zeros(4)},
        },
        "barlowtwins, published": {name: value for name, value in own.items() if not name.startswith("fc.")},
    }
    return names


NAMES = [
    "torchvision", "timm", "moco", "moco, mlp", "moco v3", "the paper", "lightly, example", "lightly, benchmark",
    "solo-learn", "barlowtwins, checkpoint", "barlowtwins, published",
]  # fmt: skip


@pytest.fixture(scope="module")
def encoders() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    pair = [torchvision.models.resnet18(num_classes=4).eval() for _ in range(2)]
    for model in pair:
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
    return pair[0], pair[1]


@pytest.mark.parametrize("name", NAMES)
def test_each_library_gives_its_query_encoder(name: str, encoders: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    model, other = encoders
    every = layouts(model, other)
    assert list(every) == NAMES
    torch.save(every[name], tmp_path / "x.ckpt")
    found = load_encoder(tmp_path / "x.ckpt")
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = found(x).embedding
        expected = nn.Sequential(*list(model.children())[:-1])(x).flatten(1)
    assert found.arch == "resnet18"
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_it_is_said_whose_layout_it_is_and_what_was_left_out(encoders: tuple[nn.Module, nn.Module]) -> None:
    every = layouts(*encoders)

    def found(name: str) -> str:
        return str(query_backbone(state_dict_of(every[name], Path("x")), Path("x")))

    assert found("barlowtwins, published") == "120 tensors in the layout of torchvision"
    assert found("moco").startswith(
        "120 tensors in the layout of MoCo (encoder_q.*); left out 126: encoder_q.fc, encoder_k, queue"
    )
    assert found("lightly, example").endswith(
        "(backbone.*); left out 125: backbone_momentum, projection_head, projection_head_momentum, criterion"
    )


def test_objects_in_a_checkpoint_are_passed_over_and_no_code_of_theirs_runs(
    encoders: tuple[nn.Module, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for settings in (Settings(), Hostile(), [Data(), Hostile()]):
        torch.save({"hyper_parameters": settings, "state_dict": encoders[0].state_dict()}, "x.ckpt")
        torch.load("x.ckpt", weights_only=False)
        # It would have.
        Path("executed").unlink()
        assert load_encoder("x.ckpt").arch == "resnet18"
        assert not Path("executed").exists()


def test_a_trainer_among_the_settings_is_passed_over(encoders: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    own = encoders[0].state_dict()
    torch.save({"hyper_parameters": Attributes(data=Data()), "state_dict": own, "epoch": 3}, tmp_path / "x.ckpt")
    read = read_checkpoint(tmp_path / "x.ckpt")
    assert read["epoch"] == 3 and read["state_dict"].keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in read["state_dict"].items())


@pytest.fixture
def timm() -> Any:
    """Where it is not installed the test is skipped; under CI that is a failure."""
    if os.environ.get("CI"):
        return importlib.import_module("timm")
    return pytest.importorskip("timm", reason="timm is not installed")


def pooled_and_stages(network: nn.Module, images: Tensor) -> list[Tensor]:
    """The pooled feature of a network without a last layer, and what its stages gave."""
    kept: list[Tensor] = []
    for stage in range(1, 5):
        network.get_submodule(f"layer{stage}").register_forward_hook(lambda *call: kept.append(call[2].clone()))
    with torch.no_grad():
        return [network.eval()(images), *kept]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert b.std() > 1e-3 and (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_timm_files_give_timm_features(arch: str, timm: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=4)
    # Statistics of its own.
    model(torch.rand(4, 3, 64, 64))
    torch.save({"arch": arch, "state_dict": model.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "x.tar")
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    model.reset_classifier(0)
    images = torch.rand(2, 3, 65, 47)
    expected = pooled_and_stages(model, images)
    for name in ("x.tar", "x.safetensors"):
        encoder = load_encoder(tmp_path / name)
        with torch.no_grad():
            found = encoder(images)
        assert encoder.arch == arch
        assert_alike([found.embedding, *found.stages], expected)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_an_export_is_timm_s_and_torchvision_s(arch: str, timm: Any, tmp_path: Path) -> None:
    encoder = Encoder(arch, head="mlp", dim=16, zero_init_residual=False, seed=1)
    encoder(torch.rand(4, 3, 64, 64))
    query = {f"module.query.{name}": value for name, value in encoder.eval().state_dict().items()}
    config = {"model": {"arch": arch, "head": "mlp", "dim": 16}}
    write_weights(tmp_path / QUERY, query, {"step": 3, "config": config})
    assert export([str(tmp_path)]) == 0
    images = torch.rand(2, 3, 65, 47)
    with torch.no_grad():
        stages = encoder(images).stages
    expected = [stages[3].mean(dim=(2, 3)), *stages]
    file = tmp_path / EXPORTED
    assert_alike(pooled_and_stages(timm.create_model(arch, num_classes=0, checkpoint_path=str(file)), images), expected)
    for model in (timm.create_model(arch, num_classes=0), torchvision.models.get_model(arch, weights=None)):
        model.fc = nn.Identity()
        model.load_state_dict(load_file(file), strict=True)
        assert_alike(pooled_and_stages(model, images), expected)


def test_what_is_not_known_is_listed(encoders: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    own = dict(encoders[0].state_dict())
    torch.save({"state_dict": prefixed("encoder_q.", own) | {"adapter.weight": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth: keys that are neither .*: adapter\.weight$"):
        load_encoder(tmp_path / "x.pth")
    torch.save(own | {"layer5.0.conv1.weight": torch.zeros(1)}, tmp_path / "y.pth")
    with pytest.raises(UserError, match=r"neither .*: layer5\.0\.conv1\.weight"):
        load_encoder(tmp_path / "y.pth")
    torch.save({"epoch": 3}, tmp_path / "z.pth")
    with pytest.raises(UserError, match="epoch are none"):
        load_encoder(tmp_path / "z.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="nor a checkpoint with one in state_dict, model"):
        load_encoder(tmp_path / "list.pth")
