"""What loading cannot do without, each part alone: reading the files, decoding them once, cutting the views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from bench.loaders import Setting
from bench.turns import Missing
from fastmoco.data.dali import dali_installed
from fastmoco.data.draws import draw
from fastmoco.ops.views import make_views

Opened = AbstractContextManager[Iterator[Any]]

# Files at hand for the parts that come after reading, as many as a benchmark draws.
_KEPT = 256


def read_alone(setting: Setting) -> Opened:
    """The bytes of a batch's files, by as many threads as there are workers."""
    return _threaded(setting, lambda i: setting.manifest.path(i).read_bytes())


def pillow_alone(setting: Setting) -> Opened:
    """The pixels of a batch's files by fastmoco's own decoder, by as many threads as there are workers."""
    return _threaded(setting, setting.manifest.decode)


def dali_alone(setting: Setting) -> Opened:
    """DALI's decoder and nothing else, from bytes in memory: no loader that decodes each file once can be faster."""
    if not dali_installed():
        raise Missing("NVIDIA DALI is not installed")
    return _dali(setting)


@contextmanager
def views_alone(setting: Setting) -> Iterator[Iterator[Any]]:
    """Two views of each of a batch's images, from decoded ones, with fastmoco's own operation on the device."""
    kept = min(len(setting.manifest), _KEPT)
    images = [torch.as_tensor(setting.manifest.decode(i)).to(setting.device) for i in range(kept)]
    views, threads = setting.views, max(setting.workers, 1)

    def cut(indices: np.ndarray) -> torch.Tensor:
        sizes = setting.manifest.sizes[indices % kept]
        drawn = [draw(views, seed=0, epoch=0, indices=indices, view=view, sizes=sizes) for view in (0, 1)]
        return make_views(
            [images[i % kept] for i in indices],
            np.concatenate(drawn),
            size=views.size,
            blur_kernel=views.blur_kernel,
            threads=threads,
        )

    yield (cut(indices) for indices in _indices(setting))


@contextmanager
def _threaded(setting: Setting, work: Callable[[int], Any]) -> Iterator[Iterator[list[Any]]]:
    with ThreadPoolExecutor(max(setting.workers, 1)) as pool:
        yield (list(pool.map(work, map(int, indices))) for indices in _indices(setting))


@contextmanager
def _dali(setting: Setting) -> Iterator[Iterator[Any]]:
    from nvidia.dali import fn, pipeline_def, types

    kept = min(len(setting.manifest), _KEPT)
    encoded = [np.frombuffer(setting.manifest.path(i).read_bytes(), np.uint8) for i in range(kept)]
    batches = _indices(setting)

    on_gpu = setting.device != "cpu"

    @pipeline_def(batch_size=setting.batch_size, num_threads=max(setting.workers, 1), device_id=0 if on_gpu else None)
    def graph() -> Any:
        data = fn.external_source(lambda: [encoded[i % kept] for i in next(batches)], batch=True)
        return fn.decoders.image(data, device="mixed" if on_gpu else "cpu", output_type=types.RGB)

    pipeline = graph()
    pipeline.build()
    yield (pipeline.run() for _ in iter(int, 1))


def _indices(setting: Setting) -> Iterator[np.ndarray]:
    order = setting.order()
    t = 0
    while True:
        yield order.batch(t).indices
        t += 1


FLOORS: dict[str, Callable[[Setting], Opened]] = {
    "reading alone": read_alone,
    "Pillow decoding alone": pillow_alone,
    "DALI decoding alone": dali_alone,
    "fastmoco views alone": views_alone,
}
