"""Staging: copies that are the originals, made once, whatever ends the process that makes them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastmoco.data import stage as stage_module
from fastmoco.data.manifest import Manifest
from fastmoco.data.stage import stage
from fastmoco.data.store import BadFile
from fastmoco.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def files(root: Path, count: int = 20, size: int = 3000) -> Manifest:
    """Files of random bytes in two folders, and one whose name has a blank and an umlaut."""
    rng = np.random.default_rng(0)
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(count - 1)] + ["a/ü x.png"]
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(size))
        os.utime(path, ns=(0, 1_700_000_000_123_456_000 + i))
    return listed(root)


def listed(root: Path) -> Manifest:
    """What `files` wrote."""
    paths = sorted(root.rglob("*.png"))
    stamps = np.array([(path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
    names = [path.relative_to(root).as_posix() for path in paths]
    return Manifest(root=root, files=names, sizes=np.full((len(paths), 2), 8, np.int32), stamps=stamps)


def identities(manifest: Manifest) -> list[tuple[int, int]]:
    """What a file has for its own, and another in its place would not."""
    return [(found.st_ino, found.st_ctime_ns) for i in range(len(manifest)) if (found := manifest.path(i).stat())]


def assert_staged(staged: Manifest, original: Manifest, folder: Path) -> None:
    assert staged.root.parent == folder and staged.files == original.files
    for i in range(len(original)):
        # Reading checks the recorded size and time too.
        assert staged.read(i) == original.read(i)


def test_copies_are_the_originals_and_are_made_once(tmp_path: Path) -> None:
    original = files(tmp_path / "data")
    staged = stage(original, tmp_path / "disk", progress=False)
    assert_staged(staged, original, tmp_path / "disk")
    before = identities(staged)
    again = stage(original, tmp_path / "disk", progress=False)
    assert again.root == staged.root and identities(again) == before
    # Only what changed is copied again; what changed since it was recorded is refused by reading, as without staging.
    changed = original.path(3)
    changed.write_bytes(b"another")
    staged.path(5).unlink()
    os.utime(staged.path(7), ns=(0, 1))
    after = identities(stage(original, tmp_path / "disk", progress=False))
    assert [i for i in range(20) if after[i] != before[i]] == [5, 7]
    with pytest.raises(BadFile, match="changed"):
        original.read(3)
    assert not list(staged.root.glob(".halves/*"))


def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the disk keep even seconds, as FAT does."""
    utime = os.utime
    step = 2 * 10**9
    monkeypatch.setattr(os, "utime", lambda path, ns: utime(path, ns=(ns[0] // step * step, ns[1] // step * step)))


def test_copies_on_a_disk_of_coarse_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = files(tmp_path / "data")
    original.path(3).write_bytes(original.path(3).read_bytes())
    with tarfile.open(tmp_path / "data" / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(original.path(1), "1.png")
    found = (tmp_path / "data" / "x.tar").stat()
    member = Manifest(
        root=tmp_path / "data", files=["x.tar/1.png"], sizes=np.full((1, 2), 8, np.int32),
        stamps=np.array([(original.path(1).stat().st_size, found.st_mtime_ns)]), offsets=np.array([512]),
    )  # fmt: skip
    coarse(monkeypatch)
    staged = stage(original, tmp_path / "disk", progress=False)
    with pytest.raises(BadFile, match="changed since it was checked"):
        staged.read(3)
    for i in set(range(20)) - {3}:
        assert staged.read(i) == original.read(i)
    before = identities(staged)
    again = stage(original, tmp_path / "disk", progress=False)
    kept = identities(again)
    # The one that had changed is looked for as recorded, each time.
    assert [i for i in range(20) if kept[i] != before[i]] == [3]
    assert again.stamps is not None and staged.stamps is not None and np.array_equal(again.stamps, staged.stamps)
    packed = stage(member, tmp_path / "disk", progress=False)
    assert packed.read(0) == member.read(0) and packed.stamps[0, 1] % (2 * 10**9) == 0  # type: ignore[index]
    # A copy of another time is not the one.
    os.utime(staged.path(5), ns=(0, 10**18))
    after = identities(stage(original, tmp_path / "disk", progress=False))
    assert [i for i in range(20) if after[i] != before[i]] == [3, 5]


def test_names_that_begin_with_dots_are_inside(tmp_path: Path) -> None:
    (tmp_path / "data" / "..x").mkdir(parents=True)
    (tmp_path / "data" / "..x" / "a.png").write_bytes(b"1")
    original = Manifest(root=tmp_path / "data", files=["..x/a.png"], sizes=np.ones((1, 2), np.int32))
    assert stage(original, tmp_path / "disk", progress=False).read(0) == b"1"
    for name in ("..", "a/../..", "../..x"):
        with pytest.raises(UserError, match="lies outside the data folder"):
            stage(replace(original, files=[name]), tmp_path / "disk", progress=False)


def test_two_sets_of_one_name_do_not_mix(tmp_path: Path) -> None:
    one, two = files(tmp_path / "1/data"), files(tmp_path / "2/data", size=50)
    staged = [stage(each, tmp_path / "disk", progress=False) for each in (one, two)]
    assert staged[0].root != staged[1].root
    assert_staged(staged[0], one, tmp_path / "disk")
    assert_staged(staged[1], two, tmp_path / "disk")


def test_shards_and_arrays(tmp_path: Path) -> None:
    root = tmp_path / "shards"
    root.mkdir()
    source = files(tmp_path / "data", 4)
    names, offsets, sizes = [], [], []
    for shard in ("x.tar", "y.tar"):
        with tarfile.open(root / shard, "w") as tar:
            for i in range(4):
                tar.add(source.path(i), f"{i}.png")
        with tarfile.open(root / shard) as tar:
            for member in tar:
                names.append(f"{shard}/{member.name}")
                offsets.append(member.offset_data)
                sizes.append((member.size, (root / shard).stat().st_mtime_ns))
    packed = Manifest(
        root=root, files=names, sizes=np.full((8, 2), 8, np.int32), stamps=np.array(sizes), offsets=np.array(offsets)
    )
    staged = stage(packed, tmp_path / "disk", progress=False)
    assert sorted(path.name for path in staged.root.glob("*.tar")) == ["x.tar", "y.tar"]
    assert_staged(staged, packed, tmp_path / "disk")

    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", train_images=pixels)
    found = (tmp_path / "set.npz").stat()
    rows = Manifest(
        root=tmp_path / "set.npz",
        files=[f"train/{i:06d}" for i in range(3)],
        sizes=np.full((3, 2), 8, np.int32),
        stamps=np.array([(found.st_size, found.st_mtime_ns)] * 3),
    )
    staged = stage(rows, tmp_path / "disk", progress=False)
    assert staged.root.name == "set.npz" and staged.root != rows.root
    np.testing.assert_array_equal(staged.read(2)[..., 1], pixels[2])


def test_what_cannot_be_read_is_met_by_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = files(tmp_path / "data")
    original.path(4).unlink()
    staged = stage(original, tmp_path / "disk", progress=False)
    assert "1 files could not be copied" in (shown := capsys.readouterr().out) and original.files[4] in shown
    with pytest.raises(BadFile, match="no such file"):
        staged.read(4)
    assert staged.read(5) == original.read(5)


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = files(tmp_path / "data")
    outside = Manifest(root=tmp_path / "data", files=["../secret.png"], sizes=np.zeros((1, 2), np.int32))
    with pytest.raises(UserError, match="lies outside the data folder"):
        stage(outside, tmp_path / "disk", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--stage .*file: cannot be written"):
        stage(original, tmp_path / "file", progress=False)
    usage = shutil.disk_usage(tmp_path)._replace(free=60_000 + (64 << 20) - 1)
    monkeypatch.setattr(stage_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"60 kB are to be copied, and 67\.2 MB are free; name a folder on a larger"):
        stage(original, tmp_path / "disk", progress=False)
    assert not list((tmp_path / "disk").rglob("*.png"))
    monkeypatch.setattr(stage_module.shutil, "disk_usage", lambda _: usage._replace(free=usage.free + 1))
    assert_staged(stage(original, tmp_path / "disk", progress=False), original, tmp_path / "disk")


def test_a_disk_that_fills_up_keeps_what_was_copied(
    tmp_path: Path, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another process fills it meanwhile: the room that was there at the start is not."""
    small_disk = mounted("1M")
    original = files(tmp_path / "data", 24, 60_000)
    plenty = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stage_module.shutil, "disk_usage", lambda _: plenty)
    with pytest.raises(UserError, match=r"--stage .*small: the disk is full; what was copied is kept"):
        stage(original, small_disk, progress=False)
    copied = [path for path in small_disk.rglob("*.png") if path.is_file()]
    assert 5 <= len(copied) < 24
    before = {path: path.stat().st_ctime_ns for path in copied}
    subprocess.run(["mount", "-o", "remount,size=4M", str(small_disk)], check=True)
    staged = stage(original, small_disk, progress=False)
    assert_staged(staged, original, small_disk)
    assert {path: path.stat().st_ctime_ns for path in copied} == before


SLOW = """
import sys, time
from pathlib import Path
from test_stage import listed
from fastmoco.data import stage
copy = stage._copy
def slowly(source, target, name, half, times):
    sys.stdout.write(f"copying {name}\\n")
    sys.stdout.flush()
    half.write_bytes(b"half")
    time.sleep(float(sys.argv[3]))
    return copy(source, target, name, half, times)
stage._copy = slowly
stage._THREADS = 2
staged = stage.stage(listed(Path(sys.argv[1])), Path(sys.argv[2]), progress=False)
print("read", sum(len(staged.read(i)) for i in range(len(staged))), flush=True)
"""


def start(tmp_path: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(tmp_path / "data"), str(tmp_path / "disk"), str(pause)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_one_of_several_processes_copies(tmp_path: Path) -> None:
    files(tmp_path / "data")
    shown = [process.communicate(timeout=120)[0] for process in [start(tmp_path, 0.1) for _ in range(3)]]
    assert sum(text.count("copying ") - text.count("is copying") for text in shown) == 20
    assert sum("waiting for another process" in text for text in shown) == 2
    assert all("read 60000" in text for text in shown), shown


def test_a_killed_owner_leaves_no_lock_and_no_half_file(tmp_path: Path) -> None:
    original = files(tmp_path / "data")
    with start(tmp_path, 0.2) as owner:
        assert owner.stdout is not None
        for _ in range(9):
            assert re.match(r"copying ", owner.stdout.readline())
        waiting = start(tmp_path, 0.0)
        time.sleep(0.1)
        os.kill(owner.pid, signal.SIGKILL)
    (target,) = (tmp_path / "disk").iterdir()
    shown = waiting.communicate(timeout=120)[0]
    assert "read 60000" in shown
    # The first seven at least had been copied, since two are copied at a time.
    assert shown.count("copying ") - shown.count("is copying") <= 13
    assert_staged(stage(original, tmp_path / "disk", progress=False), original, tmp_path / "disk")
    assert not list(target.glob(".halves/*"))
