"""The loaders: layout of the batches, exact resume, no effect of workers, and what happens to bad files."""

from __future__ import annotations

import os
import signal
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.data import dali as dali_module
from fastmoco.data.dali import dali_decodable
from fastmoco.data.loader import Batch, LoaderKind, make_loader
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError

VIEWS = ViewConfig(size=33, crop_scale=(0.2, 1.0), rotation=20.0, flip_p=0.5)
SHAPES = [(50, 50), (8, 50), (51, 9), (97, 131), (33, 33)] * 3
KINDS: list[LoaderKind] = ["dali", "torchvision"]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures with spaces ü"
    folder.mkdir()
    for i, (height, width) in enumerate(SHAPES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return Manifest(root=folder, files=[f"{i}.png" for i in range(len(SHAPES))], sizes=np.array(SHAPES, dtype=np.int32))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> LoaderKind:
    if request.param == "dali":
        need_dali()
    return request.param  # type: ignore[no-any-return]


def need_dali() -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")


def load(
    kind: LoaderKind, manifest: Manifest, *, start: int = 0, stop: int = 9, workers: int = 0, drop_last: bool = True
) -> list[Batch]:
    order = Order(len(manifest), 4, seed=2, drop_last=drop_last)
    with make_loader(kind, manifest, VIEWS, order, start=start, stop=stop, workers=workers) as batches:
        return list(batches)


def assert_same(some: list[Batch], others: list[Batch]) -> None:
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        np.testing.assert_array_equal(a.indices, b.indices)
        assert torch.equal(a.q, b.q) and torch.equal(a.k, b.k)


def test_batches_are_float16_channels_last_in_range(kind: LoaderKind, manifest: Manifest) -> None:
    order = Order(len(manifest), 4, seed=2)
    batches = load(kind, manifest)
    assert len(batches) == 9
    for t, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.indices, order.batch(t)[1])
        for view in (batch.q, batch.k):
            assert view.shape == (4, 3, 33, 33) and view.dtype == torch.float16
            assert view.stride() == (33 * 33 * 3, 1, 33 * 3, 3)
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert view.min() >= 0 and view.max() <= 1 and view.float().std() > 0.05
        assert not torch.equal(batch.q, batch.k)
    # Three batches an epoch: the same images come again, and their views are new.
    again = int(batches[0].indices[0])
    seen = [batch.q[batch.indices == again] for batch in batches if again in batch.indices]
    assert len(seen) >= 2 and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("start", [1, 4, 8])
def test_resume_is_exact(kind: LoaderKind, manifest: Manifest, start: int) -> None:
    assert_same(load(kind, manifest, start=start), load(kind, manifest)[start:])


def test_nothing_depends_on_the_workers(kind: LoaderKind, manifest: Manifest) -> None:
    alone = load(kind, manifest, stop=5)
    for workers in (1, 2):
        assert_same(alone, load(kind, manifest, stop=5, workers=workers))


def test_a_sample_does_not_depend_on_its_batch(kind: LoaderKind, manifest: Manifest) -> None:
    """With batches of another size, the same image in the same epoch has the same pixels."""
    order = Order(len(manifest), 15, seed=2)
    with make_loader(kind, manifest, VIEWS, order, start=0, stop=1, workers=0) as batches:
        whole = next(batches)
    for batch in load(kind, manifest, stop=3):
        for row, index in enumerate(batch.indices):
            (place,) = np.flatnonzero(whole.indices == index)
            assert torch.equal(batch.q[row], whole.q[place]) and torch.equal(batch.k[row], whole.k[place])


def test_the_last_batch_may_be_smaller(kind: LoaderKind, manifest: Manifest) -> None:
    batches = load(kind, manifest, stop=8, drop_last=False)
    assert [len(batch.q) for batch in batches] == [4, 4, 4, 3] * 2
    assert sorted(np.concatenate([batch.indices for batch in batches[:4]]).tolist()) == list(range(15))


def test_an_old_batch_outlives_the_loader(kind: LoaderKind, manifest: Manifest) -> None:
    order = Order(len(manifest), 4, seed=2)
    loader = make_loader(kind, manifest, VIEWS, order, start=0, stop=12, workers=1)
    first = next(loader)
    kept = first.q.clone()
    for _ in islice(loader, 8):
        pass
    loader.close()
    del loader
    assert torch.equal(first.q, kept)


