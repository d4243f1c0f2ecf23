"""Packing into shards: the bytes that went in, whatever interrupts it, and nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fastmoco import cli
from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.members import compare
from fastmoco.data.pack import pack, plan
from fastmoco.data.sizes import parse_bytes, show_bytes
from fastmoco.errors import UserError
from runs import draw_images

ROOT = Path(__file__).resolve().parents[1]
SHARD = 12_000


@pytest.fixture
def source(tmp_path: Path) -> Manifest:
    return load(draw_images(tmp_path / "data"))


def load(images: Path) -> Manifest:
    return load_manifest(images, images.parent / "labels.csv", label=("kind",), progress=False)


def packed_in(source: Manifest, out: Path, seed: int | None = None) -> Manifest:
    return pack(source, out, shard_bytes=SHARD, seed=seed, progress=False)


def shards(out: Path) -> dict[str, tuple[int, bytes]]:
    """When each was written, and what it holds."""
    return {path.name: (path.stat().st_ctime_ns, path.read_bytes()) for path in sorted(out.glob("shard-*.tar"))}


def contents(out: Path) -> list[bytes]:
    return [data for _, data in shards(out).values()]


def assert_packed(out: Path, source: Manifest, order: list[int] | None = None) -> None:
    """Loaded from its index alone, the folder is `source`, in `order`."""
    packed = load_manifest(out, progress=False)
    order = list(range(len(source))) if order is None else order
    assert [packed.read(i) for i in range(len(packed))] == [source.read(i) for i in order]
    np.testing.assert_array_equal(packed.sizes, source.sizes[order])
    np.testing.assert_array_equal(packed.labels["kind"], source.labels["kind"][order])
    assert packed.class_names == source.class_names
    for name in ("patients", "splits"):
        np.testing.assert_array_equal(getattr(packed, name), getattr(source, name)[order])
    assert compare(packed, progress=False) == []
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".lock"]


def test_the_folder_is_the_set(source: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    packed_in(source, out)
    assert_packed(out, source)
    assert 3 <= len(shards(out)) < len(source) and max(map(len, contents(out))) < 2 * SHARD + 10_240
    with tarfile.open(out / "shard-000000.tar") as tar:
        names = tar.getnames()
        beside = json.load(tar.extractfile(names[1]))  # type: ignore[arg-type]
    assert names[:4] == ["000000000.jpg", "000000000.json", "000000001.png", "000000001.json"]
    assert beside.items() >= {"kind": "0", "patient": "p0", "split": "train"}.items()
    assert beside["packed_from"]["file"] == "000.jpg"
    # The same again is the same to the bit, and another order is another order.
    packed_in(source, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    # Shards may be packed anew.
    packed_in(load_manifest(out, progress=False), tmp_path / "anew")
    assert_packed(tmp_path / "anew", source)
    packed_in(source, tmp_path / "mixed", seed=1)
    order = [i for shard in plan(source, SHARD, 1) for i in shard.indices]
    assert sorted(order) == list(range(24)) and order != sorted(order)
    assert_packed(tmp_path / "mixed", source, order)
    # Without the index, as other tools read it, the labels are there too.
    (out / "index.csv").unlink()
    plain = load_manifest(out, progress=False)
    np.testing.assert_array_equal(plain.labels["kind"], source.labels["kind"])
    assert plain.patients is not None and plain.patients.tolist() == source.patients.tolist()  # type: ignore[union-attr]


def test_finished_shards_are_never_written_again(source: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    packed_in(source, out)
    before = shards(out)
    (out / "shard-000001.tar").unlink()
    (out / "index.csv").unlink()
    packed_in(source, out)
    after = shards(out)
    assert {name for name in before if after[name] != before[name]} == {"shard-000001.tar"}
    assert_packed(out, source)


def test_a_file_that_vanishes(source: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    victim = source.path(15)
    kept = victim.read_bytes()
    stamp = victim.stat().st_mtime_ns
    victim.unlink()
    with pytest.raises(UserError, match=r"015\.png: no such file. [1-9] of \d shards? finished .* same command"):
        packed_in(source, out)
    before = shards(out)
    assert before and not (out / "index.csv").exists() and not list(out.glob(".*.tmp-*"))
    victim.write_bytes(kept)
    with pytest.raises(UserError, match="changed since it was checked"):
        packed_in(source, out)
    os.utime(victim, ns=(stamp, stamp))
    packed_in(source, out)
    assert shards(out).items() >= before.items()
    assert_packed(out, source)


@pytest.mark.parametrize("seed", [None, 3])
def test_a_file_that_is_gone_for_good_leaves_the_finished_shards_valid(
    source: Manifest, tmp_path: Path, seed: int | None
) -> None:
    out = tmp_path / "shards"
    last = plan(source, SHARD, seed)[-1].indices[-1]
    source.path(last).unlink()
    with pytest.raises(UserError, match="no such file"):
        packed_in(source, out, seed)
    before = shards(out)
    rest = source.select(np.array([i for i in range(24) if i != last]))
    packed_in(rest, out, seed)
    assert shards(out).items() >= before.items() and before
    assert_packed(out, rest, [i for shard in plan(rest, SHARD, seed) for i in shard.indices])


def test_shards_of_other_images_are_refused(source: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    packed_in(source, out)
    fewer = source.select(np.arange(1, 24))
    with pytest.raises(UserError, match=r"shard-000000\.tar holds other images .* \(first seen at 001\.png\)"):
        packed_in(fewer, out)
    with pytest.raises(UserError, match=r"shard-00000\d\.tar is there, but the images make only 1 shard;"):
        packed_in(source.select(np.arange(3)), out)
    other = source.select(np.arange(24))
    other.labels["kind"] = 1 - source.labels["kind"]
    with pytest.raises(UserError, match="the images, their labels"):
        packed_in(other, out)
    path = out / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"shard-000000\.tar: .*damaged.*delete it"):
        packed_in(source, out)


def test_a_folder_of_something_else_is_left_as_it_is(source: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds config\.json, and no shards; name a folder of their own"):
        pack(source, out, shard_bytes=1 << 20, progress=False)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    (out / "config.json").rename(out / ".hidden")
    (out / "index.csv").write_text("of shards that were deleted")
    assert len(pack(source, out, shard_bytes=1 << 20, progress=False)) == len(source)


def test_a_label_that_would_hide_another_field_is_refused_at_once(source: Manifest, tmp_path: Path) -> None:
    for name in ("split", "packed_from", "bytes"):
        named = source.select(np.arange(24))
        named.labels, named.class_names = {name: source.labels["kind"]}, {name: source.class_names["kind"]}
        with pytest.raises(UserError, match=f"--label {name}: packed images have a field of that name"):
            packed_in(named, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_the_check_finds_a_flipped_bit_a_foreign_label_and_a_lost_shard(source: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    packed = packed_in(source, out)
    assert packed.offsets is not None
    path = out / "shard-000001.tar"
    whole = path.read_bytes()
    victim = next(i for i, name in enumerate(packed.files) if name.startswith(path.name))
    damaged = bytearray(whole)
    damaged[int(packed.offsets[victim]) + 100] ^= 1
    path.write_bytes(damaged)
    (line,) = compare(load_manifest(out, progress=False), progress=False)
    assert line == f"{packed.files[victim]}: damaged, its bytes are not those that {source.files[victim]} had"
    path.write_bytes(whole.replace(b'"kind": "1"', b'"kind": "0"', 1))
    (line,) = compare(load_manifest(out, progress=False), progress=False)
    assert "other labels of them, than the index says" in line
    path.rename(out / "shard-000099.tar")
    lines = compare(packed, progress=False)
    assert lines == ["shard-000099.tar: not in the index", "shard-000001.tar: no such shard"]


SLOW = """
import sys, time
from pathlib import Path
from test_pack import load, packed_in
from fastmoco.data import pack
add, compare, finished = pack._add, pack._compare, pack._finished
def pausing(where, function):
    def call(*args, **named):
        if where in ("write", "compare"):
            print(where, flush=True)
        time.sleep(0.02)
        return function(*args, **named)
    return call
