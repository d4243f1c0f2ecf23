"""The data path under what happens to it: kill -9, files that change while they are read, hours. `make test-system`."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastmoco.data.dali import dali_installed
from fastmoco.data.loader import LoaderKind, make_loader
from fastmoco.data.manifest import load_manifest
from fastmoco.data.order import Order
from fastmoco.data.views import ViewConfig
from fastmoco.train.metrics import read_rows
from runs import draw_images

pytestmark = pytest.mark.system
VIEWS = ViewConfig(size=32, crop_scale=(0.2, 1.0), flip_p=0.5)
DALI = pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")

# 70 images in batches of 12: six an epoch, the last filled up.
IMAGES, BATCH, EPOCHS, SEED = 70, 12, 8, 3
STOP = EPOCHS * 6

# Stands for a training job: what a step does with its images is to note them, and a checkpoint holds the notes.
JOB = """
import json, os, sys, time, zlib
from fastmoco.data.loader import make_loader
from fastmoco.data.manifest import load_manifest
from fastmoco.data.order import Order
from test_data_system import BATCH, SEED, STOP, VIEWS
data, checkpoint, shards = sys.argv[1], sys.argv[2], int(sys.argv[3])
state = json.load(open(checkpoint)) if os.path.exists(checkpoint) else {"position": 0, "seen": []}
manifest = load_manifest(__import__("pathlib").Path(data), decoder="dali", progress=False)
orders = [Order(len(manifest), BATCH, SEED, drop_last=False, shard=i, shards=shards) for i in range(shards)]
loaders = [make_loader("dali", manifest, VIEWS, o, start=state["position"], stop=STOP, workers=1) for o in orders]
for t in range(state["position"], STOP):
    for loader in loaders:
        batch = next(loader)
        state["seen"] += [[t, int(i), zlib.crc32(q.numpy().tobytes()), zlib.crc32(k.numpy().tobytes())]
                          for i, q, k in zip(batch.indices, batch.q, batch.k)]
    print(t, flush=True)
    time.sleep(0.02)
    if t % 3 == 2 or t == STOP - 1:
        with open(checkpoint + ".new", "w") as stream:
            json.dump(state | {"position": t + 1}, stream)
        os.replace(checkpoint + ".new", checkpoint)