def test_length_close_and_end(kind: LoaderKind, manifest: Manifest) -> None:
    order = Order(len(manifest), 4, seed=2)
    loader = make_loader(kind, manifest, VIEWS, order, start=3, stop=6, workers=1)
    assert len(loader) == 3
    next(loader)
    assert len(loader) == 2
    loader.close()
    loader.close()
    assert list(loader) == []
    assert load(kind, manifest, start=4, stop=4) == []


def test_auto_is_dali_where_it_is_installed(manifest: Manifest) -> None:
    need_dali()
    assert_same(load("auto", manifest, stop=2), load("dali", manifest, stop=2))


def test_without_dali(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fastmoco\[dali-cuda13\].*fastmoco\[dali-cuda12\]"):
        make_loader("dali", manifest, VIEWS, Order(15, 4, seed=2), start=0, stop=1, workers=1)
    assert_same(load("auto", manifest, stop=2), load("torchvision", manifest, stop=2))


def test_an_order_of_another_set_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UserError, match="14 images, but the manifest lists 15"):
        make_loader("torchvision", manifest, VIEWS, Order(14, 4, seed=2), start=0, stop=1, workers=0)
    with pytest.raises(UserError, match="start <= stop"):
        make_loader("torchvision", manifest, VIEWS, Order(15, 4, seed=2), start=2, stop=1, workers=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_a_file_spoilt_during_the_run_is_named(kind: LoaderKind, manifest: Manifest, workers: int, damage: str) -> None:
    victim = manifest.path(3)
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: 2000 if damage == "truncated" else 0])
    with pytest.raises(UserError, match=r"3\.png") as caught:
        load(kind, manifest, workers=workers)
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("size", [(60, 140), (200, 200)])
def test_a_file_of_another_size_is_noticed(kind: LoaderKind, manifest: Manifest, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(manifest.path(3))
    with pytest.raises(UserError, match=r"3\.png"):
        load(kind, manifest)


def test_workers_leave_ctrl_c_to_the_trainer(manifest: Manifest) -> None:
    order = Order(len(manifest), 4, seed=2)
    with make_loader("torchvision", manifest, VIEWS, order, start=0, stop=30, workers=2) as batches:
        next(batches)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        assert len(children) >= 2
        for child in children:
            os.kill(int(child), signal.SIGINT)
        time.sleep(0.2)
        assert len(list(batches)) == 29


def test_dali_decodable_tells_sizes_and_reasons(manifest: Manifest, tmp_path: Path) -> None:
    need_dali()
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(rotated, exif=exif)
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    empty = tmp_path / "empty.png"
    empty.touch()
    cut = tmp_path / "cut.png"
    cut.write_bytes(manifest.path(0).read_bytes()[:3000])
    good = [manifest.path(i) for i in range(15)]
    paths = [text, *good[:7], empty, *good[7:], rotated, cut, tmp_path / "missing.png"]
    verdicts = dali_decodable(paths)
    assert list(verdicts) == paths
    assert [verdicts[path] for path in good] == SHAPES
    assert verdicts[rotated] == (40, 20)
    for path in (text, empty, cut, tmp_path / "missing.png"):
        reason = verdicts[path]
        assert isinstance(reason, str) and 5 < len(reason) < 200 and "pipeline" not in reason
    assert dali_decodable([]) == {}


def test_the_graph_can_be_placed_on_a_gpu_that_is_not_there(manifest: Manifest) -> None:
    """Constructing checks every operator's arguments and placement; building, which needs a driver, comes later."""
    need_dali()
    from fastmoco.data.dali import graph_inputs
    from fastmoco.data.dali_graph import view_pipeline

    views = ViewConfig(size=33, resize=1.2, crop_scale=(0.2, 1.0), rotation=20.0, flip_p=0.5)
    names = list(graph_inputs(manifest, views, seed=0, epoch=0, indices=np.arange(4)))
    pipeline = view_pipeline(views, lambda step: [], names, batch_size=4, threads=1, device="gpu")
    assert pipeline.device_id == 0