pack._add, pack._compare = pausing("write", add), pausing("compare", compare)
packed_in(load(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.system
@pytest.mark.parametrize(("line", "finished"), [("write", 0), ("compare", 0), ("write", 1), ("compare", 2)])
def test_kill_at_any_point(tmp_path: Path, line: str, finished: int) -> None:
    images, out = draw_images(tmp_path / "data"), tmp_path / "shards"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", SLOW, str(images), str(out)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        done = 0
        for said in process.stdout:
            if said.strip() == line and done == finished:
                process.send_signal(signal.SIGKILL)
                break
            done += said.strip() == "compare"
    assert process.returncode == -signal.SIGKILL
    before = shards(out)
    assert len(before) == finished and list(out.glob(".shard-*.tar.tmp-*")) and not (out / "index.csv").exists()
    source = load(images)
    packed_in(source, out)
    assert shards(out).items() >= before.items()
    assert_packed(out, source)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = draw_images(tmp_path / "data"), tmp_path / "shards"

    def fastmoco(*args: object) -> int:
        monkeypatch.setattr("sys.argv", ["fastmoco", "data", "pack", *map(str, args)])
        return cli.main()

    labels = ["--labels", images.parent / "labels.csv", "--label", "kind"]
    assert fastmoco("--check", "--out", out) == 2 and "shards: no such folder" in capsys.readouterr().err
    out.mkdir()
    assert fastmoco("--check", "--out", out) == 2 and "no shard in it" in capsys.readouterr().err
    assert fastmoco("--out", out) == 2 and "name the folder of images" in capsys.readouterr().err
    assert fastmoco(images, *labels, "--out", out, "--shard-size", "much") == 2
    assert "--shard-size much: give a size such as 500MB" in capsys.readouterr().err
    (images / "broken.png").write_bytes(b"no image")
    assert fastmoco(images, "--out", out, "--shard-size", "12kB") == 0
    shown = capsys.readouterr().out
    assert "left out 1 file, the first broken.png: not an image" in shown and "24 images in" in shown
    assert fastmoco("--check", "--out", out) == 0 and "24 images, all right" in capsys.readouterr().out
    path = out / "shard-000000.tar"
    path.write_bytes(path.read_bytes().replace(b"JFIF", b"JFIX", 1))
    assert fastmoco("--check", "--out", out) == 1 and "1 thing wrong" in capsys.readouterr().out
    path.unlink()
    assert fastmoco("--check", "--out", out) == 1
    assert "shard-000000.tar: no such shard\n" in capsys.readouterr().out
    (out / "index.csv").unlink()
    assert fastmoco("--check", "--out", out) == 2 and "packing has not ended" in capsys.readouterr().err


def test_sizes() -> None:
    texts = ("1GB", "500 MB", "2.5g", "12kB", "7", "1 b")
    assert [parse_bytes(text, "--x") for text in texts] == [10**9, 5 * 10**8, 25 * 10**8, 12_000, 7, 1]
    for text in ("", "GB", "-1GB", "0", "1GiB", "1e9"):
        with pytest.raises(UserError, match="--x"):
            parse_bytes(text, "--x")
    assert [show_bytes(size) for size in (999, 1_230_000, 5e15)] == ["999 bytes", "1.23 MB", "5e+03 TB"]


def test_real_images_survive(real_data, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    images = real_data("idrid_fundus_256")
    source = load_manifest(images / "images", images / "labels.csv", label=("dr",), progress=False)
    pack(source, tmp_path / "shards", shard_bytes=2_000_000, progress=False)
    packed = load_manifest(tmp_path / "shards", progress=False)
    assert compare(packed, progress=False) == [] and len(packed) == len(source) > 100
    assert all(packed.read(i) == source.read(i) for i in range(len(packed)))
