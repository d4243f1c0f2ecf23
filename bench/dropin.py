"""lightly's MoCo loop as it is, with our operations under its names, and with our loading and arithmetic: pairs/s."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
import tyro
from torch import nn

from bench.timing import save
from fastmoco.adapters import lightly as ours
from fastmoco.adapters.accelerated import Accelerated
from fastmoco.adapters.loader import PairLoader
from fastmoco.errors import UserError

VARIANTS = ("lightly", "our operations", "our operations, loading and arithmetic")
COLUMNS = ["implementation", "pairs_per_s", "slow_pairs_per_s", "fast_pairs_per_s", "ratio", "loading", "loss"]
BANK, DIM, TEMPERATURE, MOMENTUM = 4096, 128, 0.1, 0.99


@dataclass(kw_only=True)
class DropInArgs:
    """Train by turns with lightly's parts and with ours, on the same images; the first steps of each are left out."""

    data: Path
    """Folder of images."""
    arch: str = "resnet50"
    """Torchvision ResNet."""
    size: int = 64
    """Side of the views, in pixels."""
    batch_size: int = 32
    """Images in a batch."""
    steps: int = 6
    """Steps in a turn."""
    turns: int = 4
    """Turns of each."""
    workers: int = 2
    """Processes or threads that load."""
    out: Path = Path("docs/results/dropin.md")
    """Markdown file to write; a JSON file of the same name is put beside it."""


@dataclass
class Loop:
    """A training that goes on a few steps at a time; seconds of each turn, and of them those of waiting for images."""

    steps: Iterator[tuple[float, float]]
    seconds: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def turn(self, count: int, *, timed: bool) -> None:
        """Do `count` steps."""
        start, waited = time.perf_counter(), 0.0
        for _ in range(count):
            waiting, loss = next(self.steps)
            waited += waiting
            self.losses.append(loss)
        if timed:
            self.seconds.append(time.perf_counter() - start)
            self.waiting.append(waited)


def lightly_loader(args: DropInArgs) -> Any:
    """lightly's dataset and MoCo v2 transforms, in torch's loader: as its example has them."""
    from lightly.data import LightlyDataset
    from lightly.transforms import MoCoV2Transform

    transform = MoCoV2Transform(input_size=args.size)
    dataset = LightlyDataset(str(args.data), transform=transform)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )


def train(args: DropInArgs, variant: str) -> Iterator[tuple[float, float]]:
    """MoCo as lightly's example does it, for ever: seconds that a step waited for its batch, and its loss."""
    import lightly.loss
    import lightly.models.modules
    import lightly.models.utils

    theirs = variant == VARIANTS[0]
    head_class: Callable[..., nn.Module] = (lightly.models.modules if theirs else ours).MoCoProjectionHead
    loss_class: Callable[..., nn.Module] = (lightly.loss if theirs else ours).NTXentLoss
    update: Callable[..., None] = (lightly.models.utils if theirs else ours).update_momentum
    all_ours = variant == VARIANTS[2]
    torch.manual_seed(0)
    resnet = torchvision.models.get_model(args.arch, weights=None)
    width = resnet.fc.in_features
    resnet.fc = nn.Identity()
    backbone: nn.Module = Accelerated(resnet) if all_ours else resnet
    head = head_class(width, width, DIM)
    backbone_momentum, head_momentum = copy.deepcopy(backbone), copy.deepcopy(head)
    criterion = loss_class(temperature=TEMPERATURE, memory_bank_size=(BANK, DIM))
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06)
    loader: Any = lightly_loader(args)
    if all_ours:
        loader = PairLoader(
            args.data, recipe="mocov2", size=args.size, batch_size=args.batch_size, workers=args.workers
        )
    while True:
        batches = iter(loader)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            waited = time.perf_counter() - start
            if batch is None:
                break
            x0, x1 = batch[0][0], batch[0][1]
            update(backbone, backbone_momentum, m=MOMENTUM)
            update(head, head_momentum, m=MOMENTUM)
            query = head(backbone(x0).flatten(start_dim=1))
            with torch.no_grad():
                key = head_momentum(backbone_momentum(x1).flatten(start_dim=1))
            loss = criterion(query, key)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield waited, float(loss.detach())


def main(args: DropInArgs) -> int:
    """Train by turns, print and write the table."""
    loops = {variant: Loop(train(args, variant)) for variant in VARIANTS}
    for number in range(args.turns + 1):
        for loop in loops.values():
            loop.turn(args.steps, timed=number > 0)
    pairs = args.steps * args.batch_size
    rows: list[dict[str, Any]] = []
    for variant, loop in loops.items():
        speeds = [pairs / seconds for seconds in loop.seconds]
        rows.append(
            {
                "op": "dropin",
                "implementation": variant,
                "arch": args.arch,
                "size": args.size,
                "batch": args.batch_size,
                "workers": args.workers,
                "turns": args.turns,
                "pairs_per_s": median(speeds),
                "slow_pairs_per_s": min(speeds),
                "fast_pairs_per_s": max(speeds),
                "loading": sum(loop.waiting) / sum(loop.seconds),
                "loss": loop.losses[-1],
                "losses": loop.losses,
                "device": "cpu",
            }
        )
    for row in rows:
        row["ratio"] = row["pairs_per_s"] / rows[0]["pairs_per_s"]
        print(f"{row['implementation']}: {row['pairs_per_s']:.1f} pairs/s, {row['ratio']:.2f} times lightly's")
    save(
        rows,
        args.out,
        title=f"lightly's MoCo loop, {args.arch}, {args.size} px, batches of {args.batch_size}",
        command="python -m bench.dropin --data IMAGES",
        columns=COLUMNS,
        note=f"By turns of {args.steps} steps; the median, the slowest and the fastest of {args.turns}. What loads "
        "goes on for a few batches while others have their turn. loading: share of the time spent waiting for images.",
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(DropInArgs, prog="python -m bench.dropin")))
    except (UserError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
