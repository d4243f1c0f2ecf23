"""Evaluation from image files to tables, on small generated images and a randomly initialised narrow ResNet-18."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tinted import IMAGES, draw_tinted
from torchvision import tv_tensors
from torchvision.transforms import v2

from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.errors import UserError
from fastmoco.evaluate.baselines import colour_statistics, gray_pixels
from fastmoco.evaluate.features import evaluation_image, extract
from fastmoco.evaluate.intervals import replicates
from fastmoco.evaluate.knn import knn_probabilities
from fastmoco.evaluate.protocol import evaluate_features
from fastmoco.evaluate.report import Result, print_result, to_csv, to_json, to_markdown
from fastmoco.evaluate.run import evaluate
from fastmoco.models.encoder import Encoder
from runs import NARROW

SIZE = 33


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_tinted(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return load_manifest(folder, folder / "labels.csv", label=("warm", "coin"), progress=False)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(NARROW, head="mlp", dim=7, seed=1)


@pytest.mark.parametrize("sides", [(29, 83), (83, 30), (24, 24), (5, 7), (640, 481)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_evaluation_image_is_torchvisions_on_floats(sides: tuple[int, int], kind: type[np.integer]) -> None:
    image = np.random.default_rng(0).integers(0, np.iinfo(kind).max + 1, (*sides, 3)).astype(kind)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    for size, shorter in ((21, 24), (20, 23), (24, 24)):
        found = evaluation_image(image, size=size, resize=shorter / size)
        oracle = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize(shorter), v2.CenterCrop(size)])
        torch.testing.assert_close(found, oracle(tv_tensors.Image(pixels)).as_subclass(torch.Tensor), atol=1e-6, rtol=0)
        assert found.shape == (3, size, size) and found.dtype == torch.float32
    with pytest.raises(UserError, match=r"resize 0\.5"):
        evaluation_image(image, size=21, resize=0.5)


def test_features_are_the_pooled_stages_in_the_manifests_order(manifest: Manifest, encoder: Encoder) -> None:
    features = extract(encoder, manifest, size=SIZE, resize=1.1, batch_size=32, progress=False)
    assert {name: values.shape for name, values in features.items()} == {
        "stage1": (IMAGES, 16),
        "stage2": (IMAGES, 32),
        "stage3": (IMAGES, 64),
        "stage4": (IMAGES, 128),
        "final": (IMAGES, 7),
    }
    assert {values.dtype for values in features.values()} == {np.dtype(np.float32)}
    wide = Encoder(NARROW, head="mlp", dim=7, seed=1).double().eval()
    for i in (0, 31, 32, 89):
        with Image.open(manifest.path(i)) as image:
            x = evaluation_image(np.asarray(image), size=SIZE, resize=1.1).double()[None]
        with torch.no_grad():
            embedding, stages = wide(x)
        for number, stage in enumerate(stages, start=1):
            expected = stage.mean(dim=(2, 3))[0].numpy()
            np.testing.assert_allclose(features[f"stage{number}"][i], expected, rtol=1e-4, atol=1e-5)
        expected = (embedding / embedding.norm())[0].numpy()
        np.testing.assert_allclose(features["final"][i], expected, rtol=1e-4, atol=1e-5)


def test_workers_and_batch_size_do_not_matter_and_nothing_is_left_changed(manifest: Manifest, encoder: Encoder) -> None:
    some = manifest.select(np.arange(20))
    encoder.train()
    encoder.backbone.layer2.eval()  # a frozen part of a training model
    modes = [part.training for part in encoder.modules()]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    reference = extract(encoder, some, size=SIZE, batch_size=20, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in encoder.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    loaded = extract(encoder, some, size=SIZE, batch_size=20, workers=2, progress=False)
    smaller = extract(encoder, some, size=SIZE, batch_size=7, progress=False)
    for name, values in reference.items():
        np.testing.assert_array_equal(loaded[name], values)
        np.testing.assert_allclose(smaller[name], values, rtol=1e-4, atol=1e-5)


def test_modes_come_back_after_an_error_too(manifest: Manifest, encoder: Encoder) -> None:
    encoder.train()
    with pytest.raises(UserError, match="resize"):
        extract(encoder, manifest, size=SIZE, resize=0.2, progress=False)
    assert all(part.training for part in encoder.modules())


def test_without_a_head_there_is_no_final_and_bf16_is_near(manifest: Manifest) -> None:
    bare = Encoder(NARROW, seed=1)
    some = manifest.select(np.arange(8))
    exact = extract(bare, some, size=SIZE, progress=False)
    assert list(exact) == ["stage1", "stage2", "stage3", "stage4"]
    rounded = extract(bare, some, size=SIZE, precision="bf16", progress=False)
    for name, values in exact.items():
        error = np.linalg.norm(rounded[name] - values) / np.linalg.norm(values)
        assert 0 < error < 0.02, name


def test_baselines_are_what_they_say(manifest: Manifest) -> None:
    colours, gray = colour_statistics(manifest), gray_pixels(manifest)
    assert colours.shape == (IMAGES, 21) and gray.shape == (IMAGES, 256)
    with Image.open(manifest.path(17)) as image:
        pixels = np.asarray(image) / 255.0
        small = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BILINEAR)) / 255.0
    for channel in range(3):
        values = pixels[:, :, channel].ravel()
        expected = [values.mean(), values.std(), *np.percentile(values, [10, 25, 50, 75, 90])]
        np.testing.assert_allclose(colours[17, 7 * channel : 7 * channel + 7], expected, rtol=1e-6)
    np.testing.assert_allclose(gray[17].reshape(16, 16), small, rtol=1e-6)


@pytest.fixture(scope="module")
def numbers() -> dict[str, dict[str, np.ndarray]]:
    """Feature sets without images: of encoder "net", stage 2 holds the signal, more of it than stage 1."""
    rng = np.random.default_rng(2)
    signal = np.random.default_rng(3).integers(0, 2, 200)
    sets = {
        "stage1": rng.normal(size=(200, 6)),
        "stage2": rng.normal(size=(200, 6)),
        "stage3": np.ones((200, 3)),
    }
    sets["stage1"][:, 0] += 0.7 * signal
    sets["stage2"][:, :2] += 1.5 * signal[:, None]
    broken = rng.normal(size=(200, 4))
    broken[150, 2] = np.nan
    return {"flat": {"image": rng.normal(size=(200, 2))}, "net": sets, "broken": {"stage1": broken}}


def abstract_manifest(labels: np.ndarray, classes: int = 2) -> Manifest:
    splits = np.array(["train"] * 90 + ["val"] * 40 + ["test"] * 70)
    return Manifest(
        root=Path("nowhere"),
        files=[str(i) for i in range(200)],
        sizes=np.ones((200, 2), dtype=np.int32),
        labels={"y": labels},
        class_names={"y": [f"class_{c}" for c in range(classes)]},
        patients=np.array([f"p{i // 5}" for i in range(200)]),
        splits=splits,
    )


SIGNAL = np.random.default_rng(3).integers(0, 2, 200)


def choices(result: Result) -> list[tuple[Any, ...]]:
    return [(r.encoder, r.features, r.method, r.c, r.validation_auc, r.chosen) for r in result.rows]


def test_test_labels_choose_nothing(numbers: dict[str, dict[str, np.ndarray]]) -> None:
    honest = evaluate_features(numbers, abstract_manifest(SIGNAL), label="y")
    chosen = {(r.features, r.method) for r in honest.rows if r.chosen}
    assert chosen == {("stage2", "knn"), ("stage2", "probe")}
    for seed in range(3):
        shuffled = SIGNAL.copy()
        shuffled[130:] = np.random.default_rng(seed).permutation(shuffled[130:])
        other = evaluate_features(numbers, abstract_manifest(shuffled), label="y")
        assert choices(other) == choices(honest)
        assert [r.test.auc for r in other.rows if r.chosen] != [r.test.auc for r in honest.rows if r.chosen]
    # The validation labels, on the other hand, must matter.
    misled = SIGNAL.copy()
    misled[90:130] = 1 - misled[90:130]
    assert choices(evaluate_features(numbers, abstract_manifest(misled), label="y")) != choices(honest)


def test_rows_are_refitted_on_training_and_validation_and_scored_by_patient(
    numbers: dict[str, dict[str, np.ndarray]],
) -> None:
    manifest = abstract_manifest(SIGNAL)
    result = evaluate_features({"net": {"only": numbers["net"]["stage1"]}}, manifest, label="y", seed=4)
    x, y = numbers["net"]["stage1"].astype(np.float32), SIGNAL
    knn, probe = result.rows
    assert not knn.chosen and not probe.chosen  # of one feature set there is no choice
    votes = knn_probabilities(x[:130], y[:130], x[130:], classes=2)
    assert knn.test.auc == pytest.approx(roc_auc_score(y[130:], votes[:, 1]), abs=1e-12)
    assert probe.c is not None
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=probe.c, tol=1e-10, max_iter=10_000))
    expected = fitted.fit(x[:130].astype(np.float64), y[:130]).predict_proba(x[130:].astype(np.float64))
    assert probe.test.auc == pytest.approx(roc_auc_score(y[130:], expected[:, 1]), abs=2e-3)
    assert manifest.patients is not None
    found = replicates(votes[None, None], y[130:], manifest.patients[130:], "auc", draws=1000, seed=4)
    assert (knn.test.low, knn.test.high) == (found.low, found.high)
    assert knn.test.average_precision == pytest.approx(average_precision_score(y[130:], votes[:, 1]), abs=1e-12)


def test_test_features_choose_nothing_either(numbers: dict[str, dict[str, np.ndarray]]) -> None:
    honest = evaluate_features({"net": numbers["net"]}, abstract_manifest(SIGNAL), label="y")
    moved = {name: values.copy() for name, values in numbers["net"].items()}
    for values in moved.values():
        values[130:] *= -3.0
    assert choices(evaluate_features({"net": moved}, abstract_manifest(SIGNAL), label="y")) == choices(honest)


def test_undefined_is_null_with_its_reason_in_every_output(numbers: dict[str, dict[str, np.ndarray]]) -> None:
    result = evaluate_features(numbers, abstract_manifest(SIGNAL), label="y", context=("Made | up.",))
    for row in result.rows:
        if row.encoder == "broken":
            assert (row.c, row.validation_auc, row.test.auc, row.test.f1) == (None,) * 4
            assert "NaN or infinite" in row.test.notes[0]
        else:
            assert row.test.auc is not None and row.test.low is not None and row.test.high is not None
            assert row.test.low <= row.test.auc <= row.test.high
    constant = next(r for r in result.rows if r.features == "stage3" and r.method == "probe")
    assert constant.test.auc == 0.5

    def refuse(text: str) -> float:
        raise AssertionError(f"{text} is not JSON")

    loaded = json.loads(to_json([result]), parse_constant=refuse)[0]
    assert loaded["images"] == {"train": 90, "validation": 40, "test": 70}
    assert loaded["patients"] == {"train": 18, "validation": 8, "test": 14}
    assert loaded["seed"] == 0 and loaded["draws"] == 1000 and "patients redrawn" in loaded["interval"]
    broken = [r for r in loaded["rows"] if r["encoder"] == "broken"]
    assert len(broken) == 2 and broken[0]["test"]["auc"] is None

    lines = list(csv.DictReader(io.StringIO(to_csv([result]))))
    assert len(lines) == len(result.rows) == 10
    assert lines[-1]["auc"] == "" and "NaN" in lines[-1]["notes"]
    assert float(lines[0]["auc"]) == result.rows[0].test.auc
    assert float(lines[0]["average_precision"]) == result.rows[0].test.average_precision
    assert float(lines[0]["calibration_error"]) == result.rows[0].test.calibration_error

    markdown = to_markdown([result])
    assert markdown.count("| net |") == 3 and "Made \\| up." in markdown
    assert markdown.count("\\* ") >= 2 and "undefined" in markdown
    first = next(row.test for row in result.rows if row.encoder == "net" and row.method == "probe")
    line = next(line for line in markdown.splitlines() if line.startswith("| net | stage1 |"))
    cells = [cell.strip() for cell in line.split("|")]
    assert (cells[6], cells[9]) == (f"{first.average_precision:.3f}", f"{first.calibration_error:.3f}")
    assert len({line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")}) == 1


def test_multiclass_with_a_class_missing_from_the_test_split(
    numbers: dict[str, dict[str, np.ndarray]],
) -> None:
    labels = SIGNAL.copy()
    labels[:20:4] = 2
    result = evaluate_features({"net": numbers["net"]}, abstract_manifest(labels, classes=3), label="y")
    for row in result.rows:
        assert row.test.auc is not None
        assert any("class_2" in note for note in row.test.notes)
    assert result.test_classes["class_2"] == 0


def test_a_test_split_of_one_class_is_undefined_not_an_error(
    numbers: dict[str, dict[str, np.ndarray]],
) -> None:
    labels = SIGNAL.copy()
    labels[130:] = 0
    result = evaluate_features({"net": numbers["net"]}, abstract_manifest(labels), label="y")
    for row in result.rows:
        assert row.test.auc is None and row.test.low is None and row.test.accuracy is not None
        assert row.validation_auc is not None
        assert any("every image is of class class_0" in note for note in row.test.notes)


def test_evaluate_from_files(manifest: Manifest, encoder: Encoder) -> None:
    encoders = {"random": Encoder(NARROW, seed=0), "pretrained": encoder}
    result = evaluate(encoders, manifest, label="warm", size=SIZE, progress=False)
    assert [(r.encoder, r.features) for r in result.rows if r.method == "probe"] == [
        ("colour statistics", "image"),
        ("gray pixels", "16x16"),
        *(("random", f"stage{s}") for s in (1, 2, 3, 4)),
        *(("pretrained", f"stage{s}") for s in (1, 2, 3, 4)),
        ("pretrained", "final"),
    ]
    by_key = {(r.encoder, r.features, r.method): r.test for r in result.rows}
    colour = by_key["colour statistics", "image", "probe"].auc
    gray = by_key["gray pixels", "16x16", "probe"].auc
    assert colour is not None and colour > 0.99
    assert gray is not None and gray < 0.9
    assert sum(r.chosen for r in result.rows) == 4
    assert result.images["test"] == 30 and result.patients is not None and result.patients["test"] == 6


def test_a_bad_label_is_refused_before_any_image_is_read(manifest: Manifest, encoder: Encoder) -> None:
    gone = dataclasses.replace(manifest, root=Path("/nonexistent"))
    with pytest.raises(UserError, match="--label tint"):
        evaluate({"net": encoder}, gone, label="tint", size=SIZE, progress=False)


def test_the_printed_table_is_cut_nowhere_in_a_narrow_terminal(
    numbers: dict[str, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    result = evaluate_features(numbers, abstract_manifest(SIGNAL), label="y")
    print_result(result)
    printed = capsys.readouterr().out
    assert "…" not in printed and "undefined" in printed
    probe = next(row.test for row in result.rows if row.encoder == "net" and row.method == "probe")
    line = next(line for line in printed.splitlines() if line.split()[:2] == ["net", "stage1"])
    assert f"{probe.average_precision:.3f}" in line and f"{probe.calibration_error:.3f}" in line


def test_sixteen_bit_images_are_what_eight_bit_ones_are() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    wide = image.astype(np.uint16) * 257
    torch.testing.assert_close(evaluation_image(wide, size=16), evaluation_image(image, size=16), atol=1e-6, rtol=0)
