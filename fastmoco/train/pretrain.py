"""A whole pretraining run: data, folder, steps, checkpoints, export."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from fastmoco.atomic import write_text
from fastmoco.data.dali import dali_installed
from fastmoco.data.loader import make_loader
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order
from fastmoco.data.quarantine import ImagesGone, Quarantine, TooManyBad
from fastmoco.device import find_device
from fastmoco.errors import UserError
from fastmoco.models.weights import EXPORTED, save_encoder
from fastmoco.precision import default_precision
from fastmoco.train.board import Board
from fastmoco.train.checkpoint import Checkpoint, Store, non_finite
from fastmoco.train.clock import Clock
from fastmoco.train.config import Config, to_json
from fastmoco.train.curves import draw_curves
from fastmoco.train.folder import BAD_FILES, find_checkpoint, write_description
from fastmoco.train.images import find_images, fingerprint, list_images, refuse_out_inside, root_of, staged
from fastmoco.train.metrics import MetricsFile, Row, read_rows
from fastmoco.train.monitor import knn_row
from fastmoco.train.progress import ProgressLine
from fastmoco.train.schedules import learning_rate, plan
from fastmoco.train.stop import StopRequest
from fastmoco.train.trainer import Trainer


class NonFiniteLoss(UserError):
    """A loss or a weight is NaN or infinite; the message names the step, the part and the last good checkpoint."""


class Stopped(Exception):
    """The run was asked to stop and has saved its state; `signal` is what asked."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def pretrain(config: Config) -> Path:
    """Run `config` to its end, or on from its last checkpoint with `run.resume`; return the run folder.

    Raises UserError for anything the user can mend, NonFiniteLoss where training diverged, Stopped on SIGINT,
    SIGTERM or SIGUSR1 once the state is saved.
    """
    device = find_device(config.run.device)
    config = _resolve(config, device)
    store = Store(config.run.out, config.run.keep_checkpoints, max_failed=config.run.max_failed_saves)
    saved = find_checkpoint(config, store)
    manifest = find_images(config, saved)
    refuse_out_inside(config, manifest)
    # torch seeds each process at random.
    torch.manual_seed(config.run.seed)
    trainer = Trainer(config, precision=config.run.precision, device=device, initialise=saved is None)
    return _Run(config, store, manifest, trainer).go(saved)