"""


def environment(tmp_path: Path) -> dict[str, str]:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    return os.environ | cache | {"PYTHONPATH": os.pathsep.join(paths)}


@DALI
def test_ten_kills_and_other_numbers_of_shards_lose_and_repeat_nothing(tmp_path: Path) -> None:
    images = draw_images(tmp_path, IMAGES)
    checkpoint = tmp_path / "state.json"
    rng = random.Random(11)
    kills = 0
    shards = 0
    while True:
        shards = shards % 3 + 1
        command = [sys.executable, "-c", JOB, str(images), str(checkpoint), str(shards)]
        with subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.PIPE, text=True) as job:
            assert job.stdout is not None
            if kills < 10:
                # Some while the first batches are being made, some in the middle of later ones.
                for _ in range(rng.randrange(6)):
                    assert job.stdout.readline()
                time.sleep(rng.random() * 0.05)
                job.kill()
                kills += 1
            else:
                job.communicate(timeout=300)
                assert job.returncode == 0
                break
        assert job.returncode == -signal.SIGKILL
    seen = json.loads(checkpoint.read_text())["seen"]
    assert len(seen) == STOP * BATCH
    order = Order(IMAGES, BATCH, SEED, drop_last=False)
    for epoch in range(EPOCHS):
        indices = [index for t, index, *_ in seen if t // 6 == epoch]
        assert sorted(indices[:IMAGES]) == list(range(IMAGES))
        assert indices[IMAGES:] == indices[:2]
    # Not only the right images: the views of a run that nothing befell.
    manifest = load_manifest(images, decoder="dali", progress=False)
    with make_loader("dali", manifest, VIEWS, order, start=0, stop=STOP, workers=2) as loader:
        expected = [
            [t, int(index), zlib.crc32(q.numpy().tobytes()), zlib.crc32(k.numpy().tobytes())]
            for t, batch in enumerate(loader)
            for index, q, k in zip(batch.indices, batch.q, batch.k, strict=True)
        ]
    assert seen == expected


STEPS, SMALL_BATCH = 300, 8


@DALI
def test_files_damaged_deleted_and_replaced_while_it_runs(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    """A run of 300 steps completes, and reports exactly the files that it read again after they changed."""
    data = tmp_path / "fundus"
    shutil.copytree(real_data("idrid_fundus_256"), data)
    manifest = load_manifest(data, decoder="dali", progress=False)
    order = Order(len(manifest), SMALL_BATCH, 0)
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "fastmoco.cli", "pretrain", "fundus-mse-small", "--data", str(data), "--out", str(out),
        "--arch", "resnet18", "--size", "32", "--batch-size", str(SMALL_BATCH), "--queue-size", "64", "--seed", "0",
        "--steps", str(STEPS), "--log-every", "1", "--checkpoint-every", "100", "--loader", "dali", "--workers", "1",
        "--knn-every", "0",
    ]  # fmt: skip
    environ = environment(tmp_path)
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        changed: list[int] = []
        expected: set[int] = set()
        for step in (60, 265):
            while len(read_rows(out / "metrics.jsonl")) < step:
                assert run.poll() is None, run.communicate()[0]
                time.sleep(0.01)
            # So that it is known what has been read: this test may be slower than the run.
            run.send_signal(signal.SIGSTOP)
            done = len(read_rows(out / "metrics.jsonl"))
            again, never = choose(order, done, changed)
            for number, index in enumerate(again + never):
                change(manifest.path(index), number)
            changed += again + never
            expected |= set(again)
            run.send_signal(signal.SIGCONT)
        output = run.communicate(timeout=600)[0]
    assert run.returncode == 0, output
    assert len(read_rows(out / "metrics.jsonl")) == STEPS
    reported = {line.split(": ")[0] for line in (out / "bad_files.txt").read_text().splitlines()}
    assert reported == {manifest.files[index] for index in expected} and len(reported) == 20
    assert len(changed) == 28
    assert all(f"set aside {name}: " in output for name in reported)
    assert f"{len(reported)} image(s) went bad" in output
    assert read_rows(out / "metrics.jsonl")[-1]["bad_files"] == len(reported)


def choose(order: Order, done: int, changed: list[int]) -> tuple[list[int], list[int]]:
    """Images to change when `done` steps are done: some that will be read again, and, towards the end, some that never
    will. What may be being read just now is neither.
    """
    last = {int(index): t for t in range(STEPS) for index in order.batch(t).indices if int(index) not in changed}
    if done < 100:
        return [index for index, t in last.items() if 120 < t < 250][:12], []
    again = [index for index, t in last.items() if t > done + 12][:8]
    substitutes = set()
    for t in range(done - 12, STEPS):
        slots = order.batch(t)
        for index, place in zip(slots.indices.tolist(), slots.places.tolist(), strict=True):
            if index in again + changed:
                substitutes.add(order.substitute(slots.epoch, place, again + changed))
    never = [index for index, t in last.items() if t < done and index not in substitutes][:8]
    assert len(again) == len(never) == 8, f"stopped at step {done}, too late"
    return again, never


def change(path: Path, number: int) -> None:
    """Truncate, delete, replace, empty, corrupt or only touch a file, by its number."""
    data = path.read_bytes()
    match number % 6:
        case 0:
            path.write_bytes(data[: len(data) // 2])
        case 1:
            path.unlink()
        case 2:
            Image.new("RGB", (300, 200), (90, 30, 30)).save(path)
        case 3:
            path.write_bytes(b"")
        case 4:
            path.write_bytes(data[:500] + bytes(len(data) - 500))
        case 5:
            os.utime(path)


@pytest.mark.parametrize("kind", [pytest.param("dali", marks=DALI), "pillow"])
def test_memory_is_flat_over_two_thousand_batches(
    real_data: Callable[[str], Path], tmp_path: Path, kind: LoaderKind
) -> None:
    folder = real_data("idrid_fundus_256")
    watch = f"""
import json, resource
from pathlib import Path
from fastmoco.data.loader import make_loader
from fastmoco.data.manifest import load_manifest
from fastmoco.data.order import Order
from test_data_system import VIEWS
manifest = load_manifest(Path({str(folder)!r}), decoder={kind!r}, progress=False)
order = Order(len(manifest), 16, seed=0)
sizes = []
with make_loader({kind!r}, manifest, VIEWS, order, start=0, stop=3000, workers=2) as loader:
    for batch in loader:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * resource.getpagesize())
print(json.dumps(sizes))
"""
    # Blocks from there on, and so images, go back to the kernel when they are freed. By default they leave holes in the
    # heap, by which it is some hundredths larger or smaller from hour to hour.
    exact = environment(tmp_path) | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", watch], env=exact, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    assert len(sizes) == 3000
    # Allocators reach their high-water marks in the first thousand; how many batches are in flight always changes.
    early, late = statistics.median(sizes[800:1000]), statistics.median(sizes[2800:])
    print(f"{kind}: {early / 1e6:.1f} MB after 900 batches, {late / 1e6:.1f} MB after 2900")
    assert late < 1.01 * early
