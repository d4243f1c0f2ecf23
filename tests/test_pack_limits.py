"""Packing beside another process, on a full disk, of large files and of files with odd times."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRuns
from pathlib import Path

import pytest
from test_pack import assert_packed, load, packed_in, shards

from fastmoco.data import pack as pack_module
from fastmoco.data.manifest import Manifest
from fastmoco.data.pack import pack
from fastmoco.errors import UserError
from runs import draw_images


@pytest.fixture
def source(tmp_path: Path) -> Manifest:
    return load(draw_images(tmp_path / "data"))


def test_two_that_pack_into_one_folder_take_turns(
    source: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    out.mkdir()
    half = out / ".shard-000000.tar.tmp-1"
    half.write_bytes(b"of the other")
    with ThreadPoolExecutor() as pool:
        with (out / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            job = pool.submit(packed_in, source, out)
            with pytest.raises(StillRuns):
                job.result(timeout=0.5)
            assert half.exists() and not shards(out)
        job.result()
    assert f"waiting for another process, which is packing into {out}" in capsys.readouterr().out
    assert_packed(out, source)


def test_a_disk_without_locks_is_packed_to_with_a_warning(
    source: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    packed_in(source, tmp_path / "shards")
    assert "has no locks; see that no other process is packing into it" in capsys.readouterr().out
    assert_packed(tmp_path / "shards", source)


def test_a_full_disk(
    source: Manifest, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_disk = mounted("40k")
    with pytest.raises(UserError, match=r"small: about \d+\.?\d* kB are to be written, and 41 kB are free; make"):
        packed_in(source, small_disk)
    assert not shards(small_disk)
    # Filled by others after that: the room was there, and is no more.
    plenty = shutil.disk_usage("/")
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda _: plenty)
    with pytest.raises(UserError, match=r"the disk is full\. [1-9] of \d shards? finished; run the same"):
        packed_in(source, small_disk)
    before = shards(small_disk)
    assert before and not list(small_disk.glob(".*.tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=2M", str(small_disk)], check=True)
    packed_in(source, small_disk)
    assert shards(small_disk).items() >= before.items()
    assert_packed(small_disk, source)


def test_files_from_before_1970_and_after_2242(source: Manifest, tmp_path: Path) -> None:
    for i, time in ((0, -(10**18)), (1, 9 * 10**18)):
        os.utime(source.path(i), ns=(time, time))
    again = load(source.root)
    packed_in(again, tmp_path / "shards")
    assert_packed(tmp_path / "shards", again)


def test_large_files_are_read_few_at_a_time(
    source: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert source.stamps is not None
    most = int(source.stamps[:, 0].max())
    monkeypatch.setattr(pack_module, "_AHEAD_BYTES", 2 * most)
    held = [0]
    peak = []
    read = Manifest.read

    class Taken(bytes):
        """Bytes that are counted as long as something holds them."""

        def __del__(self) -> None:
            held[0] -= len(self)

    def counted(manifest: Manifest, index: int) -> bytes:
        data = Taken(read(manifest, index))  # type: ignore[arg-type]
        held[0] += len(data)
        peak.append(held[0])
        return data

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "read", counted)
        pack(source, tmp_path / "shards", shard_bytes=10**6, workers=2, progress=False)
    # The one that is being written comes on top.
    assert len(peak) == 24 and most < max(peak) <= 3 * most + most
    assert_packed(tmp_path / "shards", source)
