"""What comes out of named parts of a network as it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastmoco.adapters.parts import find_part


class Outputs:
    """A forward hook of `part` that keeps its last `count` outputs in training mode, or `always`.

    `calls` is how many there were since `clear`. A copy of the network, or what is unpickled, has a copy of its hooks,
    which keeps nothing.
    """

    def __init__(self, part: nn.Module, count: int, *, always: bool) -> None:
        self._part: nn.Module | None = part
        self._always = always
        self.kept: deque[Any] = deque(maxlen=count)
        self.calls = 0
        self._handle = part.register_forward_hook(self)

    def __call__(self, part: nn.Module, inputs: Any, output: Any) -> None:
        if part is self._part and (self._always or part.training):
            self.kept.append(output)
            self.calls += 1

    def clear(self) -> None:
        """Forget all."""
        self.kept.clear()
        self.calls = 0

    def remove(self) -> None:
        """Listen no more."""
        self._handle.remove()
        self.clear()

    def __reduce__(self) -> tuple[type[Deaf], tuple[()]]:
        return Deaf, ()


class Deaf:
    """What a copy of a network has in place of `Outputs`."""

    def __call__(self, part: nn.Module, inputs: Any, output: Any) -> None:
        """Keep nothing."""


class Listening(dict[str, Outputs]):
    """The `Outputs` of parts of a network, by name. Raises UserError, begun by `who`, for a part that is not there."""

    def __init__(self, who: str, model: nn.Module, stages: Sequence[str], count: int, *, always: bool = False) -> None:
        super().__init__()
        for stage in stages:
            self[stage] = Outputs(find_part(who, model, stage), count, always=always)

    def remove(self) -> None:
        """Listen no more."""
        for outputs in self.values():
            outputs.remove()
