"""A whole pretraining run: data, folder, steps, checkpoints, export."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmoco.data.dali import dali_installed
from fastmoco.data.loader import LoaderKind, make_loader
from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.order import Order
from fastmoco.errors import UserError
from fastmoco.evaluate.features import extract
from fastmoco.evaluate.knn import monitor
from fastmoco.models.weights import EXPORTED, save_encoder
from fastmoco.precision import default_precision
from fastmoco.train.checkpoint import Checkpoint, Store, non_finite
from fastmoco.train.config import Config, to_json
from fastmoco.train.curves import draw_curves
from fastmoco.train.folder import open_run
from fastmoco.train.metrics import MetricsFile, Row, read_rows
from fastmoco.train.progress import ProgressLine
from fastmoco.train.schedules import learning_rate
from fastmoco.train.stop import StopRequest
from fastmoco.train.trainer import Trainer

# The kNN monitor looks at no more images than this: a score every few epochs should cost seconds.
MONITOR_IMAGES = 2000


class NonFiniteLoss(UserError):
    """A loss or a weight is NaN or infinite; the message names the step, the part and the last good checkpoint."""


class Stopped(Exception):
    """The run was asked to stop and has saved its state; `signal` is what asked."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True)
class Plan:
    """The run in numbers: micro-batches in an epoch, optimiser steps in all, and of those the warm-up."""

    per_epoch: int
    total: int
    warmup: int


def plan(config: Config, order: Order) -> Plan:
    """How many steps `config` makes over `order`."""
    optim = config.optim
    per_epoch = order.batches_per_epoch
    total = optim.steps or optim.epochs * per_epoch // optim.accumulate
    if total < 1:
        raise UserError(
            f"--accumulate {optim.accumulate} is more than the {optim.epochs * per_epoch} micro-batches of "
            f"{optim.epochs} epochs: no step would be made"
        )
    return Plan(per_epoch, total, round(optim.warmup_epochs * per_epoch / optim.accumulate))


def pretrain(config: Config) -> Path:
    """Run `config` to its end, or on from its last checkpoint with `run.resume`; return the run folder.

    Raises UserError for anything the user can mend, NonFiniteLoss where training diverged, Stopped on SIGINT or
    SIGTERM once the state is saved.
    """
    device = _device(config.run.device)
    store = Store(config.run.out, config.run.keep_checkpoints)
    saved = open_run(config, store)
    loader_kind = config.data.loader
    if loader_kind == "auto":
        loader_kind = "dali" if dali_installed() else "torchvision"
    manifest = _manifest(config, loader_kind)
    precision = default_precision(device.type) if config.run.precision == "auto" else config.run.precision
    # torch seeds each process at random.
    torch.manual_seed(config.run.seed)
    trainer = Trainer(config, precision=precision, device=device)
    return _Run(config, store, manifest, trainer, loader_kind).go(saved)


