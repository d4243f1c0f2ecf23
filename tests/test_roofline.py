"""The roofline's predictions count the launches that are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import roofline
from fastmoco.kernels.infonce import sweep
from fastmoco.ops import dispatch
from fastmoco.ops.crosscorr import crosscorr
from fastmoco.ops.infonce import infonce
from fastmoco.ops.pooled_mse import pooled_mse
from fastmoco.ops.queue_push import queue_push_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Kernels(TorchDispatchMode):
    """Notes torch's operations that write numbers: no views, no memory left as it is."""

    def __init__(self, noted: list[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, returns = func._schema.name, func._schema.returns
        writes = any(str(value.type).startswith("Tensor") for value in returns) and "empty" not in name
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
        if name.startswith("aten::") and writes and not view:
            self.noted.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels launched by Triton, which are noted and not run, and by torch, in order."""
    noted: list[str] = []
    pick = dispatch.pick

    def counted(*arguments: Any) -> Callable[..., Any]:
        run = pick(*arguments)

        def inside(*inputs: Any) -> Any:
            # Of an operation the mode around it sees only the name.
            with Kernels(noted):
                return run(*inputs)

        return inside

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        noted.append(kernel.__name__)

    monkeypatch.setattr(dispatch, "pick", counted)
    # Compiled or interpreted, whichever runs here.
    monkeypatch.setattr(type(sweep), "run", launch)
    with Kernels(noted):
        yield noted


def new(*shape: int, dtype: str = "float32") -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device=DEVICE)


def backward(loss: Tensor, *inputs: Tensor) -> None:
    torch.autograd.grad(loss, inputs, torch.empty_like(loss))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_infonce(launches: list[str], dtype: str) -> None:
    query = new(8, 16).requires_grad_()
    backward(infonce(query, new(8, 16), new(64, 16, dtype=dtype), temperature=0.07, implementation="triton"), query)
    assert len(launches) == roofline.infonce(8, 64, 16, dtype).launches, launches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "d"), [(8, 64), (64, 8)])
def test_crosscorr(launches: list[str], n: int, d: int, dtype: str) -> None:
    z1, z2 = (new(2, n, d, dtype=dtype).requires_grad_() for _ in range(2))
    backward(crosscorr(z1, z2, implementation="triton"), z1, z2)
    assert len(launches) == roofline.crosscorr(2, n, d, dtype).launches, launches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pooled_mse(launches: list[str], dtype: str) -> None:
    a, b = (new(2, 7, 7, 16, dtype=dtype).permute(0, 3, 1, 2) for _ in range(2))
    a.requires_grad_()
    backward(pooled_mse(a, b, grid=4, implementation="triton"), a)
    assert len(launches) == roofline.pooled_mse(2, 16, 7, 4, dtype).launches, launches


def test_queue_push(launches: list[str]) -> None:
    pointer = torch.empty((), dtype=torch.int64, device=DEVICE)
    queue_push_(new(64, 16), pointer, new(8, 16), implementation="triton")
    assert len(launches) == roofline.queue_push(8, 16).launches, launches
