"""A manifest written to a file and taken on trust."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_listing import packed

from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.manifest_file import is_manifest_file, read_manifest_file, write_manifest
from fastmoco.data.store import BadFile
from fastmoco.errors import UserError

HEADER = "file,height,width,bytes,mtime_ns,dali"


@pytest.fixture
def checked(tmp_path: Path) -> Manifest:
    """Eight images in two class folders, one of them with a name that CSV has to quote."""
    folder = tmp_path / "set"
    for i in range(8):
        name = folder / ("benign" if i % 2 else "malignant") / (f"{i}.png" if i else 'a, "b"\nü.png')
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 + i, 9), (i, 0, 0)).save(name)
    found = load_manifest(folder, progress=False)
    found.dali[3] = True
    found.patients, found.splits = np.array([f"p{i // 3}" for i in range(8)]), np.array(["train", "test"] * 4)
    return found


def assert_same(some: Manifest, other: Manifest) -> None:
    assert some.files == other.files
    assert some.class_names == other.class_names and set(some.labels) == set(other.labels)
    for name in ("sizes", "stamps", "dali", "offsets", "patients", "splits"):
        assert np.array_equal(getattr(some, name), getattr(other, name)), name
    for name, values in some.labels.items():
        assert np.array_equal(values, other.labels[name])


def test_what_is_written_is_read_and_nothing_else_is_touched(checked: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    write_manifest(path, checked)
    assert path.read_text().startswith(f"{HEADER},folder,patient,split\n") and is_manifest_file(path)
    os.rename(checked.root, tmp_path / "moved")
    (tmp_path / "set").mkdir()
    found = load_manifest(tmp_path / "set", path, progress=False)
    assert_same(found, checked)
    with pytest.raises(BadFile, match="no such file"):
        found.decode(1)
    there = load_manifest(tmp_path / "moved", path, label=["folder"], progress=False)
    assert [there.decode(i).shape[1] for i in range(8)] == checked.sizes[:, 1].tolist()
    with pytest.raises(UserError, match="no column 'grade'"):
        load_manifest(tmp_path / "moved", path, label=["grade"])


def test_shards_and_arrays_too(tmp_path: Path) -> None:
    shards = packed(tmp_path / "shards")
    found = load_manifest(shards, progress=False)
    write_manifest(shards / "index.csv", found)
    for path in shards.glob("*.tar"):
        path.chmod(0o600)
    again = load_manifest(shards, progress=False)
    assert_same(again, found)
    assert again.decode(4)[0, 0, 0] == 4
    (shards / "index.csv").write_text((shards / "index.csv").read_text().replace("key4", "key9"))
    assert load_manifest(shards, progress=False).files[4] == "shard-000002.tar/dir/key9.png", "it is trusted"
    np.savez(tmp_path / "a.npz", train_images=np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8))
    arrays = load_manifest(tmp_path / "a.npz", progress=False)
    write_manifest(tmp_path / "a.csv", arrays)
    read = load_manifest(tmp_path / "a.npz", tmp_path / "a.csv", progress=False)
    assert_same(read, arrays)
    assert read.decode(1)[0, 0, 0] == 64


def test_times_may_be_unknown(checked: Manifest, tmp_path: Path) -> None:
    assert checked.stamps is not None
    checked.stamps[:, 1] = 0
    write_manifest(tmp_path / "m.csv", checked)
    os.utime(checked.path(1), ns=(1, 1))
    assert load_manifest(checked.root, tmp_path / "m.csv", progress=False).decode(1).shape == (9, 13, 3)


def test_what_cannot_be_written_is_named(checked: Manifest, tmp_path: Path) -> None:
    checked.labels["width"], checked.class_names["width"] = checked.labels["folder"], ["a", "b"]
    with pytest.raises(UserError, match="cannot be called 'width'"):
        write_manifest(tmp_path / "m.csv", checked)
    made = Manifest(root=tmp_path, files=["a"], sizes=np.ones((1, 2), dtype=np.int32))
    with pytest.raises(UserError, match="never checked"):
        write_manifest(tmp_path / "m.csv", made)
    assert not list(tmp_path.glob("*m.csv*"))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("", "a header and no rows"),
        ("a,1,1,5,0,1,x\nb,1,1,5,0\n", "line 3: 5 cells, not 7"),
        ("a,1,1,5,0,1,x\nb,0,1,5,0,1,x\n", "line 3: height cannot be '0'"),
        ("a,1,one,5,0,1,x\n", "line 2: width cannot be 'one'"),
        ("a,1,1,-5,0,1,x\n", "line 2: bytes cannot be '-5'"),
        ("a,1,1,5,0,2,x\n", "line 2: dali cannot be '2'"),
        ("a,1,1,5,99999999999999999999,1,x\n", "line 2: mtime_ns cannot be '99999999999999999999'"),
        ("a,1,1,5,,1,x\n", "line 2: mtime_ns cannot be ''"),
        ("a,1,1,5,0,1,x\na,1,1,5,0,1,y\n", "lists a file more than once"),
        ("a,1,1,5,0,1,x\nb,1,1,5,0,1,x\n", "every image has the same value"),
        ('"a\nb",1,1,5,1700000000000000000,1,x\n\n\nc,1,1,5,,1,x\n', "line 6: mtime_ns cannot be ''"),
        ('"a\r\nb",1,1,5,0,1,x\nc,1,1\n', "line 4: 3 cells"),
        ("a,1,1,5,-99999999999999999999,1,x\n", "line 2: mtime_ns cannot be"),
        ("a,1,1,5,0,1,x\na\0b,1,1,5,0,1,y\n", "line 3: no file's name can hold a NUL byte"),
    ],
)
def test_bad_rows_are_named_by_their_line(tmp_path: Path, rows: str, reason: str) -> None:
    (tmp_path / "m.csv").write_text(f"{HEADER},y\n{rows}")
    with pytest.raises(UserError, match=reason):
        load_manifest(tmp_path, tmp_path / "m.csv", label=["y"])


@pytest.mark.parametrize("text", ["", "\n", HEADER.replace(",", ";") + "\na;1;1;5;0;1\n", "file,height\na,1\n"])
def test_what_is_no_manifest_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    assert not is_manifest_file(tmp_path / "m.csv")
    with pytest.raises(UserError, match=r"m\.csv: is no manifest file: its first line must have .* with commas"):
        read_manifest_file(tmp_path / "m.csv")


def test_odd_names_and_times_are_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for i, name in enumerate(("cr\rhere/a.png", "cr\r\n/b.png", "\rc/c.png", 'd"/,\n.png')):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + i, 9)).save(folder / name)
        os.utime(folder / name, ns=(0, -(10**18) + i))
    found = load_manifest(folder, progress=False)
    found.patients = np.array(["p\r", "\r\n", "p", "\n"])
    write_manifest(tmp_path / "m.csv", found)
    with (tmp_path / "m.csv").open("ab") as stream:
        stream.write(b"\n\r\n")
    again = load_manifest(folder, tmp_path / "m.csv", progress=False)
    assert_same(again, found)
    assert again.stamps is not None and (again.stamps[:, 1] < 0).all()
    assert [again.decode(i).shape[1] for i in range(4)] == again.sizes[:, 1].tolist()


def test_quantities_are_no_labels(tmp_path: Path) -> None:
    rows = "".join(f"{i}.png,1,1,5,0,1,{i},{i % 3}\n" for i in range(5000))
    (tmp_path / "m.csv").write_text(f"{HEADER},weight,y\n{rows}")
    assert set(load_manifest(tmp_path, tmp_path / "m.csv").labels) == {"y"}
    with pytest.raises(UserError, match="different values; a label column names classes"):
        load_manifest(tmp_path, tmp_path / "m.csv", label=["weight"])


MILLION = """
import sys, time
from pathlib import Path
from fastmoco.data.manifest import load_manifest
path = Path(sys.argv[1])
began = time.process_time()
found = load_manifest(path.parent, path, progress=False)
seconds = time.process_time() - began
assert len(found) == 1_000_000 and found.files[-1].endswith("image0999999.jpg")
assert found.labels["grade"][-1] == 4 and found.patients[-1] == "p099999" and found.splits[-1] == "train"
assert found.stamps[-1].tolist() == [60999, 1700000000000999999] and found.sizes[-1].tolist() == [400, 512]
assert "torch" not in sys.modules
# Not getrusage's ru_maxrss, which begins at what the parent process held when it started this one.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) / 1024)
"""


@pytest.mark.system
def test_a_million_lines_load_in_seconds_and_half_a_gigabyte(tmp_path: Path) -> None:
    """The whole process: 5 s of processor time, which other processes do not lengthen, and 500 MB."""
    with (tmp_path / "m.csv").open("w") as stream:
        stream.write(f"{HEADER},grade,patient,split\n")
        stream.writelines(
            f"hospital{i % 7}/patient{i // 10:06d}/image{i:07d}.jpg,400,512,{60000 + i % 1000},"
            f"{1700000000000000000 + i},1,{i % 5},p{i // 10:06d},{'test' if i % 5 == 0 else 'train'}\n"
            for i in range(1_000_000)
        )
    command = [sys.executable, "-c", MILLION, str(tmp_path / "m.csv")]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, megabytes = map(float, done.stdout.split())
    assert 0.1 < seconds < 5 and 50 < megabytes < 500


@pytest.mark.parametrize("named", [True, False])
def test_shards_that_are_missing_or_short_are_named(tmp_path: Path, named: bool) -> None:
    shards = packed(tmp_path / "shards")
    listed = tmp_path / "m.csv" if named else shards / "index.csv"
    found = load_manifest(shards, progress=False)
    write_manifest(listed, found)
    labels = listed if named else None
    assert found.offsets is not None and found.stamps is not None
    end = int((found.offsets + found.stamps[:, 0])[3])
    victim = shards / "shard-000001.tar"
    os.truncate(victim, end)
    assert len(load_manifest(shards, labels, progress=False)) == 6, "as long as its images need"
    os.truncate(victim, end - 1)
    with pytest.raises(UserError, match=rf"shard-000001\.tar has {end - 1:,} bytes, .* ends at {end:,} by {listed}"):
        load_manifest(shards, labels, progress=False)
    victim.unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar, which .* lists, is not there"):
        load_manifest(shards, labels, progress=False)
    for path in shards.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match=r"shard-000000\.tar.* not there|nothing .* first shard-000000\.tar/dir/key0"):
        load_manifest(shards, labels, progress=False)
