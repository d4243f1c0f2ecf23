"""From encoders and labelled images to tables of test scores; `fastmoco evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console

from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.device import find_device
from fastmoco.errors import UserError
from fastmoco.evaluate.baselines import colour_statistics, gray_pixels
from fastmoco.evaluate.features import extract
from fastmoco.evaluate.protocol import evaluate_features
from fastmoco.evaluate.report import Result, print_result, write_results
from fastmoco.evaluate.splits import make_splits
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import load_encoder, run_folder
from fastmoco.precision import Precision

FeatureSets = dict[str, dict[str, np.ndarray]]


@dataclass(kw_only=True, slots=True)
class EvaluateArgs:
    """Score a pretrained encoder by kNN and linear probes on every residual stage, beside baselines."""

    run: tyro.conf.Positional[Path]
    """Run folder (its newest checkpoint), checkpoint, exported encoder, or torchvision ResNet state dict."""
    data: Path
    """Folder of images or of tar shards, or .npz file as MedMNIST's."""
    labels: Path | None = None
    """CSV file, manifest file or list of findings that lists the images (paths relative to the data folder) with
    labels and, where known, patient and split; without one, each image's class is its sub-folder, or what the shards
    or the .npz file say."""
    label: tuple[str, ...] = ()
    """Label columns, each evaluated by itself; of a CSV file none if not given, otherwise all."""
    file_column: str = "file"
    """Name of the CSV column with the path of the image."""
    patient_column: str = "patient"
    """Name of the CSV column with the patient, if the file has one; a patient's images stay in one split."""
    split_column: str = "split"
    """Name of the CSV column with the split (train, test, perhaps val), if it has one; drawn otherwise."""
    allow_leaks: bool = False
    """Accept a split column that has images of one patient in two splits; the scores will be too good."""
    size: int | None = None
    """Side of the network's input, pixels; that of the run if not given."""
    batch_size: int = 64
    """Images in a batch; does not change the scores."""
    workers: int = 2
    """Processes that load images; 0 loads in the main process."""
    device: str = "auto"
    """Device such as cpu or cuda:0; auto takes a GPU where there is one."""
    precision: Precision = "fp32"
    """Arithmetic of the encoder: float32, or bfloat16 autocast, which is faster on GPUs and less exact."""
    baselines: bool = True
    """Also score colour statistics, gray pixels and a randomly initialised encoder."""
    seed: int = 0
    """Seed of the drawn splits, the random encoder and the intervals."""
    out: Path | None = None
    """Folder for evaluation.json, .csv and .md; "evaluation" in the run folder if not given."""

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("batch_size", 1), ("workers", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


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
    context = (_describe_input(size, resize),)
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
        features["colour statistics"] = {"image": colour_statistics(manifest, workers=workers)}
        features["gray pixels"] = {"16x16": gray_pixels(manifest, side=16, workers=workers)}
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
    encoder = load_encoder(args.run)
    size = args.size or encoder.image_size
    if size is None:
        raise UserError(f"{args.run} does not say what size of image it was trained on: give --size")
    resize = encoder.resize or 1.0
    manifest = load_manifest(
        args.data,
        args.labels,
        label=args.label,
        file_column=args.file_column,
        patient_column=args.patient_column,
        split_column=args.split_column,
    )
    if not manifest.labels:
        raise UserError(
            f"--data {args.data}: no labels to evaluate with; sort the images into two or more class folders, or "
            "name a CSV file with --labels and its column with --label"
            if args.labels is None
            else f"--labels {args.labels}: say with --label which of its columns to evaluate"
        )
    for label in manifest.labels:
        # Whatever is wrong with a label's splits is said before minutes go into features.
        make_splits(manifest, label, seed=args.seed, allow_leaks=args.allow_leaks)
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
    context = (f"Pretrained: {args.run}, {encoder.arch}.", _describe_input(size, resize))
    results = []
    for label in manifest.labels:
        with console.status(f"scoring {label}"):
            result = evaluate_features(
                features, manifest, label=label, seed=args.seed, allow_leaks=args.allow_leaks, context=context
            )
        print_result(result)
        results.append(result)
    paths = write_results(results, args.out or default_folder(args.run))
    console.print(f"written: {', '.join(str(path) for path in paths)}", soft_wrap=True, markup=False)
    return 0


def default_folder(run: Path) -> Path:
    """Where results go unless told: "evaluation" in the run folder, with a sub-folder for a single file."""
    if run.is_dir():
        return run / "evaluation"
    return run_folder(run) / "evaluation" / run.stem


def _describe_input(size: int, resize: float) -> str:
    """The evaluation transform in words."""
    return (
        f"Encoders see {size}x{size} pixels, the centre of the image after its shorter side is resized to "
        f"{round(resize * size)}."
    )
