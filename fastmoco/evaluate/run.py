"""From encoders and labelled images to tables of test scores; `fastmoco evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console

from fastmoco.data.labelled import describe_unlabelled, doubt_folders, labelled, only_labelled
from fastmoco.data.manifest import Manifest
from fastmoco.device import find_device
from fastmoco.evaluate.baselines import colour_statistics, gray_pixels
from fastmoco.evaluate.features import describe_input, extract
from fastmoco.evaluate.leaks import pretrained_on, refuse_leaks, seen_before
from fastmoco.evaluate.options import LabelledImages
from fastmoco.evaluate.protocol import evaluate_features
from fastmoco.evaluate.report import Result, as_files, print_result
from fastmoco.evaluate.splits import make_splits
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import load_encoder, run_folder, weights_file
from fastmoco.precision import Precision
from fastmoco.results import try_folder, write_results

FeatureSets = dict[str, dict[str, np.ndarray]]


@dataclass(kw_only=True, slots=True)
class EvaluateArgs(LabelledImages):
    """Score a pretrained encoder by kNN and linear probes on every residual stage, beside baselines."""

    run: tyro.conf.Positional[Path]
    """Run folder (its newest checkpoint), checkpoint, exported encoder, or torchvision ResNet state dict."""
    allow_leaks: bool = False
    """Accept a split column that has images of one patient in two splits, and what --duplicates finds; the scores will
    be too good."""
    duplicates: bool = False
    """Also stop where an image is in two splits under two names, by a hash of its pixels, for which every image is read
    once more."""
    batch_size: int = 64
    """Images in a batch; does not change the scores."""
    workers: int = 2
    """Processes that load images; 0 loads in the main process."""
    precision: Precision = "fp32"
    """Arithmetic of the encoder: float32, or bfloat16 autocast, which is faster on GPUs and less exact."""
    baselines: bool = True
    """Also score colour statistics, gray pixels and a randomly initialised encoder."""
    seed: int = 0
    """Seed of the drawn splits, the random encoder and the intervals."""
    out: Path | None = None
    """Folder for evaluation.json, .csv and .md; "evaluation" in the run folder if not given. Earlier ones there are
    numbered."""


def evaluate(
    encoders: Mapping[str, Encoder],
    manifest: Manifest,
    *,
    label: str,
    size: int,
    resize: float = 1.0,
    seed: int = 0,
    baselines: bool = True,
    allow_leaks: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    progress: bool = True,
) -> Result:
    """`collect_features`, then `evaluate_features` for one label column, whose arguments these are.

    Raises UserError as `make_splits` does, before any image is read.
    """
    make_splits(manifest, label, seed=seed, allow_leaks=allow_leaks)
    features = collect_features(
        encoders,
        manifest,
        size=size,
        resize=resize,
        baselines=baselines,
        batch_size=batch_size,
        workers=workers,
        device=device,
        precision=precision,
        progress=progress,
    )
    context = (f"Encoders see {describe_input(size, resize)}.",)
    return evaluate_features(features, manifest, label=label, seed=seed, allow_leaks=allow_leaks, context=context)


def collect_features(
    encoders: Mapping[str, Encoder],
    manifest: Manifest,
    *,
    size: int,
    resize: float = 1.0,
    baselines: bool = True,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    progress: bool = True,
) -> FeatureSets:
    """The feature sets (n, d) of the n images, by encoder and name.

    With `baselines`, colour statistics and gray pixels come first; random initialisation is one more encoder
    of the caller's. The rest are the arguments of `extract`.
    """
    features: FeatureSets = {}
    if baselines:
        features["colour statistics"] = {"image": colour_statistics(manifest, workers=workers, progress=progress)}
        features["gray pixels"] = {"16x16": gray_pixels(manifest, side=16, workers=workers, progress=progress)}
    for name, encoder in encoders.items():
        features[name] = extract(
            encoder,
            manifest,
            size=size,
            resize=resize,
            batch_size=batch_size,
            workers=workers,
            device=device,
            precision=precision,
            progress=progress,
        )
    return features


def evaluate_command(args: EvaluateArgs) -> int:
    """Print a table for each label and write the results. Returns the exit status, 0; raises UserError."""
    device = find_device(args.device)
    if args.out is not None:
        try_folder(args.out)
    encoder = load_encoder(args.run)
    size = args.input_size(encoder, args.run)
    resize = encoder.resize or 1.0
    everything = args.labelled()
    manifest = everything.select(np.any([labelled(everything, [label]) for label in everything.labels], axis=0))
    images = pretrained_on(run_folder(args.run))
    # Each label is scored on all images that have a class of it, whichever others are asked for.
    parts: dict[str, Manifest] = {}
    said: dict[str, tuple[str, ...]] = {}
    for label in manifest.labels:
        parts[label] = some = only_labelled(everything, [label])
        # Whatever is wrong with a label's splits is said before minutes go into features.
        splits = make_splits(some, label, seed=args.seed, allow_leaks=args.allow_leaks)
        if args.duplicates:
            refuse_leaks(some, splits, allowed=args.allow_leaks)
        unknown = len(everything) - len(some)
        doubt = doubt_folders(label, some.known_classes(label))
        said[label] = (f"{len(some.known_classes(label))} folders as classes: {doubt}.",) if doubt else ()
        said[label] += ((describe_unlabelled(unknown, [label]),) if unknown else ()) + seen_before(images, some, splits)
    folder = args.out or default_folder(args.run)
    try_folder(folder)
    encoders = {"random": Encoder(encoder.arch, seed=args.seed)} if args.baselines else {}
    features = collect_features(
        {**encoders, "pretrained": encoder},
        manifest,
        size=size,
        resize=resize,
        baselines=args.baselines,
        batch_size=args.batch_size,
        workers=args.workers,
        device=device,
        precision=args.precision,
    )
    console = Console()
    context = (
        f"Pretrained: {weights_file(args.run)}, {encoder.arch}.",
        f"Encoders see {describe_input(size, resize)}.",
    )
    results = []
    for label, some in parts.items():
        known = labelled(manifest, [label])
        own = {name: {what: values[known] for what, values in sets.items()} for name, sets in features.items()}
        with console.status(f"scoring {label}"):
            result = evaluate_features(
                own,
                some,
                label=label,
                seed=args.seed,
                allow_leaks=args.allow_leaks,
                context=context + said[label],
            )
        print_result(result)
        results.append(result)
    texts = {folder / name: text for name, text in as_files(results).items()}
    if earlier := write_results(texts):
        console.print(f"the results before are now {', '.join(map(str, earlier))}", soft_wrap=True, markup=False)
    console.print(f"written: {', '.join(map(str, texts))}", soft_wrap=True, markup=False)
    return 0


def default_folder(run: Path) -> Path:
    """Where results go unless told: "evaluation" in the run folder, with a sub-folder for a single file."""
    if run.is_dir():
        return run / "evaluation"
    return run_folder(run) / "evaluation" / run.stem
