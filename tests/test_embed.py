"""Features in a file: what the encoder says of each image, readable without executing code."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmoco import cli
from fastmoco.data.manifest import load_manifest
from fastmoco.errors import UserError
from fastmoco.evaluate.embed import ABOUT, EmbedArgs, embed_command
from fastmoco.evaluate.features import extract
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import load_encoder, save_encoder
from runs import draw_images

SIZE = 24


def _mood(line: int) -> str:
    """The cell of the labels' `line`, of which the last is not known."""
    return "" if line == 13 else "calm" if line % 3 else "édgy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn images with labels, and encoder.safetensors of a run at 24 pixels."""
    root = tmp_path_factory.mktemp("embed")
    draw_images(root, 13)
    lines = (root / "labels.csv").read_text().splitlines()
    named = [line + (",mood" if i == 0 else f",{_mood(i)}") for i, line in enumerate(lines)]
    (root / "labels.csv").write_text("\n".join(named) + "\n")
    encoder = Encoder("resnet18", seed=0)
    save_encoder(root / "encoder.safetensors", encoder, {"views": {"size": SIZE, "resize": 1.25}})
    return root


def _args(folder: Path, out: Path, **changes: Any) -> EmbedArgs:
    said = {"run": folder / "encoder.safetensors", "data": folder / "images", "labels": folder / "labels.csv"}
    return EmbedArgs(**{**said, "workers": 0, "device": "cpu", "out": out, **changes})


def _wanted(folder: Path) -> dict[str, np.ndarray]:
    manifest = load_manifest(folder / "images", folder / "labels.csv", progress=False)
    encoder = load_encoder(folder / "encoder.safetensors")
    return extract(encoder, manifest, size=SIZE, resize=1.25, progress=False)


def test_an_npz_file_holds_what_is_known_of_each_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "features.npz"
    options = {"--data": folder / "images", "--labels": folder / "labels.csv", "--out": out, "--workers": 0}
    words = [str(word) for option in options.items() for word in option]
    run = str(folder / "encoder.safetensors")
    monkeypatch.setattr("sys.argv", ["fastmoco", "embed", run, *words, "--stages", "stage4", "stage2"])
    assert cli.main() == 0
    assert f"{out}: 13 images, stage4 (512), stage2 (128)" in capsys.readouterr().out
    assert list(out.parent.iterdir()) == [out]
    with np.load(out, allow_pickle=False) as held:
        found = {name: held[name] for name in held.files}
    names = {"file", "patient", "split", "label_kind", "classes_kind", "label_mood", "classes_mood"}
    assert found.keys() == names | {"stage4", "stage2", ABOUT}
    assert found["file"][:2].tolist() == ["000.jpg", "001.png"] and found["file"].dtype.kind == "U"
    assert found["patient"].tolist() == [f"p{i // 2}" for i in range(13)]
    assert found["split"].tolist() == ["test" if i // 2 % 3 == 2 else "train" for i in range(13)]
    assert found["classes_mood"].tolist() == ["calm", "édgy"]
    moods = found["classes_mood"][found["label_mood"][:-1]].tolist()
    assert moods == [_mood(i) for i in range(1, 13)] and found["label_mood"][-1] == -1
    wanted = _wanted(folder)
    for stage in ("stage2", "stage4"):
        assert found[stage].dtype == np.float32
        np.testing.assert_allclose(found[stage], wanted[stage], rtol=1e-5, atol=1e-6)
    about = json.loads(str(found[ABOUT]))
    assert about == {"run": run, "arch": "resnet18", "size": SIZE, "resize": 1.25, "precision": "fp32"}


def test_a_parquet_file_holds_the_same(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    assert embed_command(_args(folder, tmp_path / "f.parquet", label=("mood",))) == 0
    assert embed_command(_args(folder, tmp_path / "f.npz")) == 0
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["file", "patient", "split", "label_mood", "stage4"]
    with np.load(tmp_path / "f.npz", allow_pickle=False) as held:
        for name in ("file", "patient", "split"):
            assert table[name].to_pylist() == held[name].tolist()
        moods = table["label_mood"].to_pylist()
        assert moods[:-1] == held["classes_mood"][held["label_mood"][:-1]].tolist() and moods[-1] is None
        rows = np.array(table["stage4"].to_pylist(), dtype=np.float32)
        assert np.array_equal(rows, held["stage4"])
        assert table.schema.metadata[ABOUT.encode()].decode() == str(held[ABOUT])


def test_without_pyarrow_parquet_is_refused_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **others: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **others)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match="pip install pyarrow"):
        embed_command(_args(folder, tmp_path / "f.parquet", run=tmp_path / "nothing"))


def test_a_failed_write_leaves_the_old_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "f.npz"
    out.write_bytes(b"old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(UserError, match="No space left"):
        embed_command(_args(folder, out))
    assert out.read_bytes() == b"old" and not list(tmp_path.glob(".f*"))


def test_what_cannot_be_written_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends in \.npz or \.parquet"):
        embed_command(_args(folder, tmp_path / "f.csv"))
    with pytest.raises(UserError, match="has no head"):
        embed_command(_args(folder, tmp_path / "f.npz", stages=("final",)))
    with pytest.raises(UserError, match="--stages"):
        embed_command(_args(folder, tmp_path / "f.npz", stages=()))
    with pytest.raises(UserError, match="--batch-size must be"):
        _args(folder, tmp_path / "f.npz", batch_size=0)
