"""Weights in and out, and the files they travel in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

import fastmoco
from fastmoco.cli import export
from fastmoco.errors import UserError
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import (
    CHECKPOINTS,
    EXPORTED,
    QUERY,
    infer_arch,
    initial_backbone,
    load_encoder,
    save_encoder,
    weights_file,
    write_weights,
)


def shaken(arch: str) -> Encoder:
    """An encoder none of whose weights or statistics is at its initial value."""
    encoder = Encoder(arch, head="mlp", dim=16, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, value in encoder.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(0.5 + noise if "running_var" in name or "bn" in name else value + 0.01 * noise)
    return encoder.eval()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_exported_weights_load_strictly_into_torchvision(arch: str, tmp_path: Path) -> None:
    encoder = shaken(arch)
    save_encoder(tmp_path / "e.safetensors", encoder, {"views": {"size": 64, "resize": 1.0}})
    theirs = getattr(torchvision.models, arch)()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(load_file(tmp_path / "e.safetensors"), strict=True)
    theirs.eval()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    ours = fastmoco.load_encoder(tmp_path / "e.safetensors")
    assert (ours.arch, ours.image_size, ours.resize, ours.training) == (arch, 64, 1.0, False)
    with torch.no_grad():
        expected = theirs(images)
        assert expected.std() > 1e-3
        assert torch.allclose(ours(images).embedding, expected, rtol=1e-5, atol=1e-5)
        assert torch.allclose(encoder(images).stages[3].mean(dim=(2, 3)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_an_export_of_that_name_is_a_pytorch_file(suffix: str, tmp_path: Path) -> None:
    encoder = shaken("resnet18").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_encoder(tmp_path / EXPORTED, encoder, {})
    file = tmp_path / f"e{suffix}"
    assert export([str(tmp_path), "--out", str(file)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file.name, EXPORTED])
    state = torch.load(file, weights_only=True)
    assert type(state) is dict and all(value.is_contiguous() for value in state.values())
    theirs = torchvision.models.resnet18()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(state, strict=True)
    ours = load_encoder(file).backbone.state_dict()
    for name, value in encoder.backbone.state_dict().items():
        assert torch.equal(ours[name], value) and torch.equal(theirs.state_dict()[name], value)


def test_export_s_help_says_which_files_it_writes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export(["--help"])
    shown = capsys.readouterr().out
    assert all(suffix in shown for suffix in (".safetensors", ".pth", ".pt", ".bin"))


def test_files_of_other_names_are_not_written(tmp_path: Path) -> None:
    save_encoder(tmp_path / EXPORTED, Encoder("resnet18"), {})
    for name in ("e.onnx", "e"):
        with pytest.raises(UserError, match=rf"{name}: .* \.safetensors, or \.pth, \.pt, \.bin for torch\.save's$"):
            export([str(tmp_path), "--out", str(tmp_path / name)])
        assert not (tmp_path / name).exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"e\.pth could not be written"):
        export([str(tmp_path), "--out", str(tmp_path / "file" / "e.pth")])


@pytest.mark.parametrize("arch", ["resnext50_32x4d", "wide_resnet50_2"])
def test_networks_with_a_resnet_s_blocks_and_other_widths_are_refused(arch: str, tmp_path: Path) -> None:
    torch.save(torchvision.models.get_model(arch).state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        initial_backbone(str(tmp_path / "x.pth"), "resnet50")
    assert str(caught.value) == (
        f"{tmp_path / 'x.pth'}: its weights are of other shapes than a resnet50's: layer1.0.conv1.weight is "
        "(128, 64, 1, 1), not (64, 64, 1, 1); of networks with these blocks only plain ResNets are read"
    )


def test_a_network_that_lacks_a_layer_is_refused_in_one_line(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    del state["bn1.weight"], state["bn1.bias"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r'x\.pth does not fit: .* Missing key\(s\) .*: "bn1\.weight"') as caught:
        load_encoder(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def test_a_run_that_kept_its_query_encoder_alone_is_read_with_its_head(tmp_path: Path) -> None:
    encoder = shaken("resnet18")
    save_encoder(tmp_path / EXPORTED, encoder, {})
    assert not load_encoder(tmp_path).has_head
    query = {f"module.query.{name}": value for name, value in encoder.state_dict().items()}
    meta = {"step": 3, "config": {"model": {"arch": "resnet18", "head": "mlp", "dim": 16}, "views": {"size": 64}}}
    write_weights(tmp_path / QUERY, query, meta)
    found = load_encoder(tmp_path)
    assert found.has_head and found.image_size == 64
    mine, wanted = found.state_dict(), encoder.state_dict()
    assert mine.keys() == wanted.keys() and all(torch.equal(mine[name], wanted[name]) for name in mine)
    # Checkpoints say where a run stands.
    newest = tmp_path / CHECKPOINTS / "step-000000004.safetensors"
    write_weights(newest, query, meta)
    assert weights_file(tmp_path) == newest


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_architectures_are_told_from_their_keys(arch: str) -> None:
    with torch.device("meta"):
        assert infer_arch(getattr(torchvision.models, arch)().state_dict(), Path("x")) == arch


@pytest.mark.parametrize("first", [torch.zeros(32, 3, 7, 7), torch.tensor(1.0), None])
def test_other_widths_are_refused(first: torch.Tensor | None) -> None:
    with torch.device("meta"):
        state = torchvision.models.resnet18().state_dict()
    others = {name: value for name, value in state.items() if name != "conv1.weight"}
    with pytest.raises(UserError, match=r"not a torchvision ResNet 18 to 152 \(blocks \(2, 2, 2, 2\), (32|0) channels"):
        infer_arch(others if first is None else others | {"conv1.weight": first}, Path("x"))


def test_a_torchvision_file_loads(tmp_path: Path) -> None:
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "r.pth")
    state, said = initial_backbone(str(tmp_path / "r.pth"), "resnet18")
    assert torch.equal(state["conv1.weight"], model.conv1.weight)
    assert said == (
        f"starting from {tmp_path / 'r.pth'}: resnet18, 120 tensors in the layout of torchvision; left out 2: fc"
    )
    with pytest.raises(UserError, match="holds a resnet18, not --arch resnet50"):
        initial_backbone(str(tmp_path / "r.pth"), "resnet50")


def test_init_from_torchvision_takes_its_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download is torchvision's; a file of that name in its cache stands in for it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    cached = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), cached)
    state, said = initial_backbone("torchvision", "resnet18")
    assert f"starting from {cached.name}: resnet18, 120 tensors in the layout of torchvision" in said
    assert torch.equal(state["layer4.1.bn2.weight"], model.layer4[1].bn2.weight)
    assert not any(name.startswith("fc.") for name in state)


def test_init_from_torchvision_without_a_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # Nothing listens on port 9 of this machine, so that the test reaches nobody.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be downloaded"):
        initial_backbone("torchvision", "resnet18")


class Payload:
    """What a hostile pickle would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("executed"),))


def test_a_pickle_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Payload()}, "bad.pth")
    with pytest.raises(UserError, match="without executing code"):
        load_encoder("bad.pth")
    assert not Path("executed").exists()


def test_files_that_hold_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such"):
        load_encoder(tmp_path / "none")
    with pytest.raises(UserError, match="is it a run folder"):
        load_encoder(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"conv1\.weight"):
        load_encoder(tmp_path / "x.safetensors")
    save_encoder(tmp_path / "e.safetensors", Encoder("resnet18"), {})
    whole = (tmp_path / "e.safetensors").read_bytes()
    (tmp_path / "e.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"e\.safetensors is truncated or damaged"):
        load_encoder(tmp_path / "e.safetensors")
