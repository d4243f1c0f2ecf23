"""What images there are and what is said of them: folders, lists, arrays and shards."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmoco.data import shards
from fastmoco.data.listing import FINDINGS, list_folder
from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.pack import pack
from fastmoco.data.store import BadFile
from fastmoco.errors import UserError


def png(value: int = 100, width: int = 12) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, 9), (value, value // 2, 7)).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(i))
    return folder


def load(data: Path, labels: Path | None = None, **options: Any) -> Manifest:
    return load_manifest(data, labels, progress=False, **options)


def said(manifest: Manifest, name: str) -> list[str]:
    return [manifest.class_names[name][i] for i in manifest.labels[name]]


def test_train_and_test_folders_are_splits(tmp_path: Path) -> None:
    found = load(write(tmp_path, ["train/a/1.png", "train/b/2.png", "valid/a/3.png", "test/b/4.png"]))
    assert found.splits is not None
    assert found.files[0] == "test/b/4.png"
    assert found.splits.tolist() == ["test", "train", "train", "val"]
    assert said(found, "folder") == ["b", "a", "b", "a"]
    # Without class folders below them, or without "train", they are classes like any other.
    (tmp_path / "train" / "5.png").write_bytes(png())
    assert load(tmp_path).splits is None


def test_histology_patches_tell_patient_and_class(tmp_path: Path) -> None:
    names = [f"{p}/{c}/{p}_idx5_x{i}_y1_class{c}.png" for p, c, i in ((8, 0, 1), (8, 1, 2), (10, 0, 3))]
    found = load(write(tmp_path, names))
    assert found.patients is not None
    assert found.files == sorted(names)
    assert found.patients.tolist() == ["10", "8", "8"]
    assert said(found, "class") == ["0", "0", "1"] and set(found.labels) == {"class"}
    write(tmp_path, ["9/1/9_idx5_class0.png"])
    assert load(tmp_path).patients is None, "where a name contradicts its folder, neither is believed"


def test_dicom_files_without_a_suffix_are_found(tmp_path: Path) -> None:
    write(tmp_path, ["a.png"])
    dicom = bytes(128) + b"DICM"
    for name in ("IM0001", "1.2.840.77", "b.DCM", "c.dicom"):
        (tmp_path / name).write_bytes(dicom)
    for name in ("README", "notes.1", "d.txt"):
        (tmp_path / name).write_bytes(b"something" * 20)
    (tmp_path / "e.txt").write_bytes(dicom)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert list_folder(tmp_path).files == ["1.2.840.77", "IM0001", "a.png", "b.DCM", "c.dicom"]


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\t"])
def test_a_list_of_findings(tmp_path: Path, separator: str) -> None:
    names = ["00000001_000.png", "00000001_001.png", "00000002_000.png"]
    rows = np.zeros((3, 14), dtype=int)
    rows[1, 0] = rows[2, 13] = rows[0, 4] = rows[1, 4] = rows[2, 4] = 1
    lines = [separator.join([name, *map(str, row)]) for name, row in zip(names, rows.tolist(), strict=True)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n\n")
    found = load(write(tmp_path / "images", names), tmp_path / "list.txt")
    assert found.files == names
    assert said(found, "Atelectasis") == ["0", "1", "0"] and said(found, "Hernia") == ["0", "0", "1"]
    assert set(found.labels) == {"Atelectasis", "Hernia"}, "the others are the same for all"
    assert FINDINGS[4] == "Mass" and len(FINDINGS) == 14
    assert found.patients is not None and found.patients.tolist() == ["00000001", "00000001", "00000002"]
    assert set(load(tmp_path / "images", tmp_path / "list.txt", label=["Hernia"]).labels) == {"Hernia"}
    with pytest.raises(UserError, match="Mass: every image has the same"):
        load(tmp_path / "images", tmp_path / "list.txt", label=["Mass"])
    (tmp_path / "list.txt").write_text(lines[0] + "\n" + names[1] + " 0 1\n")
    with pytest.raises(UserError, match="line 2: not a name and 14 numbers"):
        load(tmp_path / "images", tmp_path / "list.txt")


def test_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {split: rng.integers(0, 256, (n, 28, 30), dtype=np.uint8) for split, n in (("train", 5), ("test", 3))}
    labels = {"train": np.array([0, 1, 2, 10, 0]), "test": np.array([[1], [0], [2]], dtype=np.uint8)}
    arrays = {f"{split}_images": values for split, values in images.items()}
    arrays |= {f"{split}_labels": values for split, values in labels.items()}
    path = tmp_path / "set.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    found = load(path, decoder="dali")
    assert len(found) == 8 and found.files[5:] == ["test/000000", "test/000001", "test/000002"]
    assert found.sizes.tolist() == [[28, 30]] * 8
    assert found.class_names["label"] == ["0", "1", "2", "10"]
    assert found.labels["label"].tolist() == [0, 1, 2, 3, 0, 1, 0, 2]
    assert not found.dali.any()
    test = found.only_split("test")
    for i in range(3):
        assert np.array_equal(test.decode(i), np.repeat(images["test"][i][:, :, None], 3, axis=2))
    os.utime(path, ns=(1, 1))
    with pytest.raises(BadFile, match="written again"):
        load(path).__class__(**{**vars_of(found)}).decode(0)
    np.savez(path, **arrays, train_labels2=np.zeros(1))  # type: ignore[arg-type]
    assert load(path).labels["label"].tolist() == found.labels["label"].tolist()


def vars_of(manifest: Manifest) -> dict[str, Any]:
    """The fields of a manifest, for another that shares nothing with it."""
    return {name: value for name, value in vars(manifest).items() if not name.startswith("_")}


def test_arrays_with_several_labels_or_none(tmp_path: Path) -> None:
    images = np.zeros((4, 8, 8, 3), dtype=np.uint16)
    table = np.array([[0, 1], [1, 0], [1, 1], [0, 0]])
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=table)
    found = load(tmp_path / "a.npz")
    assert {name: found.labels[name].tolist() for name in found.labels} == {
        "label_0": [0, 1, 1, 0],
        "label_1": [1, 0, 1, 0],
    }
    assert found.decode(0).dtype == np.uint16
    np.savez(tmp_path / "b.npz", train_images=images, test_images=images, test_labels=table)
    assert load(tmp_path / "b.npz").labels == {}


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": np.zeros((2, 8, 8), np.uint8)}, "none of train_images"),
        ({"train_images": np.zeros((2, 8, 8), np.float32)}, r"train_images is float32 of shape \(2, 8, 8\)"),
        ({"train_images": np.zeros((2, 8, 8, 8), np.uint8)}, r"shape \(2, 8, 8, 8\)"),
        ({"train_images": np.zeros((2, 8, 8), np.uint8), "train_labels": np.zeros(3)}, "3 rows for 2 images"),
        ({"train_images": np.array([{}], dtype=object)}, "cannot be read as .npz"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], reason: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=reason):
        load(tmp_path / "a.npz")


def test_medmnist_is_read_as_it_is_described(real_data: Callable[[str], Path]) -> None:
    folder = real_data("medmnist_28")
    for name, counts in {"breastmnist": (546, 78, 156), "pneumoniamnist": (4708, 524, 624)}.items():
        found = load(folder / f"{name}.npz")
        assert found.splits is not None
        assert tuple((found.splits == split).sum() for split in ("train", "val", "test")) == counts
        with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
            first = sum(counts[:2])
            assert np.array_equal(found.labels["label"][first:], arrays["test_labels"].ravel())
            assert np.array_equal(found.decode(first + 7)[:, :, 2], arrays["test_images"][7])


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def packed(folder: Path, *, count: int = 6, per: int = 2) -> Path:
    """Shards of `per` images each, with .json beside them."""
    for first in range(0, count, per):
        members = {}
        for i in range(first, first + per):
            words = {"grade": i % 3, "patient": f"p{i // 2}", "split": "train" if i < 4 else "test", "boxes": [1, 2]}
            members[f"dir/key{i}.png"] = png(i, width=10 + i)
            members[f"dir/key{i}.json"] = json.dumps(words | ({"rare": 1} if i else {})).encode()
        shard(folder / f"shard-{first // per:06d}.tar", members)
    return folder


def test_shards(tmp_path: Path) -> None:
    found = load(packed(tmp_path))
    assert found.files[:3] == [
        "shard-000000.tar/dir/key0.png", "shard-000000.tar/dir/key1.png", "shard-000001.tar/dir/key2.png",
    ]  # fmt: skip
    assert found.sizes.tolist() == [[9, 10 + i] for i in range(6)]
    assert set(found.labels) == {"grade"}, "lists are no labels, nor is what some lack"
    assert found.labels["grade"].tolist() == [0, 1, 2, 0, 1, 2]
    assert found.patients is not None and found.patients.tolist() == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert [found.decode(i)[0, 0, 0] for i in range(6)] == list(range(6))
    assert found.only_split("test").decode(1)[0, 0, 0] == 5
    with pytest.raises(UserError, match=r"--split-column fold: .* its columns are grade, patient, split"):
        load(tmp_path / "shard-000001.tar", split_column="fold")
    one = load(tmp_path / "shard-000001.tar")
    assert one.files == found.files[2:4] and one.decode(1)[0, 0, 0] == 3


def test_shards_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed(tmp_path / "shards")
    before = load(folder)
    read: list[str] = []
    original = shards._rows
    monkeypatch.setattr(shards, "_rows", lambda path: read.append(path.name) or original(path))
    again = load(folder)
    assert read == [] and again.files == before.files and again.labels["grade"].tolist() == [0, 1, 2, 0, 1, 2]
    os.utime(folder / "shard-000001.tar", ns=(1, 1))
    load(folder)
    assert read == ["shard-000001.tar"]
    with pytest.raises(BadFile, match="written again"):
        before.decode(2)
    assert before.decode(1)[0, 0, 0] == 1


def test_shards_with_cls_dots_and_folders(tmp_path: Path) -> None:
    members = {"./a.b/k.png": png(1), "./a.b/k.cls": b"7\n", "./k.seg.png": png(2), "./.hidden.png": png(3),
               "./k.jpg": png(4), "./k.cls": b"8"}  # fmt: skip
    found = load(shard(tmp_path / "cls" / "s.tar", members))
    assert found.files == ["s.tar/a.b/k.png", "s.tar/k.jpg"]
    assert said(found, "cls") == ["7", "8"]
    assert [found.decode(i)[0, 0, 0] for i in range(2)] == [1, 4]
    plain = load(shard(tmp_path / "plain" / "s.tar", {"x/1.png": png(), "y/2.png": png()}))
    assert said(plain, "folder") == ["x", "y"]


def test_damaged_members_are_left_out_and_a_shard_cut_short_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", {"a.png": png(1), "b.png": b"nothing", "c.png": png(3) + bytes(3000)})
    found = load(path)
    assert found.files == ["s.tar/a.png", "s.tar/c.png"]
    assert [str(item) for item in found.skipped] == ["s.tar/b.png: not an image of a kind that is read"]
    with tarfile.open(path) as tar:
        end = tar.getmember("c.png").offset_data + 100
    os.truncate(path, end)
    with pytest.raises(UserError, match=r"s\.tar: cannot be read .* unexpected end of data"):
        load(path)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.png": png(), "a.json": b"{"}, r"s.tar, member a.json: cannot be read as JSON"),
        ({"a.png": png(), "a.json": b"[1]"}, "must be a JSON object"),
        ({"a.png": png(), "a.json": b" " * 2_000_000}, "2,000,000 bytes are too many"),
        ({"a.txt": b"1"}, "no images in its 1 shard$"),
    ],
)
def test_bad_shards_are_named(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load(shard(tmp_path / "s.tar", members))


def test_a_rotten_shard_ends_in_images_or_a_reason(tmp_path: Path) -> None:
    """Bytes of headers and members changed, 150 ways: never another exception."""
    rng = np.random.default_rng(3)
    whole = shard(tmp_path / "whole.tar", {f"{i}.{end}": data for i in range(3) for end, data in
                                           (("png", png(i)), ("json", b'{"y": %d}' % i))}).read_bytes()  # fmt: skip
    outcomes = set()
    for i in range(150):
        data = bytearray(whole)
        for place in rng.integers(6 * 1024, size=4):
            data[place] = rng.integers(256)
        path = tmp_path / f"{i}.tar"
        path.write_bytes(data)
        try:
            outcomes.add(len(load(path)))
        except UserError as error:
            assert str(error)
            outcomes.add(-1)
    assert {-1, 3} <= outcomes


def test_what_is_no_tar_is_named_and_other_files_beside_shards_are_none(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=r"s\.tar: cannot be read as an uncompressed tar"):
        load(tmp_path)
    write(tmp_path, ["a.png"])
    assert load(tmp_path).files == ["a.png"], "a folder of images that happens to hold a tar file"
    with pytest.raises(UserError, match="brings its own labels"):
        load(tmp_path / "s.tar", tmp_path / "a.png")
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "t.tar")


def test_names_that_are_elsewhere_are_found(tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("file,kind\n000.png,1\n001.png,0\n")
    write(tmp_path / "images", ["000.png", "001.png"])
    with pytest.raises(UserError, match=r"none of its 2 files is under .*relative to --data: it is in .*images$"):
        load(tmp_path, labels)
    pack(load(tmp_path / "images"), tmp_path / "shards", shard_bytes=1 << 20, progress=False)
    with pytest.raises(UserError, match=r"holds packed images, .* pack them again with --labels$"):
        load(tmp_path / "shards", labels)
