"""A whole pretraining run: data, folder, steps, checkpoints, export."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from fastmoco.allocator import freed_memory_kept
from fastmoco.data.loader import Batch, make_loader
from fastmoco.data.manifest import Manifest
from fastmoco.data.order import Order
from fastmoco.data.pairs import find_pairs
from fastmoco.data.quarantine import ImagesGone, TooManyBad
from fastmoco.distributed.agreement import agree_to_raise, everywhere, first_then_others, largest
from fastmoco.distributed.launch import find_launch, joined
from fastmoco.distributed.monitor import Monitor, watched
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.models.weights import EXPORTED, save_encoder
from fastmoco.train.alike import check_settings, check_start
from fastmoco.train.checkpoint import Checkpoint, Store
from fastmoco.train.classes import classes
from fastmoco.train.clock import Clock
from fastmoco.train.collapse import Collapse
from fastmoco.train.config import Config
from fastmoco.train.crowding import Crowding
from fastmoco.train.due import LINE, NOTHING, SAVE, Due
from fastmoco.train.folder import BAD_FILES, find_checkpoint, writing
from fastmoco.train.images import fingerprint, root_of, staged
from fastmoco.train.metrics import Row
from fastmoco.train.monitor import knn_row
from fastmoco.train.opening import describe, initial_weights, listed_images, refuse_single_images, resolve
from fastmoco.train.record import Record, make_record
from fastmoco.train.saving import NonFiniteLoss, Saving
from fastmoco.train.schedules import learning_rate, plan
from fastmoco.train.set_aside import SetAside
from fastmoco.train.stop import StopRequest
from fastmoco.train.stored import to_json
from fastmoco.train.trainer import Trainer


class Stopped(Exception):
    """The run was asked to stop and has saved its state; `signal` is what asked."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def pretrain(config: Config) -> Path:
    """Run `config` to its end, or on from its last checkpoint with `run.resume`; return the run folder.

    Started by torchrun or srun, it is one process of many, which share each micro-batch out among them and all return
    or raise alike.

    Raises UserError for anything the user can mend, NonFiniteLoss where training diverged, Stopped on a signal that
    asks to stop (stop.py) once the state is saved.
    """
    launch, seconds = find_launch(), config.run.watchdog
    with (
        StopRequest() as stop,
        joined(config.run.device, launch=launch, timeout=max(300.0, 2 * seconds)) as world,
        watched(world, launch, seconds, orderly=(Stopped,)) as monitor,
    ):
        return _begin(world, config, monitor).go(stop)


def _begin(world: World, config: Config, monitor: Monitor) -> _Run:
    """The run, ready to go. What it was made of, a whole checkpoint maybe, is let go when this returns."""
    config = resolve(config, world.device)
    check_settings(world, config)
    run = config.run
    store = Store(run.out, run.keep_checkpoints, max_failed=run.max_failed_saves, alive=monitor.alive)
    saved = everywhere(world, lambda: find_checkpoint(config, store))
    check_start(world, saved)
    listed = first_then_others(world, lambda: listed_images(world, config, store, saved))
    manifest = everywhere(world, lambda: staged(config, listed))
    backbone = everywhere(world, lambda: initial_weights(world, config, saved))
    # torch seeds each process at random.
    torch.manual_seed(run.seed)
    targets = everywhere(world, lambda: classes(config, manifest))
    make = partial(Trainer, config, precision=run.precision, world=world, backbone=backbone, targets=targets)
    trainer = everywhere(world, make)
    return everywhere(world, lambda: _Run(config, store, manifest, trainer, saved, monitor, root=root_of(listed)))


