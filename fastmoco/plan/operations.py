"""What a computation does, operation by operation, found by running it on tensors that have shapes and no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FORWARD, BACKWARD = 0, 1


def _infonce_flops(query: Tensor, key: Tensor, bank: Tensor, *_: Any, **__: Any) -> int:
    """One sweep over the bank, for the loss and its gradient."""
    return 4 * len(query) * bank.numel()


def crosscorr_flops(stages: int, n: int, d: int) -> int:
    """By Gram matrices or directly, whichever is the less, and the gradient with it."""
    return stages * min(8 * n * n * d, 6 * n * d * d)


def _crosscorr_flops(z1: Tensor, *_: Any, **__: Any) -> int:
    return crosscorr_flops(*(1, *z1.shape)[-3:])


# torch's counter knows torch's operations; these are fastmoco's that multiply matrices (docs/kernels.md).
_OWN: dict[str, Callable[..., int]] = {"fastmoco::infonce": _infonce_flops, "fastmoco::crosscorr": _crosscorr_flops}
_EMPTY = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided", "aten::empty_strided"}


class Operations(TorchDispatchMode):
    """Records what runs while it is entered: arrays by operation of `flops`, of `moved` bytes and of the `phase`.

    Moved are the bytes of every tensor that an operation is given and returns, as if each came from memory and went
    there; operations that only look at memory differently are left out. Set `phase` to BACKWARD where that begins.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = FORWARD
        self._rows: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if views or name in _EMPTY:
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if name in _OWN:
            flops = _OWN[name](*args, **kwargs)
        else:
            count: Any = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count is not None else 0
        self._rows.append((int(flops), sum(t.nbytes for t in tensors), self.phase))
        return out

    def add(self, flops: int, moved: int) -> None:
        """One operation more, of the forward."""
        self._rows.append((flops, moved, FORWARD))

    @property
    def flops(self) -> np.ndarray:
        """Float64, one an operation."""
        return np.array([row[0] for row in self._rows], dtype=np.float64)

    @property
    def moved(self) -> np.ndarray:
        """Bytes, float64, one an operation."""
        return np.array([row[1] for row in self._rows], dtype=np.float64)

    def seconds(self, phase: int, *, flops_per_s: float, bytes_per_s: float, least: float) -> float:
        """What the operations of `phase` take where each takes the longest of its arithmetic, its bytes and `least`."""
        here = np.array([row[2] for row in self._rows]) == phase
        each = np.maximum(self.flops / flops_per_s, self.moved / bytes_per_s)
        return float(np.maximum(each, least)[here].sum())


class Kept:
    """Bytes that autograd keeps for the backward, each piece of memory once, without those of `given` tensors."""

    def __init__(self, given: list[Tensor]) -> None:
        self.bytes = 0
        self._seen = {_memory(tensor): tensor for tensor in given}

    def _pack(self, tensor: Tensor) -> Tensor:
        if _memory(tensor) not in self._seen:
            # Held on to, so that no other memory takes its number.
            self._seen[_memory(tensor)] = tensor
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is kept of the forward inside."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def record(run: Callable[[], Tensor], given: list[Tensor]) -> tuple[Operations, int]:
    """The operations of a forward, `run`, that gives a 0-d loss, and of its backward; and the bytes kept between them.

    given: the tensors that are there before it, such as weights.
    """
    kept = Kept(given)
    with Operations() as operations:
        with kept.counting():
            loss = run()
        operations.phase = BACKWARD
        loss.backward()
    return operations, kept.bytes
