"""Do the three methods beat random initialisation and colour statistics on breast histology, stage by stage?

Pretrains the small-data histology recipes on the training split of the IDC patches (each run resumes where it was
stopped), scores every stage of each, and writes one table.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from bench.study import score_side_by_side
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import load_encoder
from fastmoco.train.pretrain import pretrain
from fastmoco.train.recipes import METHODS, find


@dataclass(kw_only=True)
class IdcArgs:
    """Pretrain moco, mse and barlow on the IDC patches and compare their features."""

    data: Path = Path(os.environ.get("FASTMOCO_TEST_DATA", "../shared/data")) / "idc_patches"
    """Folder with images/ and labels.csv (file, patient, split, idc)."""
    runs: Path = Path("runs/idc")
    """Folder for the three runs."""
    epochs: int = 60
    """Passes over the training images."""
    seed: int = 0
    """Seed of the pretraining."""
    out: Path = Path("docs/results/idc.md")
    """Markdown file to write; a JSON file of the same name is put beside it."""


def main(args: IdcArgs) -> int:
    """Run what is still to be run, print the table and write it."""
    encoders = {"random": Encoder("resnet18", seed=args.seed)}
    images, labels = args.data / "images", args.data / "labels.csv"
    for method in METHODS:
        config = find(f"histology-{method}-small")(images, args.runs / f"{method}-seed{args.seed}")
        config = replace(
            config,
            data=replace(config.data, labels=labels, label=("idc",), split="train"),
            run=replace(config.run, seed=args.seed, resume=True),
            views=replace(config.views, size=64),
            model=replace(config.model, arch="resnet18"),
            optim=replace(config.optim, epochs=args.epochs),
        )
        encoders[method] = load_encoder(pretrain(config))
    score_side_by_side(
        encoders,
        images,
        labels,
        "idc",
        title="Breast histology (IDC): three methods, stage by stage",
        command=f"FASTMOCO_TEST_DATA=... python -m bench.idc --epochs {args.epochs} --seed {args.seed}",
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(IdcArgs, prog="python -m bench.idc")))