class _Run:
    """The loop around the trainer's step: what is agreed on, saved and told, and when."""

    def __init__(
        self,
        config: Config,
        store: Store,
        manifest: Manifest,
        trainer: Trainer,
        saved: Checkpoint | None,
        monitor: Monitor,
        *,
        root: str,
    ) -> None:
        self.config = config
        self.store = store
        self.manifest = manifest
        self.trainer = trainer
        self.monitor = monitor
        self.world = world = trainer.world
        self.out = config.run.out
        optim = config.optim
        self.order = Order(
            len(manifest), optim.batch_size, config.run.seed, optim.drop_last, shard=world.rank, shards=world.size,
            pairs=find_pairs(config.data.pairs, manifest),
        )  # fmt: skip
        self.plan = plan(config, self.order)
        refuse_single_images(world, config, self.order)
        self.collapse = Collapse()
        # At the step under way, and what the clock says of those to come.
        self.due, self.clock_due = NOTHING, Due(config.run.checkpoint_minutes)
        self.crowding = Crowding(torch.get_num_threads() if world.device.type == "cpu" else 1)
        self.start = 0
        if saved is not None:
            trainer.restore(saved)
            self.start = saved.step
        self.set_aside = SetAside(world, config.data.max_bad, saved.meta.get("quarantine", []) if saved else [])
        self.saving = Saving(
            store, trainer, fingerprint=fingerprint(manifest, config), root=root,
            quarantine=self.set_aside.quarantine, saved_at=None if saved is None else saved.step,
        )  # fmt: skip

    def go(self, stop: StopRequest) -> Path:
        if self.world.first:
            set_aside = len(self.set_aside.quarantine)
            describe(self.trainer, self.manifest, self.order, self.plan, start=self.start, set_aside=set_aside)
        with writing(self.config, self.store), everywhere(self.world, self._make_record) as record:
            try:
                # Not earlier: what is freed while a run is built would be kept, and never used again.
                with freed_memory_kept(self.world.device.type):
                    self._steps(record, stop)
            finally:
                self.store.finish()
        encoder = self.trainer.query_encoder()
        if self.world.first:
            save_encoder(self.out / EXPORTED, encoder, to_json(self.config))
            if bad := self.set_aside.quarantine:
                print(f"{len(bad)} image(s) went bad and were replaced by others: see {self.out / BAD_FILES}")
        return self.out

    def _make_record(self) -> Record:
        parts = self.trainer.module.loss_names
        with writing(self.config, self.store):
            return make_record(self.config, self.world, parts, start=self.start, total=self.plan.total)

    def _steps(self, record: Record, stop: StopRequest) -> None:
        config, trainer, total = self.config, self.trainer, self.plan.total
        accumulate = config.optim.accumulate
        loader = make_loader(
            config.data.loader,
            self.manifest,
            config.views,
            self.order,
            start=self.start * accumulate,
            stop=total * accumulate,
            workers=config.data.workers,
            device=self.world.device,
            quarantine=self.set_aside.quarantine,
        )
        with contextlib.closing(loader):
            stop.begin(tell=self.world.first)
            self.record = record
            clock = Clock(trainer.pairs)
            self.crowding.restart()
            self.clock_due.restart(saved=True)
            self.monitor.beat(self.start)
            batches = clock.timing(loader)
            for done in range(self.start, total):
                ready = self._fetch(batches, done, clock, stop)
                trainer.step(self._alive(ready), self._lr(done))
                self.monitor.beat(done + 1)
                # Their memory is wanted for others.
                del ready
                self._after(done + 1, clock)

    def _alive(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches`, each of which is a sign of life: the watchdog is not for as many micro-batches as a step has."""
        for batch in batches:
            self.monitor.alive()
            yield batch

    def _fetch(self, batches: Iterator[Batch], done: int, clock: Clock, stop: StopRequest) -> list[Batch]:
        """The micro-batches of the next step, once every process has its own.

        Where one has not, or was asked to stop, all stop here, before the step; where some set images aside, all do.
        """
        ready: list[Batch] = []
        problem: UserError | None = None
        try:
            ready = list(self._alive(islice(batches, self.config.optim.accumulate)))
        except (TooManyBad, ImagesGone) as error:
            problem = error
        due = self.clock_due.read() if self.world.first else NOTHING
        failed, bad, asked, self.due = largest(
            self.world, problem is not None, self.set_aside.unshared(), stop.signal or 0, due
        )
        if bad:
            try:
                everywhere(self.world, self.set_aside.share)
            except TooManyBad as error:
                failed, problem = 1, problem or error
            self.record.bad_files(self.set_aside.quarantine, self.set_aside.news())
        if failed:
            saved = self._saved_before(done, clock)
            agree_to_raise(self.world, problem and type(problem)(f"{problem}\n{saved}"))
        if asked:
            path = self._finish_at(done, clock)
            raise Stopped(f"stopped at step {done} of {self.plan.total}; saved {path}", asked)
        return ready

    def _after(self, done: int, clock: Clock) -> None:
        """What is due after `done` steps: metrics, a score, a checkpoint."""
        run = self.config.run
        self.record.advance(done)
        save = done % run.checkpoint_every == 0 or done == self.plan.total or self.due == SAVE
        knn = self._knn_due(done)
        if not (save or knn or done % run.log_every == 0 or self.due == LINE):
            return
        rows = self._rows(done, clock)
        if knn:
            encoder = self.trainer.query_encoder()
            if self.world.first:
                rows[-1] |= knn_row(self.trainer, encoder, self.manifest, self.set_aside.quarantine, self.monitor.alive)
            self.monitor.alive()
        self.record.write(rows)
        for told in (self.collapse.read(rows), self.crowding.read()):
            if told:
                self.record.say(told)
        if save:
            self.saving.save(done, now=done == self.plan.total, before=self.record.sync)
        # Neither a score nor a checkpoint counts in the speed.
        clock.restart(self.trainer.pairs)
        self.crowding.restart()
        self.clock_due.restart(saved=save)

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
                self.record.write(rows)
                raise NonFiniteLoss(
                    f"step {step}: {' and '.join(broken)} is not finite ({values[broken[0]]}); no update was made "
                    f"from that step on; {self.saving.last_good()}. A lower --lr or a longer --warmup-epochs may help"
                )
        if (fill := self.trainer.queue_fill) is not None:
            rows[-1]["queue_fill"] = fill
        rows[-1]["bad_files"] = len(self.set_aside.quarantine)
        rows[-1] |= clock.read(self.trainer.pairs)
        return rows

    def _finish_at(self, done: int, clock: Clock) -> Path:
        """Write what is not written of the `done` steps; the checkpoint that holds them."""
        if rows := self._rows(done, clock):
            self.record.write(rows)
        return self.saving.saved(done, before=self.record.sync)

    def _saved_before(self, done: int, clock: Clock) -> str:
        """What was saved of the `done` steps when the images of the next could not be had."""
        return f"saved {self._finish_at(done, clock)}" if done else self.saving.last_good()

    def _knn_due(self, done: int) -> bool:
        every = self.config.run.knn_every * self.plan.per_epoch
        if not every or not self.manifest.labels:
            return False
        accumulate = self.config.optim.accumulate
        return done * accumulate // every > (done - 1) * accumulate // every or done == self.plan.total
