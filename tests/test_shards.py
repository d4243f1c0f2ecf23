"""Shards that are damaged, linked or oddly named: every image is listed, or there is a reason."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from test_listing import load, png, said, shard

from fastmoco.data.manifest_file import is_manifest_file, write_manifest
from fastmoco.data.members import read_members
from fastmoco.errors import UserError

BLOCK = tarfile.BLOCKSIZE


def headers(path: Path) -> dict[str, int]:
    with tarfile.open(path) as tar:
        return {member.name: member.offset for member in tar}


@pytest.mark.parametrize("rot", [b"\xff" * 8, bytes(BLOCK)], ids=["rotten", "zeroed"])
def test_a_rotten_header_hides_nothing(tmp_path: Path, rot: bytes) -> None:
    path = shard(tmp_path / "s.tar", {f"{i}.png": png(i) for i in range(5)})
    at = headers(path)["3.png"]
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + rot + whole[at + len(rot) :])
    for _ in range(2):
        with pytest.raises(UserError, match=rf"s\.tar: damaged at byte {at:,}, after member 2\.png; copy"):
            load(path)
    with pytest.raises(UserError, match="damaged"):
        read_members(path)
    path.write_bytes(whole)
    assert len(load(path)) == 5


def test_a_shard_cut_between_two_members_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", {f"{i}.png": png(i) for i in range(5)})
    at = headers(path)["3.png"]
    for length in (at, at + 100, at + BLOCK - 1):
        os.truncate(path, length)
        with pytest.raises(UserError, match=rf"s\.tar: damaged at byte {at:,}, after member 2\.png"):
            load(path)
        path.write_bytes(path.read_bytes() + bytes(2 * BLOCK))
    os.truncate(path, at)
    path.write_bytes(path.read_bytes() + bytes(BLOCK))
    assert len(load(path)) == 3, "one block of zeros is an end"


def test_links_stand_for_what_they_name(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("./a/1.png", png(1)), ("./a/1.cls", b"x"), ("./b/2.png", png(2))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind, target in (
            ("./b/3.png", tarfile.LNKTYPE, "./a/1.png"),
            ("./b/3.cls", tarfile.LNKTYPE, "./a/1.cls"),
            ("./b/4.png", tarfile.SYMTYPE, "../b/2.png"),
            ("./b/5.png", tarfile.LNKTYPE, "./gone.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    found = load(path)
    assert found.files == [f"s.tar/{name}.png" for name in ("a/1", "b/2", "b/3", "b/4")]
    assert [int(found.decode(i)[0, 0, 0]) for i in range(4)] == [1, 2, 1, 2]
    assert [str(item) for item in found.skipped] == [
        "s.tar/b/5.png: a link to ./gone.png, which is not in its shard"
    ]


def test_shards_in_capitals(tmp_path: Path) -> None:
    found = load(shard(tmp_path / "A.TAR", {"x/1.png": png(1), "y/2.png": png(2)}).parent)
    assert found.files == ["A.TAR/x/1.png", "A.TAR/y/2.png"] and found.decode(1)[0, 0, 0] == 2


def test_json_too_deep_is_named(tmp_path: Path) -> None:
    deep = b"[" * 200_000 + b"]" * 200_000
    with pytest.raises(UserError, match=r"s\.tar, member a\.json: cannot be read as JSON"):
        load(shard(tmp_path / "s.tar", {"a.png": png(), "a.json": deep}))


def described(folder: Path, **more: Any) -> Path:
    """A shard whose JSON has the keys that image downloaders write."""
    members = {}
    for i in range(4):
        members[f"{i}.png"] = png(i)
        words = {"width": 10 + i, "height": 9 + i, "file": f"{i}", "grade": i % 2, **{k: v[i] for k, v in more.items()}}
        members[f"{i}.json"] = json.dumps(words).encode()
    return shard(folder / "s.tar", members).parent


def test_labels_named_as_a_manifests_columns_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load(described(tmp_path / "shards"))
    assert set(found.labels) == {"grade"} and said(found, "grade") == ["0", "1", "0", "1"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "file, height, width not taken as labels" in shown and "--label" in shown
    write_manifest(tmp_path / "m.csv", found)
    assert is_manifest_file(tmp_path / "m.csv")
    assert set(load(tmp_path / "shards", label=["height"]).labels) == {"height"}, "what is asked for is there"
    assert "left out" not in capsys.readouterr().out


@contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """As nobody, to whom folders are not all open as they are to root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o700)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "s.txt").write_bytes(b"")
    folder.chmod(0)
    tmp_path.chmod(0)
    with without_rights(tmp_path):
        for path in (folder, folder / "s.txt", folder / "s.tar"):
            with pytest.raises(UserError, match=rf"--data {path}: cannot be read: Permission denied"):
                load(path)
    folder.chmod(0o700)


@pytest.mark.parametrize("mode", [0, 0o444, 0o111])
def test_a_folder_that_may_be_found_but_not_listed_is_named(mode: int) -> None:
    # Not below pytest's own folder, which only its owner may enter.
    with TemporaryDirectory() as base:
        folder = Path(base) / "set"
        folder.mkdir()
        (folder / "s.txt").write_bytes(b"")
        Path(base).chmod(0o755)
        folder.chmod(mode)
        with (
            without_rights(folder),
            pytest.raises(UserError, match=rf"--data {folder}: cannot be listed: Permission denied"),
        ):
            load(folder)
