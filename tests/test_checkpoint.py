"""Checkpoints and metrics on disks that are whole, full, slow or damaged."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastmoco.errors import UserError
from fastmoco.train import checkpoint as module
from fastmoco.train.board import Board
from fastmoco.train.checkpoint import Checkpoint, Store
from fastmoco.train.metrics import MetricsFile, read_rows


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write files past `size` bytes, as it does past a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_for(gate: threading.Event) -> None:
    assert gate.wait(timeout=30)


def steps(store: Store) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in store.paths()]


def checkpoint(step: int, size: int = 5) -> Checkpoint:
    return Checkpoint({"x": torch.full((size,), float(step))}, {"step": step})


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    assert store.latest() is None
    for step in (5, 10, 20, 100):
        store.save_now(checkpoint(step))
    assert [path.name for path in store.paths()] == ["step-000000020.safetensors", "step-000000100.safetensors"]
    latest = store.latest()
    assert latest is not None
    assert (latest.step, latest.tensors["x"].tolist()) == (100, [100.0] * 5)


def test_a_write_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1, max_failed=1)
    store.save_now(checkpoint(1))
    expected = r"step-000000002.*could not be written.*last good.*step-000000001"
    with files_of_at_most(100_000), pytest.raises(UserError, match=expected):
        store.save_now(checkpoint(2, size=1_000_000))
    assert [path.name for path in store.folder.iterdir()] == ["step-000000001.safetensors"]
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save_now(checkpoint(1))
    path = store.save_now(checkpoint(2, size=1000))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"step-000000002\.safetensors is truncated.*remove it"):
        store.latest()


def test_a_checkpoint_with_a_flipped_bit_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.save_now(
        Checkpoint({"x": torch.rand(999).bfloat16(), "n": torch.tensor(3), "none": torch.zeros(0)}, {"step": 2})
    )
    latest = store.latest()
    assert latest is not None
    assert latest.tensors["n"] == 3
    rotten = bytearray(path.read_bytes())
    rotten[-700] ^= 4
    path.write_bytes(rotten)
    with pytest.raises(UserError, match=r"step-000000002\.safetensors is damaged.*remove it to go on"):
        store.latest()


def test_a_foreign_file_is_no_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.folder.mkdir()
    save_file({"x": torch.zeros(1)}, store.folder / "step-000000001.safetensors")
    with pytest.raises(UserError, match="not a checkpoint"):
        store.latest()


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save_now(checkpoint(1))
    (store.folder / ".step-000000002.safetensors.tmp-123").write_bytes(b"half")
    store.remove_leftovers()
    assert [path.name for path in store.folder.iterdir()] == ["step-000000001.safetensors"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    store, gate = Store(tmp_path), threading.Event()
    saved = checkpoint(1)
    store.save(saved, before=lambda: wait_for(gate))
    # What the next step does to the weights.
    saved.tensors["x"].fill_(7)
    assert steps(store) == []
    gate.set()
    store.finish()
    latest = store.latest()
    assert latest is not None
    assert latest.tensors["x"].tolist() == [1.0] * 5


def test_a_slow_folder_loses_no_more_than_the_stated_number_and_then_has_training_wait(tmp_path: Path) -> None:
    said: list[str] = []
    store, gate = Store(tmp_path, keep=9, max_failed=3, warn=said.append), threading.Event()
    store.save(checkpoint(1), before=lambda: wait_for(gate))
    for step in (2, 3):
        store.save(checkpoint(step))
    assert len(said) == 2
    assert all("is still being written after" in text and "slow" in text for text in said)
    assert "no checkpoint of step 3" in said[1]
    threading.Timer(0.2, gate.set).start()
    before = time.monotonic()
    store.save(checkpoint(4))
    assert time.monotonic() - before > 0.15
    store.save_now(checkpoint(5))
    assert steps(store) == [1, 4, 5]
    assert len(said) == 2


def test_failed_saves_are_warned_of_until_the_stated_number(tmp_path: Path) -> None:
    said: list[str] = []
    store = Store(tmp_path, max_failed=3, warn=said.append)
    store.save(checkpoint(1))
    store.finish()
    with files_of_at_most(100_000):
        for step in (2, 3):
            store.save(checkpoint(step, size=1_000_000))
            store.finish()
        assert [f"step-00000000{n}.safetensors could not be written" in said[n - 2] for n in (2, 3)] == [True, True]
        assert "training goes on" in said[0]
        # A success between two failures, of a checkpoint that fits: the count begins anew.
        store.save(checkpoint(4))
        for step in (5, 6):
            store.save(checkpoint(step, size=1_000_000))
            store.finish()
        with pytest.raises(UserError, match=r"step-000000007.*3 in a row were missed.*last good.*step-000000004"):
            store.save(checkpoint(7, size=1_000_000))
    assert len(said) == 4
    assert steps(store) == [1, 4]
    assert not list(store.folder.glob(".*"))


def test_a_save_that_must_succeed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_AFTER", 0.01)
    said: list[str] = []

    def mend(text: str) -> None:
        said.append(text)
        store.folder.unlink(missing_ok=True)

    store = Store(tmp_path, max_failed=3, warn=mend)
    store.folder.write_text("in the way of the folder")
    assert store.save_now(checkpoint(1)).exists()
    assert len(said) == 1
    assert "trying again" in said[0]
    store = Store(tmp_path / "other", max_failed=2, warn=said.append)
    store.folder.parent.mkdir()
    store.folder.write_text("in the way of the folder")
    with pytest.raises(UserError, match=r"could not be written.*no earlier checkpoint"):
        store.save_now(checkpoint(1))
    assert len(said) == 2


def test_tries_come_no_further_apart_than_half_a_minute_and_are_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[object] = []
    monkeypatch.setattr(module.time, "sleep", happened.append)
    store = Store(tmp_path, max_failed=9, warn=lambda _: None, alive=lambda: happened.append("alive"))
    store.folder.write_text("in the way of the folder")
    with pytest.raises(UserError, match="no earlier checkpoint"):
        store.save_now(checkpoint(1))
    assert happened == [word for pause in (1, 2, 4, 8, 16, 30, 30, 30) for word in (pause, "alive")]


def test_what_must_be_on_disk_before_comes_before(tmp_path: Path) -> None:
    said: list[str] = []

    def fails() -> None:
        raise OSError(28, "No space left on device")

    store = Store(tmp_path, max_failed=2, warn=said.append)
    store.save(checkpoint(1), before=fails)
    store.finish()
    assert steps(store) == []
    assert "No space left" in said[0]


def test_rows_that_a_full_disk_refused_are_written_later(tmp_path: Path) -> None:
    said: list[str] = []
    metrics = MetricsFile(tmp_path / "metrics.jsonl", resume_at=0, warn=said.append)
    with files_of_at_most(100):
        for step in range(1, 11):
            metrics.write([{"step": step, "loss": 1 / step}])
        with pytest.raises(OSError):
            metrics.sync()
    assert len(said) == 1
    assert 0 < len(read_rows(metrics.path)) < 10
    metrics.write([{"step": 11, "loss": float("nan")}])
    metrics.sync()
    metrics.close()
    assert [row["step"] for row in read_rows(metrics.path)] == list(range(1, 12))
    assert read_rows(metrics.path)[-1]["loss"] is None


def test_a_board_on_a_full_disk_ends_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # TensorBoard's own thread ends by the exception.
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    said: list[str] = []
    board = Board(tmp_path / "tensorboard", 0, warn=said.append)
    with files_of_at_most(0):
        for step in range(1, 2000):
            board.write([{"step": step, "loss": 1.0}])
    board.write([{"step": 2000, "loss": 1.0}])
    board.close()
    assert len(said) == 1
    assert "no points from here on" in said[0]
