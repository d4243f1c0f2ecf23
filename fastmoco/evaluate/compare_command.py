"""`fastmoco compare`: CKA between two encoders, or between the stages of one, on the user's images."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console

from fastmoco.atomic import write_text
from fastmoco.data.manifest import Manifest, refuse_inside
from fastmoco.device import find_device
from fastmoco.errors import UserError
from fastmoco.evaluate.cka import BATCH, Estimator, Kernel, unbiased_for
from fastmoco.evaluate.compare import Side, as_json, compare, draw_comparison, print_comparison
from fastmoco.evaluate.embed import Stage
from fastmoco.evaluate.features import extract
from fastmoco.evaluate.images import MOST_BYTES
from fastmoco.evaluate.options import LabelledImages, require_head
from fastmoco.models.weights import load_encoder, run_folder, weights_file
from fastmoco.precision import Precision
from fastmoco.results import try_out, unwritable

# Four, the least for the unbiased estimator, can then be drawn in more than one way.
LEAST_IMAGES = 5


@dataclass(kw_only=True, slots=True)
class CompareArgs(LabelledImages):
    """Compare the stages of two encoders, or those of one with each other, by CKA of their features of the same images:
    1 for the same but for rotation and scale, 0 for unrelated."""

    run: tyro.conf.Positional[Path]
    """Run folder (its newest checkpoint), checkpoint, exported encoder, or torchvision ResNet state dict."""
    other: tyro.conf.Positional[Path | None] = None
    """Another such; without one, the stages of the first are compared with each other."""
    label: tyro.conf.Suppress[tuple[str, ...]] = ()
    split: str | None = None
    """Compare on the images whose split column holds this; on all if not given."""
    size: int | None = None
    """Side of the network's input, pixels, of both encoders; if not given, each sees the images as its run did, and one
    that does not say how as the other does."""
    resize: float | None = None
    """The shorter side before the centre is cut out, relative to the size, for both encoders; taken as the size is if
    not given, else 1."""
    stages: tuple[Stage, ...] = ("stage1", "stage2", "stage3", "stage4")
    """Residual stages, averaged over all positions, and final, the output of the head scaled to length 1 (of runs and
    checkpoints: other weights have no head)."""
    kernel: tuple[Kernel, ...] = ("linear",)
    """One or several: linear; rbf, as wide as --sigma says; paper, an RBF of the absolute width 0.8, which in hundreds
    of dimensions sees next to nothing."""
    sigma: float = 1.0
    """Width of rbf, in medians of the distance between two images' features."""
    estimator: Literal["auto"] | Estimator = "auto"
    """biased, which is near 1 for anything where images are few; unbiased; minibatch, which averages unbiased ones over
    minibatches of 256 images; auto is unbiased for up to 2048 images and minibatch above."""
    draws: int = 50
    """Draws of images for the feature reuse of two encoders: 1000 in each, or 80 % of the images where that is
    fewer."""
    seed: int = 0
    """Seed of the minibatches and of the draws."""
    batch_size: int = 64
    """Images in a batch; does not change the features."""
    workers: int = 2
    """Processes that load images; 0 loads in the main process."""
    precision: Precision = "fp32"
    """Arithmetic of the encoders: float32, or bfloat16 autocast, which is faster on GPUs and less exact."""
    out: Path | None = None
    """JSON file to write, with a picture for each kernel beside it; in folder "compare" of the first run, named after
    what is compared, if not given."""


def compare_command(args: CompareArgs) -> int:
    """Print the tables and write the file and the pictures. Returns the exit status, 0; raises UserError."""
    _refuse_options(args)
    device = find_device(args.device)
    sides = _sides(args)
    out = _file(args, [side.name for side in sides])
    manifest = args.manifest()
    refuse_inside(out, "--out", manifest)
    if args.split is not None:
        manifest = manifest.only_split(args.split)
    estimator = _estimator(args, len(manifest))
    # Before minutes go into features.
    try_out(out)
    features = [_features(side, manifest, args, device) for side in sides]
    console = Console()
    with console.status("comparing"):
        found = compare(
            *features,
            kernels=tuple(dict.fromkeys(args.kernel)),
            sigma=args.sigma,
            estimator=estimator,
            draws=args.draws,
            seed=args.seed,
        )
    print_comparison(found, sides, console)
    images = {"data": str(args.data), "labels": None if args.labels is None else str(args.labels), "split": args.split}
    options = {"precision": args.precision, "seed": args.seed, "batch": BATCH if estimator == "minibatch" else None}
    record = as_json(found, sides) | images | options
    try:
        write_text(out, json.dumps(record, indent=1, allow_nan=False) + "\n")
        pictures = draw_comparison(found, sides, out)
    except OSError as error:
        raise unwritable(out, error) from error
    console.print(f"written: {', '.join(str(path) for path in [out, *pictures])}", soft_wrap=True, markup=False)
    if not pictures:
        console.print("no picture: matplotlib is not installed; pip install matplotlib", soft_wrap=True, markup=False)
    return 0


