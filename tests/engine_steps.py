"""Training steps under every engine, in one process and in several, and how they are compared."""

from __future__ import annotations

import gc
import importlib.util
import os
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.distributed.world import World
from runs import shared_batch, shared_trainer
from worlds import in_world

# Under CI nothing is passed over.
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None and not os.environ.get("CI"), reason="no DeepSpeed here"
)
NAMES = ["ddp", "zero0", "zero1", "zero2", "zero3"]


def engine(name: str, *more: Any, slow: bool = False) -> Any:
    """A case of an engine; with `slow` one for the system's tests, since each takes some seconds."""
    marks = [needs_deepspeed] if "zero" in name else []
    return pytest.param(name, *more, marks=[*marks, pytest.mark.system] if slow else marks)


STEPS = 3
# As many as the largest tensor here has elements.
SIGNS = torch.randint(0, 2, (3_000_000,), generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def sketch(tensor: Tensor) -> Tensor:
    """What tells a tensor from another: elements spread over all of it, and a sum of all with random signs; float64.

    Whole networks are too much to hand from process to process.
    """
    flat = tensor.detach().double().flatten()
    places = torch.linspace(0, len(flat) - 1, min(len(flat), 2000)).long()
    return torch.cat([flat[places], (SIGNS[: len(flat)] @ flat)[None]])


def checksum(tensor: Tensor) -> Tensor:
    return torch.tensor(zlib.crc32(tensor.detach().contiguous().numpy().tobytes()))


def trained(world: World, method: str, changes: dict[str, Any], steps: int = STEPS) -> dict[str, Tensor]:
    """Everything there is after `steps` steps, and the losses and, where the engine shows them, gradients of each.

    Sketches, and checksums of what is kept.
    """
    t = shared_trainer(world, method, **changes)
    found: dict[str, Tensor] = {}
    step = t.engine.step

    def looked_at(lr: float, *, ema: float) -> None:
        number = len([name for name in found if name.startswith("loss.")])
        if hasattr(t.engine, "gradients"):
            found.update({f"gradient{number}.{name}": sketch(g) for name, g in t.engine.gradients.items()})
        step(lr, ema=ema)
        found[f"loss.{number}"] = torch.zeros(())

    t.engine.step = looked_at  # type: ignore[method-assign]
    accumulate = t.config.optim.accumulate
    for number in range(steps):
        t.step([shared_batch(world, accumulate * number + i) for i in range(accumulate)], lr=0.05)
    rows = t.history.read()
    parts = t.module.loss_names
    found |= {f"loss.{i}": torch.tensor([row[name] for name in parts]).double() for i, row in enumerate(rows)}
    kept = t.engine.state() | ({} if t.queue is None else {"queue": t.queue.bank})
    found |= {name: sketch(value) for name, value in kept.items()}
    found |= {f"checksum.{name}": checksum(value) for name, value in kept.items()}
    found |= {f"sent.{kind}": torch.tensor(count) for kind, count in world.sent.items()}
    # Its own step, which is looked at, holds the trainer: one after the other they would fill the memory.
    t.engine.step = step  # type: ignore[method-assign]
    return found


def compare(expected: dict[str, Tensor], actual: dict[str, Tensor], tolerance: float, *more: str) -> None:
    names = [name for name in expected if not name.startswith(("sent.", "checksum.")) and name in actual]
    kinds = {name.split(".")[0].rstrip("0123456789") for name in names}
    assert {"loss", "module", "momentum", *more} <= kinds and ("queue" in expected) == ("queue" in kinds)
    for name in names:
        error = (expected[name] - actual[name]).abs().max().item()
        size = max(1.0, expected[name].abs().max().item())
        assert error <= tolerance * size, f"{name}: {error:.3g} off, of {size:.3g}"


def distance(expected: dict[str, Tensor], actual: dict[str, Tensor], kind: str) -> float:
    """How far all tensors of a kind ("momentum", "gradient0" ...) lie from those expected, as a share of their length.

    `compare` passes over what is wrong in numbers far below 1.
    """
    names = [name for name in expected if name.split(".")[0] == kind]
    one, other = (torch.cat([found[name] for name in names]) for found in (expected, actual))
    return float((one - other).norm() / one.norm())


Cases = list[tuple[str, dict[str, Any]]]


def trained_in_turn(world: World, cases: Cases, steps: int = STEPS) -> list[dict[str, Tensor]]:
    """`trained` for each case; processes take longer to start than to train."""
    found = []
    for method, changes in cases:
        world.sent.clear()
        found.append(trained(world, method, changes, steps))
        gc.collect()
    return found


_KNOWN: dict[str, dict[str, Tensor]] = {}


def alone(cases: Cases, steps: int = STEPS) -> list[dict[str, Tensor]]:
    """What one process makes of each case, worked out once."""
    keys = [f"{steps} {method} {changes}" for method, changes in cases]
    for key, (method, changes) in zip(keys, cases, strict=True):
        if key not in _KNOWN:
            _KNOWN[key] = trained(World(), method, changes, steps)
            gc.collect()
    return [_KNOWN[key] for key in keys]


Halves = list[tuple[float, float, bool]]


def in_half(world: World, scales: list[float], method: str, changes: dict[str, Any]) -> Halves:
    return [_one_step_in_half(world, scale, method, changes) for scale in scales]


def _one_step_in_half(world: World, scale: float, method: str, changes: dict[str, Any]) -> tuple[float, float, bool]:
    """One alone: processors have no backward of a convolution in half precision, and take seconds."""
    t = shared_trainer(world, method, precision="fp16", norm="sync", **changes)
    state = {name: value.clone() for name, value in t.engine.state().items()}
    t.engine.load(state | {"scaler.scale": torch.tensor(scale)})
    t.step([shared_batch(world, 0)], lr=0.05)
    after = t.engine.state()
    heads = [name for name in state if name.startswith("module.query.head.")]
    return t.history.read()[0]["loss"], after["scaler.scale"].item(), not torch.equal(after[heads[0]], state[heads[0]])


def assert_gradients_are_scaled(engine: str, method: str, changes: dict[str, Any]) -> None:
    """A scale of 2^10 does no harm; one near the largest float32 makes every gradient infinite, and is halved."""
    scales = [2.0**10, 2.0**126]
    plain = shared_trainer(World(), method, precision="fp32", norm="sync", **changes)
    plain.step([shared_batch(World(), 0)], lr=0.05)
    expected = plain.history.read()[0]["loss"]
    arguments = (scales, method, changes | {"engine": engine})
    for sound, overflowing in [in_half(World(), *arguments)] if engine == "auto" else in_world(2, in_half, *arguments):
        loss, after, moved = sound
        assert abs(loss - expected) < 2e-2
        assert moved and after == scales[0]
        loss, after, moved = overflowing
        assert np.isfinite(loss) and not moved and after == scales[1] / 2
