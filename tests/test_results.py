"""Files of results: tried before the work, and what they held is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastmoco.errors import UserError
from fastmoco.results import try_folder, try_out, write_results


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_earlier_results_get_one_number_and_new_ones_the_name(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "a.csv"
    assert write_results({a: "1", b: "one"}) == []
    assert write_results({a: "2", b: "one"}) == [tmp_path / "a.1.json", tmp_path / "a.1.csv"]
    # A free number is one that none of them has.
    (tmp_path / "a.2.csv").write_text("another's")
    assert write_results({a: "3", b: "three"}) == [tmp_path / "a.3.json", tmp_path / "a.3.csv"]
    assert contents(tmp_path) == {
        "a.json": "3", "a.csv": "three", "a.1.json": "1", "a.1.csv": "one", "a.2.csv": "another's",
        "a.3.json": "2", "a.3.csv": "one",
    }  # fmt: skip


def test_the_same_again_is_one_result(tmp_path: Path) -> None:
    for _ in range(2):
        assert write_results({tmp_path / "a.json": "1", tmp_path / "a.md": "one \udcff"}) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.md"]


def test_of_two_files_of_which_one_was_there_that_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("0")
    assert write_results({tmp_path / "a.json": "1", tmp_path / "a.csv": "one"}) == [tmp_path / "a.1.json"]
    assert contents(tmp_path) == {"a.json": "1", "a.csv": "one", "a.1.json": "0"}


def test_trying_makes_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep" / "a.json"
    try_out(out)
    assert list(out.parent.iterdir()) == []
    out.write_text("there")
    try_out(out)
    assert contents(out.parent) == {"a.json": "there"}


def test_where_the_new_cannot_be_written_the_earlier_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.json"
    out.write_text("0")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("shutil.copy2", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(f"fastmoco.results.{name}", full)
            with pytest.raises(UserError, match=r"--out .*a\.json: cannot be written: No space left on device"):
                write_results({out: "1"})
        assert out.read_text() == "0"
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_file_in_the_place_of_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("in the way")
    with pytest.raises(UserError, match=r"--out .*results\.json is a file: name a folder"):
        try_folder(tmp_path / "results.json")
    try_folder(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_an_impossible_place_is_said_before_and_when_writing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"--out .*file/a\.json: cannot be written: .*file is a file, not a folder"):
        try_out(tmp_path / "file" / "a.json")
    with pytest.raises(UserError, match=r"--out .*: cannot be written: "):
        write_results({tmp_path / "file" / "a.json": "1"})
    with pytest.raises(UserError, match="is a folder: name a file"):
        try_out(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> object:
        return open("/dev/full", "wb", buffering=0)

    monkeypatch.setattr("fastmoco.results.tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match=r"--table .*: cannot be written: No space left on device"):
        try_out(tmp_path / "a.json", option="--table")