class _Run:
    """The loop around the trainer's step: what is written, shown and saved, and when."""

    def __init__(
        self, config: Config, store: Store, manifest: Manifest, trainer: Trainer, loader_kind: LoaderKind
    ) -> None:
        self.config = config
        self.store = store
        self.manifest = manifest
        self.trainer = trainer
        self.loader_kind = loader_kind
        self.out = config.run.out
        self.order = Order(len(manifest), config.optim.batch_size, config.run.seed, config.optim.drop_last)
        self.plan = plan(config, self.order)
        self.data = _fingerprint(manifest)

    def go(self, saved: Checkpoint | None) -> Path:
        start = 0
        if saved is not None:
            if saved.meta["data"] != self.data:
                raise UserError(
                    f"--resume: the images under {self.config.data.data} are not those that the run in {self.out} "
                    "began with (files added, removed or of another size); restore them or start another run"
                )
            self.trainer.restore(saved)
            start = saved.step
        self._describe(start)
        try:
            self.metrics = MetricsFile(self.out / "metrics.jsonl", resume_at=start)
            self.board = _tensorboard(self.out / "tensorboard", start)
            try:
                self._steps(start)
            finally:
                self.metrics.close()
                self.board.close()
                draw_curves(read_rows(self.out / "metrics.jsonl"), self.out / "curves.png")
        except OSError as error:
            raise UserError(f"--out {self.out} could not be written: {error}; {self.store.last_good()}") from error
        save_encoder(self.out / EXPORTED, self.trainer.module.query, to_json(self.config))
        return self.out

    def _steps(self, start: int) -> None:
        config, trainer, total = self.config, self.trainer, self.plan.total
        accumulate = config.optim.accumulate
        loader = make_loader(
            self.loader_kind,
            self.manifest,
            config.views,
            self.order,
            start=start * accumulate,
            stop=total * accumulate,
            workers=config.data.workers,
        )
        progress = ProgressLine(done=start, total=total, parts=trainer.module.loss_names)
        with StopRequest() as stop, contextlib.closing(loader), progress:
            self.progress = progress
            clock = _Clock()
            batches = clock.timing(loader)
            for step in range(start, total):
                trainer.step(islice(batches, accumulate), self._lr(step))
                done = step + 1
                progress.advance(done)
                knn = self._knn_due(step)
                # Read once: a signal may come between any two lines.
                asked = stop.signal
                save = done % config.run.checkpoint_every == 0 or done == total or asked is not None
                if save or knn or done % config.run.log_every == 0:
                    rows = self._rows(done, clock)
                    if knn:
                        rows[-1] |= self._knn()
                    self._write(rows)
                    clock.restart()
                if save:
                    path = self._save(done)
                    if asked is not None and done < total:
                        raise Stopped(f"stopped at step {done} of {total}; saved {path}; go on with --resume", asked)

    def _lr(self, step: int) -> float:
        optim = self.config.optim
        return learning_rate(
            step, peak=optim.lr, total=self.plan.total, warmup=self.plan.warmup, schedule=optim.schedule
        )

    def _rows(self, done: int, clock: _Clock) -> list[Row]:
        """The steps since the last read as rows, the newest with what only a logging step knows."""
        history = self.trainer.history.read()
        rows: list[Row] = []
        for step, values in enumerate(history, start=done - len(history) + 1):
            epoch = step * self.config.optim.accumulate / self.plan.per_epoch
            rows.append({"step": step, "epoch": round(epoch, 4), "lr": self._lr(step - 1), **values})
            broken = [name for name in self.trainer.module.loss_names if not math.isfinite(values[name])]
            if broken:
                self._write(rows)
                raise NonFiniteLoss(
                    f"step {step}: {' and '.join(broken)} is not finite ({values[broken[0]]}); no update was made "
                    f"from that step on; {self.store.last_good()}. A lower --lr or a longer --warmup-epochs may help"
                )
        images = len(rows) * self.config.optim.accumulate * self.config.optim.batch_size
        rows[-1] |= {"queue_fill": self.trainer.queue_fill, **clock.read(images)}
        return rows

    def _write(self, rows: list[Row]) -> None:
        self.metrics.write(rows)
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, row["step"])
        if "pairs_per_s" in rows[-1]:
            self.progress.show(rows[-1])

    def _save(self, step: int) -> Path:
        checkpoint = self.trainer.checkpoint(step, self.data)
        broken = non_finite(checkpoint.tensors)
        if broken:
            raise NonFiniteLoss(
                f"step {step}: {broken[0]} and {len(broken) - 1} more tensors are not finite, so no checkpoint was "
                f"written; {self.store.last_good()}. A lower --lr or a longer --warmup-epochs may help"
            )
        self.metrics.sync()
        return self.store.save(checkpoint)

    def _knn_due(self, step: int) -> bool:
        every = self.config.run.knn_every * self.plan.per_epoch
        if not every or not self.manifest.labels:
            return False
        accumulate = self.config.optim.accumulate
        return (step + 1) * accumulate // every > step * accumulate // every or step + 1 == self.plan.total

    def _knn(self) -> Row:
        """Leave-one-out kNN scores of the query encoder's pooled stage-4 feature on some of the training images."""
        name = next(iter(self.manifest.labels))
        rng = np.random.Generator(np.random.Philox(key=[self.config.run.seed, 0x5A37]))
        chosen = np.sort(rng.permutation(len(self.manifest))[:MONITOR_IMAGES])
        some = self.manifest.select(chosen)
        features = extract(
            self.trainer.module.query,
            some,
            size=self.config.views.size,
            resize=self.config.views.resize or 1.0,
            batch_size=64,
            device=self.trainer.engine.device,
            precision=self.trainer.engine.precision,
            progress=False,
        )
        scores = monitor(features["stage4"], some.labels[name], some.patients)
        return {f"knn_{score}": value for score, value in scores.items() if value is not None}

    def _describe(self, start: int) -> None:
        config, engine = self.config, self.trainer.engine
        skipped = self.manifest.skipped
        if skipped:
            (self.out / "skipped.txt").write_text("".join(f"{item}\n" for item in skipped), encoding="utf-8")
            print(f"left out {len(skipped)} files that cannot be decoded, the first {skipped[0]}; see skipped.txt")
        print(
            f"{config.recipe}: {config.model.arch} at {config.views.size} px on {len(self.manifest)} images, "
            f"{self.plan.total} steps of {config.optim.accumulate} x {config.optim.batch_size}, {engine.precision} on "
            f"{engine.device}, loading with {self.loader_kind}; run folder {self.out}"
        )
        if start:
            print(f"going on from step {start}")


class _Clock:
    """Wall time between logging steps, and the share of it spent waiting for the loader."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._since, self._waited = time.perf_counter(), 0.0

    def timing(self, loader: Any) -> Any:
        """Yield from `loader`, counting the time it takes."""
        iterator = iter(loader)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - before
            yield batch

    def read(self, images: int) -> Row:
        """Speed and waiting of the interval, in which `images` images were trained on."""
        elapsed = time.perf_counter() - self._since
        return {"pairs_per_s": images / elapsed, "data_wait": self._waited / elapsed}


def _manifest(config: Config, loader_kind: str) -> Manifest:
    data = config.data
    manifest = load_manifest(
        data.data,
        data.labels,
        label=data.label,
        file_column=data.file_column,
        patient_column=data.patient_column,
        split_column=data.split_column,
        decoder="dali" if loader_kind == "dali" else "pillow",
    )
    return manifest if data.split is None else manifest.only_split(data.split)


def _fingerprint(manifest: Manifest) -> str:
    digest = hashlib.sha256(json.dumps(manifest.files).encode())
    digest.update(np.ascontiguousarray(manifest.sizes).tobytes())
    return digest.hexdigest()


def _device(name: str) -> torch.device:
    """The device that --device names. Raises UserError where there is none such here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def _tensorboard(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)
