"""This package's loading in lightly's batch layout: `from fastmoco.adapters.loader import PairLoader`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmoco.adapters.between import world
from fastmoco.data.dali import dali_installed
from fastmoco.data.loader import LoaderKind, make_loader
from fastmoco.data.manifest import load_manifest
from fastmoco.data.order import Order
from fastmoco.data.pairs import PairKind, find_pairs
from fastmoco.data.quarantine import Quarantine
from fastmoco.data.sizes import show_count
from fastmoco.data.verify import describe_skipped
from fastmoco.data.views import ViewConfig
from fastmoco.device import find_device
from fastmoco.errors import UserError
from fastmoco.train.recipes import find

PairBatch = tuple[list[Tensor], Tensor, list[str]]
"""Two views (N, 3, size, size) in [0, 1], targets (N,) int64, and file names, as a DataLoader of lightly's gives them:
`for (x0, x1), targets, filenames in loader`. Targets are classes by the first label, -1 where an image has none, and 0
throughout where there is no label."""


class _Quarantine(Quarantine):
    option = "max_bad"
    remedy = "Mend or remove them, or make the loader anew with a higher max_bad"


class PairLoader:
    """Random pairs of views of the images of `data`, batch after batch; going over it is an epoch, another each time.

    data, labels, label: images, and a CSV file with a label column, as `fastmoco pretrain` takes them.
    split: take only the images whose split column, `split_column`, holds this; all if not given.
    recipe: whose views, such as mocov2 or histology-mse-small; `views` in its place says them one by one.
    size: side of the views in pixels; as the recipe says if not given.
    batch_size: images in a batch, over all processes of torch.distributed, which share an epoch out evenly.
    pairs: what the two views are cut from: image, or patient, two images of one patient, whom the CSV file's column
        `patient_column` names (see `fastmoco pretrain`).
    workers: threads that decode, and as many that make the views; if not given, two where `device` is a GPU, and else
        one for every four of torch's threads, which is for training on the CPU: where the views go on to a GPU, say
        more.
    loader: dali, pillow, torchvision, or auto, which takes DALI where it is installed. Views are made on the `device`.
    dtype: of the views, which are made in float16.
    max_bad: images that may turn out to be unreadable, each of which another stands in for. Files that are not there or
        that do not decode from the start are left out, with a warning that says how many.

    An epoch's images and draws depend on `seed` and the epoch's number alone. `set_epoch` sets that of the next, where
    training is resumed; `state_dict` and `load_state_dict` keep the place in it too. Lightning calls them by itself.
    Targets and file names are those of the first view. Raises UserError as `load_manifest` does, and where no
    image is of the split, a batch cannot be shared out or filled, the device cannot be used, `max_bad` is below 0, or
    pairs are to be of patients without two images.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        labels: str | Path | None = None,
        label: str | None = None,
        split: str | None = None,
        patient_column: str = "patient",
        split_column: str = "split",
        recipe: str = "mocov2",
        views: ViewConfig | None = None,
        size: int | None = None,
        batch_size: int = 256,
        seed: int = 0,
        pairs: PairKind = "image",
        workers: int | None = None,
        loader: LoaderKind = "auto",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        drop_last: bool = True,
        max_bad: int = 100,
        progress: bool = False,
    ) -> None:
        if max_bad < 0:
            raise UserError(f"max_bad must be 0 or more, not {max_bad}")
        with _as_arguments():
            self._device = find_device(str(device))
        chosen = find(recipe)(Path(data), Path()).views if views is None else views
        self.views = chosen if size is None else replace(chosen, size=size)
        manifest = load_manifest(
            Path(data),
            None if labels is None else Path(labels),
            label=() if label is None else (label,),
            patient_column=patient_column,
            split_column=split_column,
            decoder="dali" if loader == "dali" or (loader == "auto" and dali_installed()) else "pillow",
            progress=progress,
        )
        if manifest.skipped:
            warnings.warn(describe_skipped(manifest.skipped), stacklevel=2)
        self._manifest = manifest if split is None else manifest.only_split(split)
        here = world()
        paired = find_pairs(pairs, self._manifest)
        with _as_arguments():
            self._order = Order(
                len(self._manifest),
                batch_size,
                seed,
                drop_last=drop_last,
                shard=here.rank,
                shards=here.size,
                pairs=paired,
            )
        self._workers, self._loader, self._dtype = workers, loader, dtype
        self._quarantine = _Quarantine(max_bad)
        # Epoch and batch: of what was given out last, and where the next pass begins.
        self._done = self._next = (0, 0)
        none = np.zeros(len(self._manifest), dtype=np.int64)
        first = next(iter(self._manifest.labels), None)
        targets = none if first is None else self._manifest.classes(first)
        if unknown := int((targets < 0).sum()):
            warnings.warn(f"{show_count(unknown, 'image')} without a class in {first}: target -1", stacklevel=2)
        self._targets = torch.from_numpy(targets)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._order.batches_per_epoch

    @property
    def sampler(self) -> PairLoader:
        """Itself: Lightning tells a loader's sampler the number of each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Have the next epoch be number `epoch`, from 0; one in which `load_state_dict` left off goes on there."""
        if epoch != self._next[0]:
            self._done = self._next = (epoch, 0)

    def state_dict(self) -> dict[str, int]:
        """The number of the epoch, how many of its batches have been given out, and what these depend on."""
        epoch, batch = self._done
        return {"epoch": epoch + batch // len(self), "batch": batch % len(self)} | self._identity

    @property
    def _identity(self) -> dict[str, int]:
        order = self._order
        return {"images": order.samples, "batch_size": order.batch_size, "seed": order.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Have the next pass be the rest of the epoch in which `state_dict` gave `state`.

        Raises UserError where that was of a loader of other images, batches or another seed.
        """
        for name, value in self._identity.items():
            if state.get(name, value) != value:
                raise UserError(f"the loader was saved with {name} {state[name]}, not {value}: give it the same")
        self._done = self._next = (state["epoch"], state["batch"])

    def __iter__(self) -> Iterator[PairBatch]:
        epoch, first = self._next
        self._next = (epoch + 1, 0)
        # The processes may have met since this was made.
        here = world()
        batches = make_loader(
            self._loader,
            self._manifest,
            self.views,
            replace(self._order, shard=here.rank, shards=here.size),
            start=epoch * len(self) + first,
            stop=(epoch + 1) * len(self),
            workers=self._workers,
            device=self._device,
            quarantine=self._quarantine,
        )
        with batches:
            for done, batch in enumerate(batches, start=first + 1):
                self._done = (epoch, done)
                targets = self._targets[torch.from_numpy(batch.indices)].to(self._device)
                names = [self._manifest.files[index] for index in batch.indices.tolist()]
                yield [batch.q.to(self._dtype), batch.k.to(self._dtype)], targets, names


@contextmanager
def _as_arguments() -> Iterator[None]:
    """Have errors name arguments where what is shared with `fastmoco pretrain` names its options."""
    try:
        yield
    except UserError as error:
        said = str(error).replace("--no-drop-last", "drop_last=False")
        raise UserError(re.sub("--([a-z-]+)", lambda option: option[1].replace("-", "_"), said)) from error
