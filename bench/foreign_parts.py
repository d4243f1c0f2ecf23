"""What making a checkpoint by another library's own code takes: a step of training, pictures, features, no GPU."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.utils import save_image

from bench.harness import Missing

# What the networks call stages 1 to 4 and the pooling.
NAMED = ("layer1", "layer2", "layer3", "layer4", "avgpool")
TIMM = (*NAMED[:4], "global_pool")
NUMBERED = ("4", "5", "6", "7", "8")

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Made:
    """A file that a library wrote, of its network `query`; `key` is the momentum network in the same file.

    `parts` are the networks' names of stages 1 to 4 and the pooling; `wrote` says what code wrote the file, `note` what
    of it was replaced here.
    """

    file: Path
    version: str
    wrote: str
    query: nn.Module
    key: nn.Module | None = None
    parts: tuple[str, ...] = NAMED
    note: str = ""


def features(network: nn.Module, parts: tuple[str, ...], images: Tensor) -> list[Tensor]:
    """Outputs of `parts` as `network`'s own forward in evaluation mode calls them: the stages, (N, C, H, W) each, and
    the pooled feature (N, C)."""
    kept: dict[str, Tensor] = {}
    for name in parts:
        network.get_submodule(name).register_forward_hook(lambda *call, name=name: kept.update({name: call[2].clone()}))
    with torch.no_grad():
        network.eval()(images)
    return [kept[name] for name in parts[:4]] + [kept[parts[4]].flatten(1)]


def shaken(network: Network) -> Network:
    """`network` with noise on its weights, so that a block that begins as the identity is none, and a key encoder that
    begins as the query encoder is another."""
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 1.0 if parameter.ndim == 1 else float(parameter.std())
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * scale)
    return network


def trained(network: nn.Module) -> torch.optim.Optimizer:
    """One step of classification on random pictures."""
    optimizer = torch.optim.SGD(shaken(network).parameters(), lr=0.01, momentum=0.9)
    nn.functional.cross_entropy(network(torch.rand(8, 3, 64, 64)), torch.arange(8)).backward()
    optimizer.step()
    return optimizer


def pictures(folder: Path, count: int = 8) -> Path:
    """A folder with `train` and `val`, of two classes each."""
    for number in range(2 * count):
        place = folder / ("train", "val")[number // count] / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 64, 64), place / f"{number}.png")
    return folder


def commit(folder: Path) -> str:
    """The commit that is checked out in `folder`, a clone. Raises Missing where there is none."""
    if not (folder / ".git").exists():
        raise Missing(f"no clone at {folder.name}")
    run = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return run.stdout.strip()[:10]


def installed(name: str) -> str:
    """The version of the distribution `name`. Raises Missing where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError as error:
        raise Missing(f"{name} is not installed") from error


def without_gpu() -> list[nn.Module]:
    """Let code for GPUs run on one process and the CPU. What it wraps in DistributedDataParallel from then on is shaken
    and put into the list that is returned."""
    wrapped: list[nn.Module] = []
    parallel, join = torch.nn.parallel.DistributedDataParallel, torch.distributed.init_process_group

    def wrap(module: nn.Module, device_ids: Any = None) -> nn.Module:
        wrapped.append(shaken(module))
        return parallel(module)

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    def alone(**options: Any) -> None:
        join(backend="gloo", init_method=f"file://{Path('group').resolve()}", world_size=1, rank=0)

    changes = [
        (torch.Tensor, "cuda", stay), (torch.Tensor, "pin_memory", stay), (nn.Module, "cuda", stay),
        (torch.cuda, "set_device", stay), (torch.cuda, "is_available", lambda: True),
        (torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu")),
        (torch.nn.parallel, "DistributedDataParallel", wrap), (torch.distributed, "init_process_group", alone),
        # It refuses tensors on CPUs.
        (nn.SyncBatchNorm, "convert_sync_batchnorm", lambda module: module),
    ]  # fmt: skip
    for owner, name, change in changes:
        setattr(owner, name, change)
    return wrapped
