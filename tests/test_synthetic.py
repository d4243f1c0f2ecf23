import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastmoco.data.synthetic import draw_patch, draw_tissue
from fastmoco.errors import UserError

SMALL = dict(images=18, side=37, seed=5, patients=8)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "labels.csv", newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Many patients, since it is patients, not patches, that a comparison of colours counts.
    return draw_tissue(tmp_path_factory.mktemp("data") / "tissue", images=400, patients=200, seed=11)


@pytest.fixture(scope="module")
def pixels(tissue: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(tissue / "images" / row["file"])) for row in rows_of(tissue)])


def test_the_same_bytes_twice_and_others_from_another_seed(tmp_path: Path) -> None:
    first = digests(draw_tissue(tmp_path / "a", **SMALL))
    assert digests(draw_tissue(tmp_path / "b", **SMALL)) == first
    other = digests(draw_tissue(tmp_path / "c", **{**SMALL, "seed": 6}))
    images = [name for name in first if name.startswith("images")]
    assert len(images) == SMALL["images"]
    assert len({first[name] for name in images} | {other[name] for name in images}) == 2 * len(images)


def test_a_patch_depends_on_its_index_and_patient_alone(tmp_path: Path) -> None:
    folder = draw_tissue(tmp_path, **SMALL)
    row = rows_of(folder)[11]  # the second round over 8 patients: PNG, so pixels are exact
    assert row["file"].endswith(".png") and row["patient"] == "patient_0003"
    found = np.asarray(Image.open(folder / "images" / row["file"]))
    np.testing.assert_array_equal(found, draw_patch(5, 11, patient=3, side=37))


def test_classes_formats_and_splits_are_balanced_by_patient(tissue: Path) -> None:
    rows = rows_of(tissue)
    assert list(rows[0]) == ["file", "patient", "split", "label"]
    assert {path.name for path in (tissue / "images").iterdir()} == {row["file"] for row in rows}
    patients: dict[str, set[tuple[str, str]]] = {}
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        patients.setdefault(row["patient"], set()).add((row["split"], row["label"]))
        key = (row["split"], row["label"], row["file"].rpartition(".")[2])
        counts[key] = counts.get(key, 0) + 1
    assert len(patients) == 200
    assert all(len(found) == 1 for found in patients.values()), "a patient in two splits or of two classes"
    expected = {"train": 70, "test": 30}
    assert counts == {(s, c, f): n for s, n in expected.items() for c in "01" for f in ("jpg", "png")}


def test_both_formats_decode(tissue: Path, pixels: np.ndarray) -> None:
    assert pixels.shape == (400, 96, 96, 3) and pixels.dtype == np.uint8
    for suffix, magic in ((".jpg", b"\xff\xd8\xff"), (".png", b"\x89PNG")):
        found = next((tissue / "images").glob(f"*{suffix}"))
        assert found.read_bytes().startswith(magic)
    spread = pixels.reshape(400, -1).std(axis=1)
    assert spread.min() > 10, "a patch is nearly blank"


def test_colour_statistics_do_not_tell_the_classes_apart(tissue: Path, pixels: np.ndarray) -> None:
    rows = rows_of(tissue)
    label = np.array([row["label"] == "1" for row in rows])
    test = np.array([row["split"] == "test" for row in rows])
    flat = pixels.reshape(len(rows), -1, 3) / 255
    quantiles = np.percentile(flat, [10, 25, 50, 75, 90], axis=1)
    features = np.concatenate([flat.mean(axis=1), flat.std(axis=1), *quantiles], axis=1)
    for strength in (0.001, 0.1, 10.0):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        probe.fit(features[~test], label[~test])
        assert roc_auc_score(label[test], probe.decision_function(features[test])) < 0.65, f"C = {strength}"


def test_classes_share_the_mean_colour(tissue: Path, pixels: np.ndarray) -> None:
    patient = np.array([int(row["patient"][-4:]) for row in rows_of(tissue)])
    means = np.stack([pixels[patient == p].mean(axis=(0, 1, 2)) for p in range(200)])
    difference = means[1::2] - means[0::2]  # spindled less glandular, within a staining batch
    error = difference.std(axis=0, ddof=1) / np.sqrt(len(difference))
    assert (np.abs(difference.mean(axis=0)) < 3 * error).all()
    assert (error < 2.5).all(), "too coarse a comparison to mean anything"


def test_shape_and_arrangement_do_tell_them_apart(tissue: Path, pixels: np.ndarray) -> None:
    label = [row["label"] == "1" for row in rows_of(tissue)]
    red = gaussian_filter(pixels[..., 0].astype(np.float64), (0, 1, 1))
    dy, dx = np.gradient(red, axis=(1, 2))
    yy, xx, xy = (np.mean(product, axis=(1, 2)) for product in (dy * dy, dx * dx, dy * dx))
    alignment = np.hypot(yy - xx, 2 * xy) / (yy + xx)  # anisotropy of the mean structure tensor
    assert roc_auc_score(label, alignment) > 0.9


def test_a_second_call_rewrites_nothing(tmp_path: Path) -> None:
    folder = draw_tissue(tmp_path, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert draw_tissue(tmp_path, **SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_incomplete_set_is_drawn_afresh(tmp_path: Path) -> None:
    whole = digests(draw_tissue(tmp_path, **SMALL))
    marker = tmp_path / "tissue.json"
    lost = tmp_path / "images" / rows_of(tmp_path)[7]["file"]

    lost.unlink()
    assert digests(draw_tissue(tmp_path, **SMALL)) == whole
    lost.write_bytes(b"")
    marker.write_text('{"complete": false}')
    assert digests(draw_tissue(tmp_path, **SMALL)) == whole
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "generator": 0}))
    lost.write_bytes(b"drawn by another generator")
    assert digests(draw_tissue(tmp_path, **SMALL)) == whole
    marker.write_text('{"compl')
    assert digests(draw_tissue(tmp_path, **SMALL)) == whole


def test_the_marker_is_complete_only_when_everything_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("fastmoco.data.synthetic._split", lambda patient: 1 // (5 - patient))
        with pytest.raises(ZeroDivisionError):
            draw_tissue(tmp_path, **SMALL)
    assert 0 < len(list((tmp_path / "images").iterdir())) < SMALL["images"]
    assert not json.loads((tmp_path / "tissue.json").read_text())["complete"]
    draw_tissue(tmp_path, **SMALL)
    assert len(rows_of(tmp_path)) == SMALL["images"]


def test_another_set_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    draw_tissue(tmp_path, **SMALL)
    draw_tissue(tmp_path, **{**SMALL, "images": 9})
    named = {row["file"] for row in rows_of(tmp_path)}
    assert len(named) == 9 and {path.name for path in (tmp_path / "images").iterdir()} == named


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\nmine.png,1\n")
    with pytest.raises(UserError, match="did not write"):
        draw_tissue(tmp_path, **SMALL)
    with pytest.raises(UserError, match="did not write"):
        draw_tissue(tmp_path / "labels.csv", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]
    assert (tmp_path / "labels.csv").read_text() == "file,label\nmine.png,1\n"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patients": 6}, "patients=6"),
        ({"patients": 9}, "patients=9"),
        ({"images": 7}, "images=7"),
        ({"side": 31}, "side=31"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_numbers_that_make_no_set_are_refused(tmp_path: Path, change: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        draw_tissue(tmp_path / "new", **{**SMALL, **change})
    assert not (tmp_path / "new").exists()
