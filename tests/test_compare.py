"""`fastmoco compare`: CKA of what `embed` writes, in a table, a file and pictures."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fastmoco import cli
from fastmoco.data.manifest import load_manifest
from fastmoco.errors import UserError
from fastmoco.evaluate import compare_command as module
from fastmoco.evaluate.cka import BATCH, WHOLE, cka_matrix, feature_reuse
from fastmoco.evaluate.compare import Comparison, Side, as_json, compare, draw_comparison, print_comparison
from fastmoco.evaluate.compare_command import CompareArgs, compare_command
from fastmoco.evaluate.features import extract
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import load_encoder, save_encoder
from fastmoco.train.pretrain import pretrain
from runs import draw_images, small_config

STAGES = ("stage1", "stage2", "stage3", "stage4")
COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn images with labels; two runs that saw 24 and 32 pixels, and weights that do not say what they saw."""
    root = tmp_path_factory.mktemp("compare")
    draw_images(root, COUNT)
    for seed, (name, size, resize) in enumerate((("before", 24, 1.25), ("after", 32, 1.0))):
        encoder = Encoder("resnet18", seed=seed, zero_init_residual=False)
        save_encoder(root / name / "encoder.safetensors", encoder, {"views": {"size": size, "resize": resize}})
    torch.save(Encoder("resnet18", seed=2, zero_init_residual=False).backbone.state_dict(), root / "weights.pth")
    return root


def _args(folder: Path, out: Path | None, **changes: Any) -> CompareArgs:
    said = {"run": folder / "before", "data": folder / "images", "labels": folder / "labels.csv", "stages": STAGES[1:]}
    return CompareArgs(**{**said, "workers": 0, "device": "cpu", "out": out, **changes})


def _features(folder: Path, run: str, size: int, resize: float, split: str | None = None) -> dict[str, np.ndarray]:
    manifest = load_manifest(folder / "images", folder / "labels.csv", progress=False)
    manifest = manifest if split is None else manifest.only_split(split)
    found = extract(load_encoder(folder / run), manifest, size=size, resize=resize, progress=False)
    return {stage: found[stage] for stage in STAGES[1:]}


def _close(found: dict[str, Any], wanted: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(found["values"], dtype=float), wanted, atol=1e-5)


def test_two_encoders_have_the_cka_of_what_embed_writes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["--data", folder / "images", "--labels", folder / "labels.csv", "--workers", 0, "--device", "cpu"]

    def fastmoco(*words: object) -> int:
        monkeypatch.setattr("sys.argv", ["fastmoco", *map(str, [*words, *images])])
        return cli.main()

    features = []
    for name in ("before", "after"):
        out = tmp_path / f"{name}.npz"
        assert fastmoco("embed", folder / name, "--out", out, "--stages", *STAGES) == 0
        with np.load(out, allow_pickle=False) as held:
            features.append({stage: held[stage] for stage in STAGES})
    out = tmp_path / "new" / "cka.json"
    options = ["--kernel", "rbf", "linear", "--sigma", 0.5, "--out", out, "--draws", 7, "--seed", 3]
    capsys.readouterr()
    assert fastmoco("compare", folder / "before", folder / "after", *options) == 0
    shown = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert sorted(path.name for path in out.parent.iterdir()) == ["cka-linear.png", "cka-rbf.png", "cka.json"]
    assert (out.parent / "cka-rbf.png").read_bytes().startswith(b"\x89PNG")
    assert list(record["cka"]) == list(record["reuse"]) == ["rbf", "linear"]
    for kernel in ("rbf", "linear"):
        wanted = cka_matrix(*features, kernel=kernel, sigma=0.5, estimator="unbiased")
        held = record["cka"][kernel]
        assert held["rows"] == held["columns"] == list(STAGES)
        _close(held, wanted.values)
        reuse = feature_reuse(*features, kernel=kernel, sigma=0.5, draws=7, seed=3)
        for stage in STAGES:
            kept = record["reuse"][kernel][stage]
            assert kept["mean"] == pytest.approx(reuse[stage].mean, abs=1e-5)
            assert kept["std"] == pytest.approx(reuse[stage].std, abs=1e-5)
            assert (kept["draws"], kept["size"], kept["images"]) == (7, 19, COUNT)
        first = " ".join(f"{value:.3f}" for value in held["values"][0])
        kept = record["reuse"][kernel]["stage1"]
        assert f"stage1 {first} {kept['mean']:.3f} ({kept['std']:.3f})" in " ".join(shown.split())
    assert "CKA of before (down) with after (across): RBF, 0.5 x median distance, unbiased, 24 images" in shown
    assert "over 7 draws of 19 of the images" in shown and f"written: {out}, " in shown
    assert record["encoders"][1] == {
        "run": str(folder / "after"),
        "file": str(folder / "after" / "encoder.safetensors"),
        "arch": "resnet18",
        "size": 32,
        "resize": 1.0,
    }
    said = {"images": COUNT, "estimator": "unbiased", "sigma": 0.5, "split": None, "seed": 3, "batch": None}
    assert said.items() <= record.items() and record["data"] == str(folder / "images")