class _Run:
    """The loop around the trainer's step: what is written, shown and saved, and when."""

    def __init__(self, config: Config, store: Store, manifest: Manifest, trainer: Trainer) -> None:
        self.config = config
        self.store = store
        self.listed = manifest
        self.manifest = staged(config, manifest)
        self.trainer = trainer
        self.out = config.run.out
        self.order = Order(len(manifest), config.optim.batch_size, config.run.seed, config.optim.drop_last)
        self.plan = plan(config, self.order)
        self._refuse_single_images()
        self.data = fingerprint(manifest)
        self.quarantine = Quarantine(config.data.max_bad)
        self.reported = 0

    def _refuse_single_images(self) -> None:
        """BatchNorm has no variance of a single value: neither of one image's projection, nor of one 1 x 1 map."""
        single = self.config.optim.batch_size == 1
        if single and (self.config.loss.method == "barlow" or self.config.views.size <= 32):
            raise UserError("--batch-size 1: BatchNorm cannot train on one image here; give it at least 2")

    def go(self, saved: Checkpoint | None) -> Path:
        start = 0
        if saved is not None:
            if saved.meta["data"] != self.data:
                raise UserError(
                    f"--resume: the images under {self.config.data.data} are not those that the run in {self.out} "
                    "began with (files added, removed or of another size); restore them or start another run"
                )
            self.trainer.restore(saved)
            self.quarantine = Quarantine(self.config.data.max_bad, saved.meta.get("quarantine", []))
            self.reported = len(self.quarantine)
            start = saved.step
        try:
            write_description(config=self.config, store=self.store, skipped=self.listed.skipped)
            if saved is None:
                list_images(self.config, self.listed)
            self._describe(start)
            self.metrics = MetricsFile(self.out / "metrics.jsonl", resume_at=start)
            self.board = Board(self.out / "tensorboard", start)
            try:
                self._steps(start)
            except (Stopped, NonFiniteLoss, TooManyBad, ImagesGone):
                self._finish()
                raise
            self._finish()
        except OSError as error:
            raise UserError(f"--out {self.out} could not be written: {error}; {self.store.last_good()}") from error
        save_encoder(self.out / EXPORTED, self.trainer.module.query, to_json(self.config))
        if self.quarantine:
            print(f"{len(self.quarantine)} image(s) went bad and were replaced by others: see {self.out / BAD_FILES}")
        return self.out

    def _finish(self) -> None:
        """Wait for the checkpoint being written, close the metrics, TensorBoard's included, and draw them."""
        self.store.finish()
        self.metrics.close()
        self.board.close()
        draw_curves(read_rows(self.out / "metrics.jsonl"), self.out / "curves.png")

    def _steps(self, start: int) -> None:
        config, trainer, total = self.config, self.trainer, self.plan.total
        accumulate = config.optim.accumulate
        loader = make_loader(
            config.data.loader,
            self.manifest,
            config.views,
            self.order,
            start=start * accumulate,
            stop=total * accumulate,
            workers=config.data.workers,
            device=trainer.engine.device,
            quarantine=self.quarantine,
        )
        progress = ProgressLine(done=start, total=total, parts=trainer.module.loss_names)
        with StopRequest() as stop, contextlib.closing(loader), progress:
            self.progress = progress
            clock = Clock(trainer.pushed)
            batches = clock.timing(loader)
            for step in range(start, total):
                done = step
                try:
                    trainer.step(islice(batches, accumulate), self._lr(step))
                    done = step + 1
                except (TooManyBad, ImagesGone) as error:
                    raise type(error)(f"{error}\n{self._saved_before(done, clock)}") from error
                finally:
                    self._report_bad()
                progress.advance(done)
                # Read once: a signal may come between any two lines.
                asked = stop.signal
                save = done % config.run.checkpoint_every == 0 or done == total or asked is not None
                knn = self._knn_due(step)
                if not (save or knn or done % config.run.log_every == 0):
                    continue
                rows = self._rows(done, clock)
                if knn:
                    rows[-1] |= knn_row(trainer, self.manifest, self.quarantine)
                self._write(rows)
                if save and done < total and asked is None:
                    self.store.save(self._checkpoint(done), before=self.metrics.sync)
                elif save:
                    path = self._save_now(done)
                    if done < total and asked is not None:
                        raise Stopped(f"stopped at step {done} of {total}; saved {path}; go on with --resume", asked)
                # Neither a score nor a checkpoint counts in the speed.
                clock.restart(trainer.pushed)

    def _lr(self, step: int) -> float:
        optim = self.config.optim
        return learning_rate(
            step, peak=optim.lr, total=self.plan.total, warmup=self.plan.warmup, schedule=optim.schedule
        )

    def _rows(self, done: int, clock: Clock) -> list[Row]:
        """The steps since the last read as rows, the newest with what only a logging step knows."""
        history = self.trainer.history.read()
        rows: list[Row] = []
        if not history:
            return rows
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
        rows[-1] |= {"queue_fill": self.trainer.queue_fill, "bad_files": len(self.quarantine)}
        rows[-1] |= clock.read(self.trainer.pushed)
        return rows

    def _report_bad(self) -> None:
        """Say which images went bad since the last time, and list all of them in the run folder."""
        bad = self.quarantine.entries[self.reported :]
        if bad:
            for entry in bad:
                self.progress.say(f"set aside {entry}; another image takes its place")
            self.reported += len(bad)
            write_text(self.out / BAD_FILES, "".join(f"{entry}\n" for entry in self.quarantine.entries))

    def _saved_before(self, step: int, clock: Clock) -> str:
        """What was saved of the `step` steps done when the images of the next could not be had."""
        if self.trainer.between_steps and step > 0:
            if rows := self._rows(step, clock):
                self._write(rows)
            return f"saved {self._save_now(step)}"
        return self.store.last_good()

    def _write(self, rows: list[Row]) -> None:
        self.metrics.write(rows)
        self.board.write(rows)
        if "pairs_per_s" in rows[-1]:
            self.progress.show(rows[-1])

    def _save_now(self, step: int) -> Path:
        return self.store.save_now(self._checkpoint(step), before=self.metrics.sync)

    def _checkpoint(self, step: int) -> Checkpoint:
        checkpoint = self.trainer.checkpoint(step, self.data)
        broken = non_finite(checkpoint.tensors)
        if broken:
            raise NonFiniteLoss(
                f"step {step}: {broken[0]} and {len(broken) - 1} more tensors are not finite, so no checkpoint was "
                f"written; {self.store.last_good()}. A lower --lr or a longer --warmup-epochs may help"
            )
        checkpoint.meta |= {"root": root_of(self.listed), "quarantine": self.quarantine.state()}
        return checkpoint

    def _knn_due(self, step: int) -> bool:
        every = self.config.run.knn_every * self.plan.per_epoch
        if not every or not self.manifest.labels:
            return False
        accumulate = self.config.optim.accumulate
        return (step + 1) * accumulate // every > step * accumulate // every or step + 1 == self.plan.total

    def _describe(self, start: int) -> None:
        config, engine = self.config, self.trainer.engine
        skipped = self.manifest.skipped
        if skipped:
            first = str(skipped[0]).encode(errors="backslashreplace").decode()
            print(f"left out {len(skipped)} files, the first {first}; see skipped.txt")
        print(
            f"{config.recipe}: {config.model.arch} at {config.views.size} px on {len(self.manifest)} images, "
            f"{self.plan.total} steps of {config.optim.accumulate} x {config.optim.batch_size}, {engine.precision} on "
            f"{engine.device}, loading with {config.data.loader}; run folder {self.out}"
        )
        if self.quarantine:
            print(f"{len(self.quarantine)} of the images were set aside before, as {self.out / BAD_FILES} says")
        if start == self.plan.total:
            print(f"finished already at step {start}: nothing to train; --init {self.out} starts another run from it")
        elif start:
            print(f"going on from step {start}")


def _resolve(config: Config, device: torch.device) -> Config:
    """`config` with every "auto" replaced by what it means here: it is stored with the run and held to on resume."""
    loader, precision = config.data.loader, config.run.precision
    if loader == "auto":
        loader = "dali" if dali_installed() else "pillow"
    if precision == "auto":
        precision = default_precision(device.type)
    return replace(
        config,
        data=replace(config.data, loader=loader),
        run=replace(config.run, precision=precision, device=str(device)),
    )
