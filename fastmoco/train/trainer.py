"""The training step, and what a run is between two steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastmoco.data.loader import Batch
from fastmoco.errors import UserError
from fastmoco.models.weights import initial_backbone
from fastmoco.queue import Queue
from fastmoco.train.checkpoint import Checkpoint
from fastmoco.train.config import Config, to_json
from fastmoco.train.engine import SingleProcess
from fastmoco.train.metrics import History
from fastmoco.train.objective import MomentumContrast, Output


class Trainer:
    """The objective, its queue and its engine, and the step that moves them.

    `precision` is "bf16", "fp32" or "fp64"; "auto" has been resolved by the caller. `initialise` False leaves
    --init's weights unread, for a trainer that a checkpoint will be restored into.
    """

    def __init__(
        self, config: Config, *, precision: str, device: torch.device, initialise: bool = True
    ) -> None:
        self.config = config
        run, loss = config.run, config.loss
        module = MomentumContrast(config.model, loss, seed=run.seed)
        if initialise and config.model.init is not None:
            backbone = initial_backbone(config.model.init, config.model.arch)
            module.query.backbone.load_state_dict(backbone)
            module.key.backbone.load_state_dict(backbone)
        wide = torch.float64 if precision == "fp64" else torch.float32
        kept = torch.bfloat16 if loss.queue_dtype == "bf16" else wide
        self.queue = Queue(loss.queue_size, config.model.dim, seed=run.seed, dtype=kept).to(device)
        module.to(device)
        if precision == "fp64":
            module.double()
        if run.channels_last:
            module.to(memory_format=torch.channels_last)
        self.module = module
        self.engine = SingleProcess(
            module, module.averages, module.multiplied, config.optim, precision=precision, device=device
        )
        self.history = History(module.loss_names, run.log_every, device)
        self.pushed = 0
        self.between_steps = True

    def step(self, batches: Iterable[Batch], lr: float) -> None:
        """One optimiser step over `accumulate` micro-batches. Nothing in it waits for the device."""
        accumulate = self.config.optim.accumulate
        for views in batches:
            self.between_steps = False
            view_q, view_k = self.engine.to_device(views.q), self.engine.to_device(views.k)
            output: Output = self.engine.forward(view_q, view_k, self.queue.bank)
            self.engine.backward(output.losses.values(), divisor=accumulate)
            self.queue.push(output.key)
            self.pushed += len(output.key)
            self.history.add(output.losses, output.query, output.rank, divisor=accumulate)
        self.engine.step(lr, ema=self.config.loss.ema)
        self.history.next_row()
        self.between_steps = True

    @property
    def queue_fill(self) -> float:
        """The share of the queue that holds keys of images rather than its random start."""
        return min(1.0, self.pushed / self.config.loss.queue_size)

    def checkpoint(self, step: int, data: str) -> Checkpoint:
        """Everything that the steps after `step` depend on; `data` identifies the images."""
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"queue.{name}": value for name, value in self.queue.state_dict().items()}
        tensors |= {f"momentum.{name}": value for name, value in self.engine.momentum_buffers.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.engine.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.engine.device)
        host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        meta = {"step": step, "pushed": self.pushed, "config": to_json(self.config), "data": data}
        return Checkpoint(host, meta)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what `checkpoint` holds. Raises UserError where it does not fit this configuration."""
        tensors = checkpoint.tensors
        momentum = self.engine.momentum_buffers
        expected = {f"momentum.{name}" for name in momentum}
        held = {name for name in tensors if name.startswith("momentum.")}
        try:
            self.module.load_state_dict(_below("module.", tensors))
            self.queue.load_state_dict(_below("queue.", tensors))
        except RuntimeError as error:
            raise UserError(f"the checkpoint of step {checkpoint.step} does not fit: {error}") from error
        if held != expected:
            raise UserError(f"the checkpoint's optimiser state does not fit: {sorted(held ^ expected)[:4]}")
        for name, value in momentum.items():
            value.copy_(tensors[f"momentum.{name}"])
        self.engine.copies.refresh()
        torch.set_rng_state(tensors["rng.cpu"])
        if self.engine.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.engine.device)
        self.pushed = int(checkpoint.meta["pushed"])


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
