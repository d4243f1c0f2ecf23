"""Listing, labelling and checking images."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.data import verify
from fastmoco.data.dali import dali_installed
from fastmoco.data.decode import decode
from fastmoco.data.labelled import only_labelled
from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.manifest_file import write_manifest
from fastmoco.data.store import ABSENT, BadFile
from fastmoco.data.verify import Skipped, describe_skipped
from fastmoco.errors import UserError

NEEDS_DALI = pytest.mark.skipif(not dali_installed(), reason="no DALI here")


def picture(path: Path, width: int = 12, height: int = 9, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (value, value // 2, 7)).save(path)
    return path


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_class_folders_become_labels(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/1.jpg", "a/deep/3.PNG"):
        picture(tmp_path / "set" / name)
    (tmp_path / "set" / "notes.txt").write_text("not an image")
    found = load_manifest(tmp_path / "set", progress=False)
    assert found.files == ["a/1.jpg", "a/deep/3.PNG", "b/2.png"]
    assert found.labels["folder"].tolist() == [0, 0, 1]
    assert found.class_names["folder"] == ["a", "b"]
    assert found.sizes.tolist() == [[9, 12]] * 3


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "1.png")
    assert load_manifest(tmp_path / "set", progress=False).labels == {}


def test_csv_columns(tmp_path: Path) -> None:
    rows = []
    for i, (grade, split) in enumerate([("10", "train"), ("2", "train"), ("2", "test")]):
        picture(tmp_path / f"{i}.png")
        rows.append({"file": f"{i}.png", "grade": grade, "patient": f"p{i // 2}", "split": split})
    found = load_manifest(tmp_path, table(tmp_path / "labels.csv", rows), label=["grade"], progress=False)
    assert found.class_names["grade"] == ["2", "10"], "numbers sort as numbers"
    assert found.labels["grade"].tolist() == [1, 0, 0]
    assert found.patients is not None
    assert found.patients.tolist() == ["p0", "p0", "p1"]
    train = found.only_split("train")
    assert train.files == ["0.png", "1.png"]
    assert train.labels["grade"].tolist() == [1, 0]
    with pytest.raises(UserError, match="the splits are test, train"):
        found.only_split("valid")


def test_undecodable_files_are_left_out_and_listed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "c.jpg").write_bytes(b"")
    (tmp_path / "d.jpg").write_text("hello")
    found = load_manifest(tmp_path, progress=False)
    assert found.files == ["a.png"]
    assert [item.file for item in found.skipped] == ["b.png", "c.jpg", "d.jpg"]
    assert all(item.reason for item in found.skipped)


def test_the_check_is_cached_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / "set" / name)
    decoded: list[str] = []

    def spy(data: bytes, name: str) -> np.ndarray:
        decoded.append(name)
        return decode(data, name)

    monkeypatch.setattr(verify, "decode", spy)
    load_manifest(tmp_path / "set", progress=False)
    assert sorted(decoded) == ["a.png", "b.png"]
    decoded.clear()
    load_manifest(tmp_path / "set", progress=False)
    assert decoded == []
    # Same size, another time: checked again, and found to be broken now.
    path = tmp_path / "set" / "b.png"
    path.write_bytes(bytes(len(path.read_bytes())))
    os.utime(path, ns=(1, 1))
    found = load_manifest(tmp_path / "set", progress=False)
    assert decoded == ["b.png"]
    assert [item.file for item in found.skipped] == ["b.png"]


def test_a_manifest_made_by_hand_checks_no_stamps(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    made = Manifest(root=tmp_path, files=["a.png"], sizes=np.array([[9, 12]], dtype=np.int32))
    assert made.dali.tolist() == [True]
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert made.decode(0)[0, 0].tolist() == [100, 50, 7]


def test_a_file_changed_since_it_was_checked_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        picture(tmp_path / name)
    found = load_manifest(tmp_path, progress=False)
    assert found.stamps is not None
    size = (tmp_path / "a.png").stat().st_size
    assert found.stamps[0].tolist() == [size, (tmp_path / "a.png").stat().st_mtime_ns]
    picture(tmp_path / "a.png", width=300, height=200)
    os.utime(tmp_path / "b.png", ns=(1, 1))
    (tmp_path / "c.png").unlink()
    for index, reason in enumerate([f"bytes, was {size:,}", "same number of bytes", "no such file"]):
        with pytest.raises(BadFile, match=reason) as caught:
            found.decode(index)
        assert caught.value.file == str(tmp_path / found.files[index])
    with pytest.raises(BadFile, match=r"d\.png: cannot be decoded \(not an image"):
        found.decode_bytes(3, b"no image")
    with pytest.raises(BadFile, match=r"d\.png: its size is not what it was"):
        found.decode_bytes(3, picture(tmp_path / "other.png", width=5).read_bytes())
    assert found.select(np.array([3])).decode(0).shape == (9, 12, 3)


def test_a_damaged_cache_is_ignored(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.png")
    load_manifest(tmp_path / "set", progress=False)
    (cache,) = (tmp_path / "cache" / "fastmoco").iterdir()
    cache.write_text("{")
    assert len(load_manifest(tmp_path / "set", progress=False)) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: load_manifest(p / "none"), "no such folder"),
        (lambda p: load_manifest(picture(p / "x.png")), "not a folder"),
        (lambda p: load_manifest(p), "no images in it"),
        (lambda p: load_manifest(picture(p / "x.png").parent, label=["idc"]), "--labels"),
        (lambda p: load_manifest(p, p / "none.csv"), "no such file"),
        (lambda p: load_manifest(p, p), "--labels .*: a folder; name the file"),
        (lambda p: load_manifest(p, text(p / "l.csv", "id;file\n1;a")), "columns are separated by ';'; save it"),
        (lambda p: load_manifest(p, text(p / "l.csv", '"file"\t"a,b"\nx\t1')), r"columns are separated by '\\t'"),
        (lambda p: load_manifest(text(p / "x.npz", "").parent), r"an \.npz file is given by itself: --data .*x\.npz"),
        (lambda p: load_manifest(p, table(p / "l.csv", [{"path": "a"}])), "no column 'file'; its columns are path"),
        (lambda p: load_manifest(p, table(p / "l.csv", [{"file": "a"}]), label=["x"]), "no column 'x'"),
        (lambda p: load_manifest(p, table(p / "l.csv", [{"file": "gone.png"}])), "'gone.png'"),
        (lambda p: load_manifest(p, table(p / "l.csv", [{"file": "", "y": "1"}])), "line 2: column 'file' is empty"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path)  # type: ignore[operator]


def test_a_label_with_one_value_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows = table(tmp_path / "l.csv", [{"file": "a.png", "y": "1"}])
    with pytest.raises(UserError, match="same value"):
        load_manifest(tmp_path, rows, label=["y"], progress=False)


def test_a_file_listed_twice_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows = table(tmp_path / "l.csv", [{"file": "a.png"}, {"file": "./a.png"}])
    with pytest.raises(UserError, match="more than once"):
        load_manifest(tmp_path, rows, progress=False)


def test_links_in_circles_and_links_to_nothing(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "self").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "nowhere")
    found = load_manifest(tmp_path / "set", progress=False)
    assert found.files == ["a.png"]
    assert [item.file for item in found.skipped] == ["gone.png"]


def test_what_may_pass_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "set" / "a.png")
    picture(tmp_path / "set" / "b.png")

    def flaky(data: bytes, name: str) -> np.ndarray:
        if name == "b.png":
            raise MemoryError
        return decode(data, name)

    with monkeypatch.context() as patch:
        patch.setattr(verify, "decode", flaky)
        assert load_manifest(tmp_path / "set", progress=False).files == ["a.png"]
    assert load_manifest(tmp_path / "set", progress=False).files == ["a.png", "b.png"]


@pytest.mark.parametrize("decoder", ["pillow", pytest.param("dali", marks=NEEDS_DALI)])
def test_names_that_are_not_utf8(tmp_path: Path, decoder: str) -> None:
    good = picture(tmp_path / "set" / "a.png")
    os.rename(good, os.fsencode(tmp_path / "set") + b"/caf\xe9.png")
    found = load_manifest(tmp_path / "set", decoder=decoder, progress=False)
    assert len(found) == 1
    assert found.decode(0).shape == (9, 12, 3)


def test_words_that_parse_as_odd_numbers_are_words(tmp_path: Path) -> None:
    rows = []
    for i, value in enumerate(["nan", "2", "inf", "10", "b"]):
        picture(tmp_path / f"{i}.png")
        rows.append({"file": f"{i}.png", "y": value})
    found = load_manifest(tmp_path, table(tmp_path / "l.csv", rows), label=["y"], progress=False)
    assert found.class_names["y"] == ["2", "10", "b", "inf", "nan"]


@pytest.mark.parametrize("option", ["patient_column", "split_column"])
def test_a_column_that_is_named_must_be_there(tmp_path: Path, option: str) -> None:
    picture(tmp_path / "a.png")
    listed = table(tmp_path / "l.csv", [{"file": "a.png", "fold": "train"}])
    findings = tmp_path / "list.txt"
    findings.write_text("a.png" + " 0" * 14 + "\n")
    found = load_manifest(tmp_path, listed, progress=False, **{option: "fold"})
    assert (found.splits if option == "split_column" else found.patients).tolist() == ["train"]
    write_manifest(tmp_path / "m.csv", found)
    said = f"--{option.replace('_', '-')} flod: .* has no such column; its columns are "
    for path, columns in (
        (None, "none"), (listed, "file, fold"), (tmp_path / "m.csv", "file, height"), (findings, "none")
    ):  # fmt: skip
        assert load_manifest(tmp_path, path, progress=False).files == ["a.png"], "the usual names may be missing"
        with pytest.raises(UserError, match=said + rf"\(?{columns}"):
            load_manifest(tmp_path, path, progress=False, **{option: "flod"})


def test_listed_files_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    for name in ("a.png", "c.png"):
        picture(tmp_path / name)
    rows = [{"file": name, "y": y} for name, y in (("a.png", "1"), ("b.png", "2"), ("c.png", "3"))]
    found = load_manifest(tmp_path, table(tmp_path / "l.csv", rows), label=["y"], progress=False)
    assert found.files == ["a.png", "c.png"] and [str(item) for item in found.skipped] == ["b.png: no such file"]
    assert [found.class_names["y"][i] for i in found.labels["y"]] == ["1", "3"]
    bare = table(tmp_path / "bare.csv", [{"file": "c"}, {"file": "a"}])
    with pytest.raises(UserError, match=r"none of its 2 files .* first 'c'; .*with their suffix: c\.png is there"):
        load_manifest(tmp_path, bare, progress=False)


def test_files_not_there_are_counted_apart_from_others(tmp_path: Path) -> None:
    skipped = [Skipped("x.png", "empty"), Skipped("a.png", ABSENT), Skipped("b.png", ABSENT)]
    said = "left out 2 files, the first a.png: no such file; and 1 file, the first x.png: empty"
    assert describe_skipped(skipped) == said
    assert describe_skipped(skipped[:1]) == "left out 1 file, the first x.png: empty"


def test_images_without_a_class(tmp_path: Path) -> None:
    rows = [
        {"file": f"{i}.png", "kind": kind, "side": side}
        for i, (kind, side) in enumerate([("10", "l"), ("", "r"), ("9", "r"), ("10", "")])
    ]
    for row in rows:
        picture(tmp_path / row["file"])
    listed = table(tmp_path / "l.csv", rows)
    write_manifest(tmp_path / "m.csv", load_manifest(tmp_path, listed, all_labels=True, progress=False))
    for path in (listed, tmp_path / "m.csv"):
        found = load_manifest(tmp_path, path, label=["kind", "side"], progress=False)
        assert found.known_classes("kind") == ["9", "10"]
        assert found.classes("kind").tolist() == [1, -1, 0, 1] and found.classes("side").tolist() == [0, 1, 1, -1]
        known = only_labelled(found, ["kind", "side"])
        assert known.files == ["0.png", "2.png"] and known.class_names == {"kind": ["9", "10"], "side": ["l", "r"]}
        assert known.labels["kind"].tolist() == [1, 0] and known.labels["side"].tolist() == [0, 1]
        assert only_labelled(known, ["kind"]).labels.keys() == {"kind"}
        assert only_labelled(known, ["kind"]).class_names == {"kind": ["9", "10"]}
        one = found.select(np.array([0, 1, 3]))
        with pytest.raises(UserError, match=r"--label kind: 1 of 3 images have a class in all of kind, side, and"):
            only_labelled(one, ["kind", "side"])
        with pytest.raises(UserError, match=r"--label kind: 2 of 3 images have a class, and those .* of class '10'"):
            only_labelled(one, ["kind"])
        with pytest.raises(UserError, match=r"--label kind: 0 of 1 images have a class; there is nothing"):
            only_labelled(found.select(np.array([1])), ["kind"])


def test_what_an_image_that_is_not_there_would_be_is_no_class(tmp_path: Path) -> None:
    rows = [{"file": f"{i}.png", "kind": "ab"[i % 2]} for i in range(4)]
    for row in rows:
        picture(tmp_path / row["file"])
    listed = table(tmp_path / "l.csv", [*rows, {"file": "gone.png", "kind": ""}])
    found = only_labelled(load_manifest(tmp_path, listed, label=["kind"], progress=False), ["kind"])
    assert found.class_names == {"kind": ["a", "b"]} and found.labels["kind"].tolist() == [0, 1, 0, 1]


def test_classes_of_images_that_lack_another_are_left_out_with_them(tmp_path: Path) -> None:
    rows = [{"file": f"{i}.png", "kind": "azb"[i % 3], "side": "" if i % 3 == 1 else "lr"[i % 2]} for i in range(6)]
    for row in rows:
        picture(tmp_path / row["file"])
    found = load_manifest(tmp_path, table(tmp_path / "l.csv", rows), label=["kind", "side"], progress=False)
    assert only_labelled(found, ["kind"]).class_names == {"kind": ["a", "b", "z"]}
    both = only_labelled(found, ["kind", "side"])
    assert both.class_names["kind"] == ["a", "b"] and both.labels["kind"].tolist() == [0, 1, 0, 1]


def test_every_column_that_may_be_a_label_where_all_are_asked_for(tmp_path: Path) -> None:
    rows = []
    for i in range(3):
        picture(tmp_path / f"{i}.png")
        rows.append({"": str(i), "path": f"{i}.png", "site": "x", "y": "ab"[i > 1], "z": ("", "u", "v")[i]})
        rows[i] |= {"patient": f"p{i}", "fold": "train" if i else "test"}
    listed = table(tmp_path / "l.csv", rows)
    columns = {"file_column": "path", "split_column": "fold", "progress": False}
    found = load_manifest(tmp_path, listed, all_labels=True, **columns)
    assert found.class_names == {"y": ["a", "b"], "z": ["", "u", "v"]}
    assert found.patients is not None and found.patients.tolist() == ["p0", "p1", "p2"]
    assert set(load_manifest(tmp_path, listed, label=["y"], all_labels=True, **columns).labels) == {"y"}
    assert load_manifest(tmp_path, listed, **columns).labels == {}, "training and evaluation take what they are told"
    many = [{"file": "0.png", "n": "0"}, *({"file": f"gone{i}.png", "n": str(i)} for i in range(1, 1001))]
    assert load_manifest(tmp_path, table(tmp_path / "m.csv", many[:1000]), all_labels=True, progress=False).labels
    assert not load_manifest(tmp_path, table(tmp_path / "m.csv", many), all_labels=True, progress=False).labels