def _refuse_options(args: CompareArgs) -> None:
    if not args.stages:
        raise UserError("--stages: name at least one of stage1, stage2, stage3, stage4 and final")
    if not args.kernel:
        raise UserError("--kernel: name at least one of linear, rbf and paper")
    if not (math.isfinite(args.sigma) and args.sigma > 0):
        raise UserError(f"--sigma must be above 0, not {args.sigma:g}")
    if args.sigma != 1 and "rbf" not in args.kernel:
        raise UserError(f"--sigma {args.sigma:g} is the width of --kernel rbf, which is not asked for")
    if args.other is not None and args.draws < 2:
        raise UserError(f"--draws must be at least 2, not {args.draws}: one draw has no deviation")


def _sides(args: CompareArgs) -> list[Side]:
    """The encoders to compare, each with what it is shown of an image. Raises UserError where that is not known, or
    where one has no such stage."""
    runs = [args.run] if args.other is None else [args.run, args.other]
    files = [weights_file(run) for run in runs]
    if len({file.resolve() for file in files}) < len(files):
        raise UserError(f"{runs[0]} and {runs[1]} are the same file; name one, to compare its stages with each other")
    encoders = [load_encoder(file) for file in files]
    # What an encoder's file does not say is as for the other: of two states of one network, often only one says it.
    sizes = [encoder.image_size for encoder in encoders if encoder.image_size is not None]
    resizes = [encoder.resize for encoder in encoders if encoder.resize is not None]
    sides = []
    for name, run, file, encoder in zip(_names(runs), runs, files, encoders, strict=True):
        if "final" in args.stages:
            require_head(encoder, run)
        size = args.size or encoder.image_size or (sizes[0] if sizes else args.input_size(encoder, run))
        resize = args.resize or encoder.resize or (resizes[0] if resizes else 1.0)
        sides.append(Side(name=name, run=run, file=file, encoder=encoder, size=size, resize=resize))
    return sides


def _names(runs: list[Path]) -> list[str]:
    """The last part of each path that is not the same in both."""
    parts = zip(*(reversed(run.resolve().parts) for run in runs), strict=False)
    return next(list(each) for each in parts if len(set(each)) == len(runs))


def _file(args: CompareArgs, names: list[str]) -> Path:
    if args.out is None:
        said = names if args.split is None else [*names, args.split]
        return run_folder(args.run) / "compare" / f"{'-'.join(said).replace('/', '_')[:150]}.json"
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder: name a file")
    if args.out.suffix.lower() != ".json":
        raise UserError(f"--out {args.out}: name a file that ends in .json; the pictures are written beside it")
    return args.out


def _estimator(args: CompareArgs, images: int) -> Estimator:
    """The estimator for so many images. Raises UserError where they are too few, or too many for it."""
    if images < LEAST_IMAGES:
        where = f"--data {args.data}" if args.split is None else f"--split {args.split}"
        raise UserError(f"{where}: {images} images are too few to compare on; it takes {LEAST_IMAGES}")
    if args.estimator == "auto":
        return unbiased_for(images)
    # One side's centred Gram matrices, the other's twice while they are put together, and two to work on: measured.
    matrices = 3 * len(args.stages) + 2
    needed = 8 * matrices * images**2
    if args.estimator != "minibatch" and needed > MOST_BYTES:
        raise UserError(
            f"--estimator {args.estimator}: {images:,} images take {needed / 2**30:.0f} GiB of memory, more than the "
            f"{MOST_BYTES / 2**30:.0f} GiB that are allowed; take minibatch, or compare on fewer images"
        )
    return args.estimator


def _features(side: Side, manifest: Manifest, args: CompareArgs, device: torch.device) -> dict[str, np.ndarray]:
    found = extract(
        side.encoder,
        manifest,
        size=side.size,
        resize=side.resize,
        batch_size=args.batch_size,
        workers=args.workers,
        device=device,
        precision=args.precision,
    )
    return {stage: found[stage] for stage in dict.fromkeys(args.stages)}
