"""The table of other libraries' checkpoints: made in processes of their own; one that is wrong is caught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import foreign
from bench.foreign import LIMIT, ForeignArgs, main, read, theirs_here
from bench.foreign_parts import NAMED, features, shaken
from fastmoco.models.encoder import Encoder


@pytest.mark.system
def test_files_are_made_and_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "ours_there", lambda peers: [])
    out = tmp_path / "x.md"
    assert main(ForeignArgs(peers=tmp_path, out=out, only=("torchvision", "facebookresearch/moco"))) == 0
    *here, absent = json.loads(out.with_suffix(".json").read_text())
    assert [line["arch"] for line in here] == ["resnet18", "resnet50"]
    for line in here:
        assert line["holds"] and 0 <= line["difference"] <= LIMIT and line["version"]
    assert here[0]["keys read"] == "120 of 122"
    assert absent["holds"] is None and absent["note"] == "no clone at moco"
    assert "| fastmoco | facebookresearch/moco | - |" in out.read_text()


def test_code_that_fails_is_said(tmp_path: Path) -> None:
    (line,) = theirs_here("no such library", tmp_path)
    assert line["holds"] is False and "KeyError" in line["note"]


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    """As a library's process describes a file with a query and a key encoder."""
    torch.manual_seed(0)
    query, key = (shaken(Encoder("resnet18").backbone) for _ in range(2))
    pair = (("encoder_q.", query), ("encoder_k.", key))
    state = {prefix + name: value for prefix, part in pair for name, value in part.state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    images = torch.rand(2, 3, 65, 47)
    found = [features(part, NAMED, images) for part in (query, key)]
    return {"file": "x.pth", "version": "1", "wrote": "x", "note": "", "images": images, "features": found}


def test_what_differs_is_said(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = read("x", made, tmp_path)
    assert line["holds"] and line["key encoder"] > 100 * LIMIT and line["keys read"] == "120 of 240"
    query, key = made["features"]
    wrong = [query[0], query[1], query[2] + 1e-4 * query[2].max(), *query[3:]]
    lost = [*query[:4], query[4] * torch.nan]
    for pair in ([wrong, key], [key, query], [query, query], [lost, key]):
        assert read("x", made | {"features": pair}, tmp_path)["holds"] is False
    monkeypatch.setattr(foreign, "ours_there", lambda peers: [])
    monkeypatch.setattr(foreign, "theirs_here", lambda *_: [read("x", made | {"features": [wrong]}, tmp_path)])
    assert main(ForeignArgs(peers=tmp_path, out=tmp_path / "x.md", only=("x",))) == 1


def test_a_file_that_is_not_read_is_said(made: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"encoder_q.other": torch.zeros(1)}, tmp_path / "x.pth")
    line = read("x", made, tmp_path)
    assert line["holds"] is False and line["note"].startswith("not read: /x.pth: no conv1.weight")


def test_exports_are_read_by_torchvision(tmp_path: Path) -> None:
    line = foreign._exported("resnet18", "torchvision")
    assert line["holds"] and line["keys read"] == "120 of 120"


def test_features_are_those_of_the_networks_own_forward() -> None:
    parts = [nn.Conv2d(3, 4, 1), nn.ReLU(True), nn.Conv2d(4, 5, 1), nn.ReLU(True), nn.AdaptiveAvgPool2d(1)]
    network = nn.Sequential(*parts)
    images = torch.rand(2, 3, 5, 7)
    found = features(network, ("0", "1", "2", "3", "4"), images)
    with torch.no_grad():
        before = parts[0](images)
        expected = [before, before.relu(), parts[2](before.relu()), parts[2](before.relu()).relu()]
    # What a later part changes in place stays as it was.
    for a, b in zip(found, [*expected, expected[3].mean(dim=(2, 3))], strict=True):
        torch.testing.assert_close(a, b)
