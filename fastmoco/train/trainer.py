"""The training step, and what a run is between two steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from fastmoco.data.loader import Batch
from fastmoco.distributed.collectives import start_gather
from fastmoco.distributed.exchange import draw_order
from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.models.encoder import Encoder
from fastmoco.queue import Queue
from fastmoco.train.checkpoint import Checkpoint
from fastmoco.train.config import Config
from fastmoco.train.engines.engine import COMPUTE_DTYPE
from fastmoco.train.engines.make import make_engine
from fastmoco.train.graph import GraphedMicroBatch, MicroBatch, use_own_stream
from fastmoco.train.history import History
from fastmoco.train.joint import draw_share
from fastmoco.train.objective import Output
from fastmoco.train.objectives import make_objective
from fastmoco.train.stored import to_json


class Trainer:
    """The objective, its queue and its engine, and the step that moves them.

    `precision` is "bf16", "fp16", "fp32" or "fp64"; "auto" has been resolved by the caller. `backbone` is what both
    encoders' backbones begin with, by name; their random start where it is None. `targets` (images,) int64 are the
    classes of all images of the run, -1 where unknown, which --objective supcon alone is given. Every process of
    `world` has one, and all of them make it and call its methods in the same order: they send and wait.
    """

    def __init__(
        self,
        config: Config,
        *,
        precision: str,
        world: World,
        backbone: Mapping[str, Tensor] | None = None,
        targets: Tensor | None = None,
    ) -> None:
        self.config = config
        self.world = world
        run, loss = config.run, config.loss
        if run.cuda_graph:
            use_own_stream(world.device)
        module = make_objective(config.model, loss, seed=run.seed, world=world)
        if backbone is not None:
            for encoder in module.encoders:
                encoder.backbone.load_state_dict(backbone)
        self.targets = targets
        wide = torch.float64 if precision == "fp64" else torch.float32
        kept = torch.bfloat16 if loss.queue_dtype == "bf16" else wide
        self.queue: Queue | None = None
        if module.queued:
            self.queue = Queue(loss.queue_size, config.model.dim, seed=run.seed, dtype=kept).to(world.device)
        module.to(world.device)
        if precision == "fp64":
            module.double()
        if run.channels_last:
            module.to(memory_format=torch.channels_last)
        self.module = module
        self.engine = make_engine(config, module, precision=precision, world=world)
        self.history = History(module.loss_names, run.log_every, world)
        # Pairs of views trained on, of all processes.
        self.pairs = 0
        self.graph: GraphedMicroBatch | None = None
        if run.cuda_graph:
            self.graph = GraphedMicroBatch(self._micro_batch, world)
            self.engine.keep_gradients()

    def step(self, batches: Iterable[Batch], lr: float) -> None:
        """One optimiser step over `accumulate` micro-batches. Nothing in it waits for the device."""
        accumulate = self.config.optim.accumulate
        run: MicroBatch = self.graph or self._micro_batch
        for number, views in enumerate(batches, start=1):
            view_q, view_k = (view.to(self.world.device, non_blocking=True) for view in (views.q, views.k))
            with self.engine.micro_batch(last=number == accumulate):
                output = run(view_q, view_k, *self._given(views.indices))
            self.pairs += self.world.size * len(view_q)
            self.history.add(output.losses, output.query, output.rank, divisor=accumulate)
        self.engine.step(lr, ema=self.config.loss.ema)
        self.history.next_row()

    def _micro_batch(self, view_q: Tensor, view_k: Tensor, *given: Tensor | None) -> Output:
        """Both forwards, the losses, the backward and the push: what a CUDA graph can hold."""
        # The keys' images may be sent to others first, which their narrow dtype is best for.
        view_q = view_q.to(COMPUTE_DTYPE[self.engine.precision])
        divisor = self.config.optim.accumulate
        if self.queue is None:
            output: Output = self.engine.forward(view_q, view_k, *given)
            self.engine.backward(output.losses.values(), divisor=divisor)
            return output
        output = self.engine.forward(view_q, view_k, self.queue.bank, *given)
        # On their way while the backward runs.
        keys = start_gather(self.world, output.key, kind="keys")
        self.engine.backward(output.losses.values(), divisor=divisor)
        self.queue.push(keys.wait())
        return output

    def _given(self, indices: np.ndarray) -> list[Tensor | None]:
        """What the objective's forward takes beside views and negatives, for the images `indices`: drawn as a function
        of how far the run is."""
        loss, seed, rows = self.config.loss, self.config.run.seed, len(indices)
        batch = self.pairs // (self.world.size * rows)
        ordered = loss.key_shuffle != "none" or loss.mix_weight > 0
        order = draw_order(seed, batch, self.world.rank, rows) if ordered else None
        given: list[Tensor | None] = [order]
        if loss.objective != "moco":
            targets = None if self.targets is None else self.targets[torch.from_numpy(indices)]
            share = torch.tensor(draw_share(seed, batch)) if loss.mix_weight else None
            given = [targets, order, share]
        return [None if value is None else value.to(self.world.device, non_blocking=True) for value in given]

    @property
    def queue_fill(self) -> float | None:
        """The share of the queue that holds keys of images rather than its random start; None where there is none."""
        if self.queue is None:
            return None
        return min(1.0, self.pairs * self.config.loss.keys_per_pair / self.config.loss.queue_size)

    def query_encoder(self) -> Encoder:
        """The query encoder with all its weights, whatever part of them this process holds.

        Where each holds all of them it is the very module that is trained.
        """
        if not self.engine.shards_weights:
            return self.module.query
        state = _below("module.query.", self.engine.state()) | dict(self.module.query.named_buffers())
        model = self.config.model
        encoder = Encoder(model.arch, head=model.head, dim=model.dim).to(self.world.device)
        encoder.load_state_dict(state)
        return encoder

    def checkpoint(self, step: int, data: str) -> Checkpoint:
        """Everything that the steps after `step` depend on, on the host of rank 0; `data` identifies the images.

        Every process calls it. BatchNorm's running statistics are rank 0's.
        """
        tensors = dict(self.engine.state())
        tensors |= {f"module.{name}": value for name, value in self.module.named_buffers()}
        if self.queue is not None:
            tensors |= {f"queue.{name}": value for name, value in self.queue.state_dict().items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.world.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.world.device)
        # Rank 0 writes it.
        kept = tensors if self.world.first else {}
        host = {name: value.detach().cpu().contiguous() for name, value in kept.items()}
        meta = {"step": step, "pushed": self.pairs, "config": to_json(self.config), "data": data}
        return Checkpoint(host, meta)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what `checkpoint` holds. Raises UserError where it does not fit this configuration."""
        tensors = checkpoint.tensors
        buffers = dict(self.module.named_buffers())
        saved = _below("module.", tensors)
        known = {name for name, _ in self.module.named_parameters()} | buffers.keys()
        if saved.keys() != known:
            odd = ", ".join(sorted(saved.keys() ^ known)[:4])
            raise UserError(f"the checkpoint of step {checkpoint.step} does not fit: it and this run differ in {odd}")
        try:
            if self.queue is not None:
                self.queue.load_state_dict(_below("queue.", tensors))
        except RuntimeError as error:
            raise UserError(f"the checkpoint of step {checkpoint.step} does not fit: {error}") from error
        for name, buffer in buffers.items():
            buffer.copy_(saved[name])
        self.engine.load(tensors)
        torch.set_rng_state(tensors["rng.cpu"])
        if self.world.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.world.device)
        self.pairs = int(checkpoint.meta["pushed"])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
