"""The whole path on one page: draw tissue patches, pretrain on them, score what was learned."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from fastmoco.data.synthetic import draw_tissue
from fastmoco.evaluate.run import EvaluateArgs, evaluate_command
from fastmoco.train import recipes
from fastmoco.train.config import Config
from fastmoco.train.pretrain import pretrain

# The data are fixed; --seed varies the training only, so that its spread can be seen.
DATA_SEED = 0


@dataclass(kw_only=True)
class DemoArgs:
    """Draw labelled tissue patches, pretrain a ResNet-18 on them without their labels, and score its features."""

    out: Path = Path("runs/demo")
    """Folder for the images and the run."""
    images: int = 2000
    """Patches to draw; seven in ten are trained on, by patient, the rest test."""
    epochs: int = 30
    """Passes over the training patches."""
    seed: int = 0
    """Seed of the pretraining; the patches are always the same."""


def data_folder(args: DemoArgs) -> Path:
    """Where the demo's patches lie."""
    return args.out / f"tissue-{args.images}"


def demo_config(args: DemoArgs) -> Config:
    """The small-data histology recipe with MSE stage losses, for a ResNet-18 at 64 pixels."""
    # Another number of images or epochs is another run.
    run = args.out / f"{args.images}-images-{args.epochs}-epochs-seed-{args.seed}"
    config = recipes.find("histology-mse-small")(data_folder(args) / "images", run)
    return replace(
        config,
        data=replace(config.data, labels=data_folder(args) / "labels.csv", label=("label",), split="train"),
        run=replace(config.run, seed=args.seed, resume=True, log_every=20, checkpoint_every=200),
        # These classes differ in shape and not in colour, so encoders do well to be blind to it: MoCo's jitter.
        views=replace(config.views, size=64, jitter=(0.4, 0.4, 0.4, 0.1), gray_p=0.2),
        model=replace(config.model, arch="resnet18"),
        optim=replace(config.optim, epochs=args.epochs),
    )


def run_demo(args: DemoArgs) -> int:
    """Draw, pretrain (or go on with an interrupted pretraining), evaluate, and print what to look at."""
    began = time.monotonic()
    draw_tissue(data_folder(args), images=args.images, seed=DATA_SEED)
    config = demo_config(args)
    run = pretrain(config)
    status = evaluate_command(
        EvaluateArgs(run=run, data=config.data.data, labels=config.data.labels, label=config.data.label)
    )
    print(f"\n{time.monotonic() - began:.0f} s. Look at {run}: config.json, metrics.jsonl, curves.png, tensorboard/,")
    print("checkpoints/, encoder.safetensors and evaluation/. These classes differ in small shapes: compare stages")
    print("1 and 2, pretrained beside random. Little is to be expected of stage 4, which the kNN while training is of.")
    print("On your own images:")
    print(f"  {sys.argv[0]} pretrain histology-mse-small --data FOLDER --out RUN --arch resnet18 --size 64")
    return status
