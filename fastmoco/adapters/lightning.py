"""A momentum encoder under PyTorch Lightning: `from fastmoco.adapters.lightning import MomentumCallback`.

Both of its packages will do: `pytorch_lightning`, and `lightning`, which has it as `lightning.pytorch`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from fastmoco.adapters.parts import find_part, start_average
from fastmoco.adapters.solo import MomentumUpdater
from fastmoco.errors import UserError

__all__ = ["MomentumCallback"]


def _callback_class() -> Any:
    """Lightning's Callback, of the package that is in use already, if any."""
    packages = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
    for name in packages:
        try:
            return import_module(name).Callback
        except ModuleNotFoundError as error:
            # Not what is missing in a package that is there.
            if error.name not in (name, name.split(".")[0]):
                raise
    raise UserError(
        "fastmoco.adapters.lightning needs PyTorch Lightning, which is not installed: "
        "pip install pytorch-lightning (or lightning)"
    )


Callback: Any = _callback_class()


class MomentumCallback(Callback):
    """Moving averages of networks of a LightningModule: for `Trainer(callbacks=[MomentumCallback(...)])`.

    pairs: names of trained networks and of those that follow them, as attributes of the module, such as
        {"backbone": "backbone_momentum", "head": "head_momentum"}; "net.backbone" for a part of `net`.
    momentum: m of average <- m * average + (1 - m) * network, of every parameter.
    final_momentum: what it rises to by half a cosine over all steps of the run (Grill et al. 2020); `momentum` if not
        given.
    start: copy, for averages that begin a run as copies of the networks, or keep, as they are. One that is resumed
        begins with what the checkpoint has.
    buffers: of the averages, BatchNorm's for the most part: keep, left to their own forward passes as in MoCo, or copy,
        the networks' after each step.

    The averages move after each step of the optimiser, not after each batch of accumulated gradients. Keys are then
    computed with the same weights as where `update_momentum` begins a training step, as in lightly's examples (there
    the first call changes nothing); after the last step there is one move more. No gradients train the averages. Which
    step they followed last is in the checkpoint, where they are as parts of the module. Under DDP each process moves
    its own.

    Raises UserError for momenta that are not from 0 to 1, in this order, and, as fitting begins, for names that the
    module has not, networks of other shapes, shared parameters, and a rise over a run without end.
    """

    def __init__(
        self,
        pairs: Mapping[str, str] | Sequence[tuple[str, str]],
        momentum: float = 0.996,
        final_momentum: float | None = None,
        *,
        start: Literal["copy", "keep"] = "copy",
        buffers: Literal["keep", "copy"] = "keep",
    ) -> None:
        final = momentum if final_momentum is None else final_momentum
        if not 0 <= momentum <= final <= 1:
            raise UserError(
                f"MomentumCallback: 0 <= momentum <= final_momentum <= 1 is wanted, not {momentum} and {final}"
            )
        if start not in ("copy", "keep") or buffers not in ("copy", "keep"):
            raise UserError(f"MomentumCallback: start and buffers are copy or keep, not {start!r} and {buffers!r}")
        self.pairs = tuple(pairs.items()) if isinstance(pairs, Mapping) else tuple((a, b) for a, b in pairs)
        if not self.pairs:
            raise UserError("MomentumCallback: pairs are names of networks and of their averages, at least one pair")
        self.start, self.buffers, self.updater = start, buffers, MomentumUpdater(momentum, final)
        self._rises = final > momentum
        self._steps = 1
        # The step of the optimiser that was followed last, counted from 1.
        self._followed = 0
        # Looked up once a run: a step has no time to search the module by name.
        self._found: list[tuple[nn.Module, nn.Module]] = []

    @property
    def state_key(self) -> str:
        """Sets the state apart from that of a second callback, of other pairs."""
        return f"{type(self).__qualname__}{self.pairs}"

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: the step that was followed last."""
        return {"followed": self._followed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as `state_dict` says."""
        self._followed = state_dict["followed"]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the pairs, and begin the averages. Before DDP looks for what has gradients and a checkpoint is read."""
        if stage != "fit":
            return
        fresh = trainer.global_step == 0
        self._found = [*self._networks(pl_module)]
        for (name, average_name), (network, average) in zip(self.pairs, self._found, strict=True):
            _check_alike(name, network, average_name, average)
            if fresh and self.start == "copy":
                start_average(average, network)
                _copy_buffers(average, network)
            average.requires_grad_(False)
        if fresh:
            self._followed = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out over how many steps the momentum rises."""
        if not self._rises:
            return
        steps = trainer.estimated_stepping_batches
        if not 0 < steps < float("inf"):
            raise UserError(
                "MomentumCallback: final_momentum is reached at the end of the run, which has none: give the Trainer "
                "max_epochs or max_steps"
            )
        self._steps = int(steps)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Follow the step that a checkpoint was written right after, by a callback that came before this one."""
        self._follow(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Follow the optimiser's step, where this batch had one."""
        self._follow(trainer)

    def _follow(self, trainer: Any) -> None:
        if trainer.global_step <= self._followed:
            return
        self._followed = trainer.global_step
        self.updater.update_tau(min(self._followed - 1, self._steps), self._steps)
        for network, average in self._found:
            self.updater.update(network, average)
            if self.buffers == "copy":
                _copy_buffers(average, network)

    def _networks(self, pl_module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Each pair's network and average."""
        for name, average in self.pairs:
            yield find_part("MomentumCallback", pl_module, name), find_part("MomentumCallback", pl_module, average)


def _check_alike(name: str, network: nn.Module, average_name: str, average: nn.Module) -> None:
    """Raises UserError where parameters or buffers have other shapes, or parameters are the same."""
    for kind in ("parameters", "buffers"):
        own, other = ([*getattr(net, f"named_{kind}")()] for net in (network, average))
        if len(own) != len(other):
            raise UserError(
                f"MomentumCallback: {average_name} is no copy of {name}: {len(other)} {kind}, not {len(own)}"
            )
        for (part, a), (_, b) in zip(own, other, strict=True):
            if a.shape != b.shape:
                raise UserError(
                    f"MomentumCallback: {average_name} is no copy of {name}: {part} is {tuple(b.shape)}, "
                    f"not {tuple(a.shape)}"
                )
    if {*map(id, network.parameters())} & {*map(id, average.parameters())}:
        raise UserError(f"MomentumCallback: {average_name} shares parameters with {name}: give it copy.deepcopy's")


@torch.no_grad()
def _copy_buffers(average: nn.Module, network: nn.Module) -> None:
    for own, other in zip(average.buffers(), network.buffers(), strict=True):
        own.copy_(other)
