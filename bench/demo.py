"""How much does the demo's result depend on the seed of its pretraining?"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from bench.study import score_side_by_side
from fastmoco.data.synthetic import draw_tissue
from fastmoco.demo import DATA_SEED, DemoArgs, data_folder, demo_config
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import load_encoder
from fastmoco.train.pretrain import pretrain


@dataclass(kw_only=True)
class DemoSeedsArgs:
    """Run the demo's pretraining with several seeds and score each beside a random initialisation of that seed."""

    runs: Path = Path("runs/demo")
    """Folder of the demo; runs that are complete are not repeated."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the pretraining."""
    out: Path = Path("docs/results/demo.md")
    """Markdown file to write; a JSON file of the same name is put beside it."""


def main(args: DemoSeedsArgs) -> int:
    """Run what is still to be run, print the table and write it."""
    encoders: dict[str, Encoder] = {}
    for seed in args.seeds:
        demo = DemoArgs(out=args.runs, seed=seed)
        draw_tissue(data_folder(demo), images=demo.images, seed=DATA_SEED)
        encoders[f"random, seed {seed}"] = Encoder("resnet18", seed=seed)
        encoders[f"pretrained, seed {seed}"] = load_encoder(pretrain(demo_config(demo)))
    score_side_by_side(
        encoders,
        data_folder(demo) / "images",
        data_folder(demo) / "labels.csv",
        "label",
        title="The demo with three training seeds",
        command="python -m bench.demo",
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(DemoSeedsArgs, prog="python -m bench.demo")))
