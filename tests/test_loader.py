"""The loaders: layout of the batches, exact resume, shards, no effect of workers, and what happens to bad files."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.data import dali as dali_module
from fastmoco.data.dali import DaliDecoder, decode_pipeline
from fastmoco.data.loader import Batch, LoaderKind, default_workers, make_loader
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order
from fastmoco.data.quarantine import Quarantine, TooManyBad
from fastmoco.data.undecodable import Undecodable
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError

VIEWS = ViewConfig(size=33, crop_scale=(0.2, 1.0), rotation=20.0, flip_p=0.5)
SHAPES = [(50, 50), (8, 50), (51, 9), (97, 131), (33, 33)] * 3
KINDS: list[LoaderKind] = ["dali", "pillow", "torchvision"]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures with spaces ü"
    folder.mkdir()
    for i, (height, width) in enumerate(SHAPES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return Manifest(root=folder, files=[f"{i}.png" for i in range(len(SHAPES))], sizes=np.array(SHAPES, dtype=np.int32))


@pytest.fixture
def checked(manifest: Manifest) -> Manifest:
    """The same with what a check records: size and time of each file."""
    stats = [manifest.path(i).stat() for i in range(len(manifest))]
    return replace(manifest, stamps=np.array([(stat.st_size, stat.st_mtime_ns) for stat in stats], dtype=np.int64))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> LoaderKind:
    if request.param == "dali":
        need_dali()
    return request.param  # type: ignore[no-any-return]


def need_dali() -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")


def load(
    kind: LoaderKind,
    manifest: Manifest,
    *,
    start: int = 0,
    stop: int = 9,
    workers: int = 0,
    drop_last: bool = True,
    quarantine: Quarantine | None = None,
) -> list[Batch]:
    order = Order(len(manifest), 4, seed=2, drop_last=drop_last)
    with make_loader(
        kind, manifest, VIEWS, order, start=start, stop=stop, workers=workers, quarantine=quarantine
    ) as batches:
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


def test_the_last_batch_is_filled_up_with_other_views_of_the_first_images(
    kind: LoaderKind, manifest: Manifest
) -> None:
    batches = load(kind, manifest, stop=8, drop_last=False)
    assert [len(batch.q) for batch in batches] == [4] * 8
    for epoch in (batches[:4], batches[4:]):
        seen = np.concatenate([batch.indices for batch in epoch])
        assert sorted(seen[:15].tolist()) == list(range(15)) and seen[15] == seen[0]
        assert not torch.equal(epoch[3].q[3], epoch[0].q[0])


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_have_the_rows_of_the_whole_batch(kind: LoaderKind, manifest: Manifest, shards: int) -> None:
    whole = load(kind, manifest, stop=5)
    for shard in range(shards):
        order = Order(len(manifest), 4, seed=2, shard=shard, shards=shards)
        with make_loader(kind, manifest, VIEWS, order, start=0, stop=5, workers=1) as batches:
            part = list(batches)
        rows = slice(shard * order.local_size, (shard + 1) * order.local_size)
        assert_same(part, [Batch(batch.q[rows], batch.k[rows], batch.indices[rows]) for batch in whole])


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


def test_a_dropped_loader_ends_its_threads(kind: LoaderKind, manifest: Manifest) -> None:
    before = threading.active_count()
    order = Order(len(manifest), 4, seed=2)
    loader = make_loader(kind, manifest, VIEWS, order, start=0, stop=50, workers=2)
    next(loader)
    assert threading.active_count() > before
    del loader
    gc.collect()
    # The pool in which torchvision's transforms run is kept for the next loader.
    left = [thread for thread in threading.enumerate() if not thread.name.startswith("views_")]
    assert len(left) <= before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
def test_training_goes_first(kind: LoaderKind, manifest: Manifest) -> None:
    """A loader's threads, DALI's too, leave the cores to those that train; what trains stays as it is."""

    def priorities() -> dict[int, int]:
        threads = [int(name) for name in os.listdir("/proc/self/task")]
        return {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}

    before = priorities()
    order = Order(len(manifest), 4, seed=2)
    with make_loader(kind, manifest, VIEWS, order, start=0, stop=50, workers=2) as batches:
        next(batches)
        during = priorities()
    added = {thread: nice for thread, nice in during.items() if thread not in before}
    assert len(added) >= 3 and min(added.values()) >= min(19, before[os.getpid()] + 1)
    # Threads of earlier loaders may end meanwhile.
    stayed = before.keys() & during.keys()
    assert os.getpid() in stayed and all(during[thread] == before[thread] for thread in stayed)


def test_auto_is_dali_where_it_is_installed(manifest: Manifest) -> None:
    need_dali()
    assert_same(load("auto", manifest, stop=2), load("dali", manifest, stop=2))


def test_without_dali(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fastmoco\[dali-cuda13\].*fastmoco\[dali-cuda12\]"):
        make_loader("dali", manifest, VIEWS, Order(15, 4, seed=2), start=0, stop=1, workers=1)
    assert_same(load("auto", manifest, stop=2), load("pillow", manifest, stop=2))


def test_an_order_of_another_set_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UserError, match="14 images, but the manifest lists 15"):
        make_loader("torchvision", manifest, VIEWS, Order(14, 4, seed=2), start=0, stop=1, workers=0)
    with pytest.raises(UserError, match="start <= stop"):
        make_loader("torchvision", manifest, VIEWS, Order(15, 4, seed=2), start=2, stop=1, workers=0)


DAMAGES = ["truncated", "missing", "empty", "replaced", "other size"]


def spoil(path: Path, damage: str) -> None:
    """Damage a file; but for "other size" its size in bytes or its time tell."""
    if damage == "missing":
        path.unlink()
    elif damage == "replaced":
        Image.new("RGB", Image.open(path).size).save(path)
    elif damage == "other size":
        stat = path.stat()
        Image.new("RGB", (200, 140)).save(path)
        with path.open("r+b") as stream:
            stream.truncate(stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        path.write_bytes(path.read_bytes()[: 2000 if damage == "truncated" else 0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_spoilt_during_the_run_is_replaced_and_named(
    kind: LoaderKind, checked: Manifest, workers: int, damage: str
) -> None:
    untouched = load(kind, checked, stop=8, drop_last=False)
    spoil(checked.path(3), damage)
    quarantine = Quarantine(1)
    batches = load(kind, checked, stop=8, drop_last=False, workers=workers, quarantine=quarantine)
    (bad,) = quarantine.entries
    assert bad.index == 3 and bad.file == "3.png" and len(bad.reason) > 5
    assert 3 not in np.concatenate([batch.indices for batch in batches])
    order = Order(len(checked), 4, seed=2, drop_last=False)
    for t, (batch, before) in enumerate(zip(batches, untouched, strict=True)):
        same = before.indices != 3
        # Every other slot of every batch is what it would have been.
        np.testing.assert_array_equal(batch.indices[same], before.indices[same])
        assert torch.equal(batch.q[same], before.q[same]) and torch.equal(batch.k[same], before.k[same])
        for row in np.flatnonzero(~same):
            place = int(order.batch(t).places[row])
            assert batch.indices[row] == order.substitute(t // 4, place, bad={3})
            # The substitute's views are not those of its own place.
            epoch = untouched[t // 4 * 4 : t // 4 * 4 + 4]
            own = [b.q[i] for b in epoch for i in np.flatnonzero(b.indices == batch.indices[row])]
            assert own and not any(torch.equal(batch.q[row], view) for view in own)
    # What is known to be bad is not read again: a later start with the same quarantine goes on likewise.
    checked.path(3).unlink(missing_ok=True)
    assert_same(load(kind, checked, start=5, stop=8, drop_last=False, quarantine=quarantine), batches[5:])
    assert len(quarantine) == 1


def test_one_bad_file_more_than_allowed_stops_with_the_list(kind: LoaderKind, checked: Manifest) -> None:
    spoil(checked.path(3), "missing")
    spoil(checked.path(7), "empty")
    with pytest.raises(TooManyBad, match=r"2 image.* --max-bad 1") as caught:
        load(kind, checked, quarantine=Quarantine(1))
    assert "3.png" in str(caught.value) and "7.png" in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_quarantine_survives_a_checkpoint(kind: LoaderKind, checked: Manifest) -> None:
    spoil(checked.path(3), "truncated")
    quarantine = Quarantine(5)
    whole = load(kind, checked, quarantine=quarantine)
    again = Quarantine(5, json.loads(json.dumps(quarantine.state())))
    assert again.entries == quarantine.entries
    assert_same(load(kind, checked, start=6, quarantine=again), whole[6:])


def test_an_error_that_is_no_bad_file_comes_through(kind: LoaderKind, manifest: Manifest) -> None:
    def read(index: int) -> bytes:
        raise RuntimeError("a fault of the program")

    manifest.read = read  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a fault of the program"):
        load(kind, manifest)


def test_dali_goes_on_after_what_it_cannot_decode(manifest: Manifest) -> None:
    need_dali()
    good = [manifest.path(i).read_bytes() for i in range(6)]
    decoder = DaliDecoder(batch_size=8, threads=2, device=torch.device("cpu"))
    decoder.submit([good[0], b"no image", good[1], b"", good[3][:2000]])
    decoder.submit(good[3:])
    first = decoder.result()
    assert [isinstance(image, Undecodable) for image in first] == [False, True, False, True, True]
    assert all(5 < len(str(first[row])) < 200 and "pipeline" not in str(first[row]) for row in (1, 3, 4))
    images = [first[0], first[2], *decoder.result()]
    decoder.submit(good[:1])
    images.append(*decoder.result())
    for image, index in zip(images, [0, 1, 3, 4, 5, 0], strict=True):
        assert isinstance(image, torch.Tensor)
        np.testing.assert_array_equal(image.numpy(), manifest.decode(index))


def test_what_dali_does_not_decode_the_host_does(manifest: Manifest) -> None:
    """Half of the images are said not to be for DALI, and it fails on one that is said to be."""
    need_dali()
    Image.new("RGB", (33, 33), (9, 90, 200)).save(manifest.path(4), format="GIF")
    some = replace(manifest, dali=np.arange(15) % 2 == 0)
    assert_same(load("dali", some, stop=3), load("pillow", some, stop=3))


def test_cpu_and_gpu_decode_by_the_same_graph() -> None:
    """A pipeline records its operators without a GPU; only what names the device differs."""
    need_dali()
    graphs = []
    for device in ("cpu", "cuda:0"):
        pipeline = decode_pipeline(batch_size=4, threads=1, device=torch.device(device), largest=1000)
        pipeline._build_graph()
        graphs.append([str(operator._spec) for operator in pipeline._ops])
    cpu, gpu = graphs
    assert len(cpu) == 2 and cpu != gpu
    assert cpu == [text.replace("device: mixed", "device: cpu").replace("_gpu", "_cpu") for text in gpu]


@pytest.mark.parametrize(("threads", "workers"), [(1, 1), (2, 1), (7, 1), (8, 2), (16, 4)])
def test_threads_that_nobody_named_are_a_quarter_of_those_that_train(
    monkeypatch: pytest.MonkeyPatch, threads: int, workers: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert default_workers("cpu") == workers and default_workers("cuda:1") == 2
