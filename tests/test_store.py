"""Reading bytes: files, members of tar shards, rows of arrays, and what is wrong when they cannot be had."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastmoco.data import store
from fastmoco.data.store import Arrays, BadFile, Files, Shards, open_store


def stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def shard(path: Path, members: dict[str, bytes]) -> dict[str, int]:
    """Write a tar; where each member's bytes begin."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return {member.name: member.offset_data for member in tar}


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello")
    files = Files(tmp_path)
    assert files.read("a", None) == files.read("a", stamp(tmp_path / "a")) == files.read("a", (5, 0)) == b"hello"
    with pytest.raises(BadFile, match=r"a: changed since it was checked: 5 bytes, was 1,234"):
        files.read("a", (1234, 0))
    with pytest.raises(BadFile, match="written again"):
        files.read("a", (5, 1))
    os.mkfifo(tmp_path / "pipe")
    reasons = {"b": "no such file", ".": "Is a directory", "pipe": "not a file", "a/b": "cannot be read"}
    for name, reason in reasons.items():
        with pytest.raises(BadFile, match=reason):
            files.read(name, None)


def test_a_bad_file_survives_pickling(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(BadFile("x/y.png", "gone")))
    assert (error.file, error.reason, str(error)) == ("x/y.png", "gone", "x/y.png: gone")


@pytest.mark.parametrize("name", ["a.jpg", "d/" + "n" * 180 + ".jpg", "ü.jpg"])
def test_shards(tmp_path: Path, name: str) -> None:
    """Long and foreign names come with headers of their own in front."""
    data = {"first.jpg": b"1" * 700, name: os.urandom(1000), "empty.jpg": b""}
    offsets = shard(tmp_path / "s.tar", data)
    mtime = stamp(tmp_path / "s.tar")[1]
    shards = Shards(tmp_path)
    for member, expected in data.items():
        assert shards.read(f"s.tar/{member}", (len(expected), mtime), offsets[member]) == expected
        assert shards.read(f"s.tar/{member}", None, offsets[member]) == expected
    whole, at = f"s.tar/{name}", offsets[name]
    for bad, offset, reason in [
        ((999, mtime), at, "1,000 bytes, was 999"),
        ((1000, 5), at, "written again"),
        ((1000, mtime), at + 512, "no member at byte"),
        ((1000, mtime), 10**9, "no member at byte"),
    ]:
        with pytest.raises(BadFile, match=reason):
            shards.read(whole, bad, offset)
    with pytest.raises(BadFile, match="no such shard"):
        shards.read("t.tar/a", None, at)
    os.truncate(tmp_path / "s.tar", at + 10)
    with pytest.raises(BadFile, match="cut short: 10 of 1,000"):
        shards.read(whole, (1000, 0), at)


def test_few_shards_stay_open_and_many_threads_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_OPEN_SHARDS", 2)
    offset = 0
    for i in range(6):
        (offset,) = shard(tmp_path / f"{i}.tar", {"x": bytes([i]) * 5000}).values()
    shards = Shards(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: shards.read(f"{n % 6}.tar/x", None, offset), range(300)))
    assert found == [bytes([n % 6]) * 5000 for n in range(300)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert pickle.loads(pickle.dumps(shards)).read("3.tar/x", None, offset) == bytes([3]) * 5000


def test_arrays(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    gray = np.arange(2 * 4 * 5, dtype=np.uint8).reshape(2, 4, 5)
    colour = np.arange(3 * 4 * 5 * 3, dtype=np.uint16).reshape(3, 4, 5, 3)
    np.savez(path, train_images=gray, test_images=colour)
    arrays = open_store(path, None)
    assert isinstance(arrays, Arrays)
    found = arrays.read("train/000001", stamp(path), None)
    assert isinstance(found, np.ndarray)
    assert found.shape == (4, 5, 3) and all(np.array_equal(found[:, :, c], gray[1]) for c in range(3))
    assert np.array_equal(pickle.loads(pickle.dumps(arrays)).read("test/2", None), colour[2])
    with pytest.raises(BadFile, match="2 images in train_images"):
        arrays.read("train/2", None, None)
    with pytest.raises(BadFile, match="no array 'val_images'"):
        arrays.read("val/0", None, None)
    with pytest.raises(BadFile, match="changed since"):
        arrays.read("train/0", (1, 1), None)


def test_arrays_run_no_code(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", train_images=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BadFile, match="cannot be read"):
        Arrays(tmp_path / "set.npz").read("train/0", None)
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04nothing")
    with pytest.raises(BadFile, match="cannot be read"):
        Arrays(tmp_path / "bad.npz").read("train/0", None)