def test_one_encoder_is_compared_with_itself_on_one_split(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(folder / "before", tmp_path / "before")
    assert compare_command(_args(folder, None, run=run, split="test", estimator="biased", kernel=("paper",))) == 0
    record = json.loads((run / "compare" / "before-test.json").read_text())
    assert (run / "compare" / "before-test-paper.png").is_file()
    features = _features(folder, "before", 24, 1.25, "test")
    assert record["images"] == len(features["stage2"]) == 8 and record["reuse"] == {}
    _close(record["cka"]["paper"], cka_matrix(features, features, kernel="paper").values)
    np.testing.assert_allclose(np.diagonal(record["cka"]["paper"]["values"]), 1.0)
    shown = capsys.readouterr().out
    assert "CKA of the stages of before: RBF, absolute 0.8, biased, 8 images" in shown
    assert "reuse" not in shown and "different pixels" not in shown


def test_each_sees_what_its_run_saw_or_the_other_or_what_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cka.json"
    for other, options, seen in (
        ("after", {}, [(24, 1.25), (32, 1.0)]),
        ("weights.pth", {}, [(24, 1.25), (24, 1.25)]),
        ("after", {"size": 28}, [(28, 1.25), (28, 1.0)]),
        ("after", {"size": 28, "resize": 1.5}, [(28, 1.5), (28, 1.5)]),
    ):
        assert compare_command(_args(folder, out, other=folder / other, draws=2, **options)) == 0
        record = json.loads(out.read_text())
        assert [(side["size"], side["resize"]) for side in record["encoders"]] == seen
        shown = capsys.readouterr().out
        assert ("see different pixels" in shown) == (seen[0] != seen[1])
    features = [_features(folder, run, 28, 1.5) for run in ("before", "after")]
    _close(record["cka"]["linear"], cka_matrix(*features, estimator="unbiased").values)
    # Unknown weights may also come first; by themselves, nobody says what they are to see.
    args = {"run": folder / "weights.pth", "stages": ("stage4",)}
    assert compare_command(_args(folder, out, other=folder / "after", draws=2, **args)) == 0
    assert [side["size"] for side in json.loads(out.read_text())["encoders"]] == [32, 32]
    with pytest.raises(UserError, match=r"weights\.pth does not say what size .* --size"):
        compare_command(_args(folder, out, **args))


def test_pictures_of_an_earlier_comparison_do_not_stay(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "own" / "cka.json"
    out.parent.mkdir()
    for name in ("other-rbf.png", "cka-mine.png"):
        (out.parent / name).touch()
    for kernels in (("linear", "rbf", "paper"), ("linear",)):
        assert compare_command(_args(folder, out, stages=("stage4",), kernel=kernels)) == 0
        names = {path.name for path in out.parent.iterdir()}
        assert names == {"cka.json", "other-rbf.png", "cka-mine.png", *(f"cka-{kernel}.png" for kernel in kernels)}


def test_a_run_is_what_it_exports(folder: Path, tmp_path: Path) -> None:
    run = pretrain(small_config(folder / "images", tmp_path / "run", steps=2, checkpoint_every=2))
    same = _args(folder, None, run=run, other=run / "encoder.safetensors", stages=("stage4", "stage1"), draws=3)
    assert compare_command(same) == 0
    record = json.loads((run / "compare" / "run-encoder.safetensors.json").read_text())
    assert record["cka"]["linear"]["rows"] == ["stage4", "stage1"]
    np.testing.assert_allclose(np.diagonal(record["cka"]["linear"]["values"]), 1.0)
    assert record["reuse"]["linear"]["stage4"]["mean"] == pytest.approx(1.0)
    assert record["encoders"][0]["file"].endswith("step-000000002.safetensors")
    assert compare_command(_args(folder, tmp_path / "head.json", run=run, stages=("final", "stage4"))) == 0
    assert json.loads((tmp_path / "head.json").read_text())["cka"]["linear"]["columns"] == ["final", "stage4"]


def test_above_2048_images_minibatches_are_taken_unless_another_is_asked_for(folder: Path) -> None:
    rng = np.random.default_rng(0)
    first = {"stage1": rng.normal(size=(WHOLE + 1, 3))}
    second = {"stage1": first["stage1"] + rng.normal(size=(WHOLE + 1, 3))}
    assert module._estimator(_args(folder, None), WHOLE) == "unbiased"
    assert module._estimator(_args(folder, None), WHOLE + 1) == "minibatch"
    assert module._estimator(_args(folder, None, estimator="biased"), WHOLE + 1) == "biased"
    found = compare(first, second, estimator="minibatch", draws=2, seed=5)
    wanted = cka_matrix(first, second, estimator="minibatch", batch=BATCH, seed=5)
    assert np.array_equal(found.cka["linear"].values, wanted.values)
    assert found.reuse["linear"] == feature_reuse(first, second, draws=2, seed=5)


def _side(name: str) -> Side:
    file = Path(name)
    return Side(name=name, run=file, file=file, encoder=Encoder("resnet18", seed=0), size=24, resize=1.0)


def _undefined() -> Comparison:
    flat = {"stage1": np.ones((6, 3)), "stage2": np.random.default_rng(0).normal(size=(6, 3))}
    return compare(flat, flat, draws=2)


def test_what_is_undefined_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    found = _undefined()
    print_comparison(found, [_side("a"), _side("b[red]")], Console(width=80))
    shown = capsys.readouterr().out
    assert "stage1 - - -" in " ".join(shown.split()) and "-: undefined" in shown and "b[red]" in shown
    record = json.loads(json.dumps(as_json(found, [_side("a"), _side("b")]), allow_nan=False))
    assert record["cka"]["linear"]["values"][0] == [None, None]
    assert record["cka"]["linear"]["values"][1] == [None, pytest.approx(1.0)]
    assert record["reuse"]["linear"]["stage1"]["mean"] is None


def test_long_and_odd_names_fit_beside_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("fastmoco.evaluate.pictures.png", lambda figure: drawn.append(figure) or b"")
    draw_comparison(_undefined(), [_side(f"{'long ' * 20}end"), _side("two_{$ $one$")], tmp_path / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["x-linear.png"]
    (figure,) = drawn
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_ylabel() == "long long long …ng long long end" and axes.get_xlabel() == "two_{$ $one$"
    for label in (axes.yaxis.label, axes.xaxis.label):
        box = label.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_a_name_is_the_last_part_of_a_path_that_tells_it_from_the_other() -> None:
    assert module._names([Path("runs/a/")]) == ["a"]
    assert module._names([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert module._names([Path("x/a/1.pth"), Path("x/b/1.pth")]) == ["a", "b"]
    assert module._names([Path("/a/1.pth"), Path("/1.pth")]) == ["a", "/"]
    assert module._names([Path("runs/a"), Path("runs/a/encoder.safetensors")]) == ["a", "encoder.safetensors"]


def test_without_matplotlib_the_file_is_written_and_it_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("heat_map", "panels", "pictures"):
        monkeypatch.delitem(sys.modules, f"fastmoco.evaluate.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "cka.json"
    (tmp_path / "cka-linear.png").write_text("of an earlier comparison")
    assert compare_command(_args(folder, out, stages=("stage4",))) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert list(tmp_path.glob("cka*")) == [out] and json.loads(out.read_text())["cka"]["linear"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"other": "before"}, "are the same file; name one"),
        ({"other": "gone"}, "no such run folder or file"),
        ({"stages": ("final",)}, r"before/encoder\.safetensors has no head, nor has the run folder .*leave final"),
        ({"stages": ("final",), "run": "weights.pth", "size": 24}, r"weights\.pth has no head; give the folder of its"),
        ({"stages": ()}, "--stages: name"),
        ({"kernel": ()}, "--kernel: name"),
        ({"kernel": ("rbf",), "sigma": 0.0}, "--sigma must be above 0"),
        ({"kernel": ("rbf",), "sigma": float("nan")}, "--sigma must be above 0"),
        ({"sigma": 2.0}, "--kernel rbf, which is not asked for"),
        ({"other": "after", "draws": 1}, "--draws must be at least 2"),
        ({"resize": 0.5}, "--resize must be at least 1, not 0.5"),
        ({"resize": float("nan")}, "--resize must be finite and at least 1, not nan"),
        ({"resize": float("inf")}, "--resize must be finite and at least 1, not inf"),
        ({"size": 0}, "--size must be at least 1, not 0"),
        ({"split": "tset"}, "no image is in it; the splits are test, train"),
        ({"out": "x.txt"}, r"ends in \.json"),
        ({"out": "."}, "is a folder: name a file"),
        ({"out": "before/encoder.safetensors/x.json"}, "cannot be written"),
        ({"out": "images/x.json"}, "lies inside --data"),
    ],
)
def test_mistakes(folder: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is said before any image goes through an encoder."""

    def extract(*_: object, **__: object) -> None:
        raise AssertionError("features were extracted")

    monkeypatch.setattr(module, "extract", extract)
    paths = {name: folder / value for name, value in changes.items() if name in ("run", "other", "out")}
    with pytest.raises(UserError, match=said):
        compare_command(_args(folder, **{"out": folder / "x.json", **changes, **paths}))


def test_too_few_and_too_many_images(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = draw_images(tmp_path, 4)
    with pytest.raises(UserError, match="4 images are too few to compare on; it takes 5"):
        compare_command(_args(folder, tmp_path / "x.json", data=few, labels=None))
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match=r"--estimator unbiased: 24 images take .* take minibatch"):
        compare_command(_args(folder, tmp_path / "x.json", estimator="unbiased"))


def test_a_failed_write_leaves_the_old_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "cka.json"
    out.write_text("old")
    monkeypatch.setattr("fastmoco.atomic.os.fsync", full)
    with pytest.raises(UserError, match=r"--out .*cka\.json: cannot be written: .*No space left"):
        compare_command(_args(folder, out, stages=("stage4",)))
    assert out.read_text() == "old" and [path.name for path in tmp_path.glob(".*")] == []
