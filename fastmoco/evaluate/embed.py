"""`fastmoco embed`: the features of every image as a file."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from fastmoco.atomic import replacing
from fastmoco.data.manifest import Manifest
from fastmoco.device import find_device
from fastmoco.errors import UserError
from fastmoco.evaluate.features import extract
from fastmoco.evaluate.options import LabelledImages, require_head
from fastmoco.models.weights import load_encoder
from fastmoco.precision import Precision
from fastmoco.results import try_out, unwritable

Stage = Literal["stage1", "stage2", "stage3", "stage4", "final"]
ABOUT = "fastmoco"
"""Under this name a file says where its features come from, as JSON: an array of an .npz file, Parquet's metadata."""


@dataclass(kw_only=True, slots=True)
class EmbedArgs(LabelledImages):
    """Write the features that an encoder has of every image, with file, patient, split and labels, to one file."""

    run: tyro.conf.Positional[Path]
    """Run folder (its newest checkpoint), checkpoint, exported encoder, or torchvision ResNet state dict."""
    out: Path
    """File to write, .npz or .parquet."""
    stages: tuple[Stage, ...] = ("stage4",)
    """Residual stages, averaged over all positions, and final, the output of the head scaled to length 1 (of runs and
    checkpoints: other weights have no head)."""
    label: tuple[str, ...] = ()
    """Label columns to write beside; if not given all, of a CSV file those of 2 to 1000 different values."""
    batch_size: int = 64
    """Images in a batch; does not change the features."""
    workers: int = 2
    """Processes that load images; 0 loads in the main process."""
    precision: Precision = "fp32"
    """Arithmetic of the encoder: float32, or bfloat16 autocast, which is faster on GPUs and less exact."""


def embed_command(args: EmbedArgs) -> int:
    """Write the file. Returns the exit status, 0; raises UserError."""
    write = _WRITERS.get(args.out.suffix.lower())
    if write is None:
        raise UserError(f"--out {args.out}: name a file that ends in {' or '.join(_WRITERS)}")
    if write is write_parquet:
        _pyarrow(args.out)
    if not args.stages:
        raise UserError("--stages: name at least one of stage1, stage2, stage3, stage4 and final")
    device = find_device(args.device)
    try_out(args.out)
    encoder = load_encoder(args.run)
    size = args.input_size(encoder, args.run)
    if "final" in args.stages:
        require_head(encoder, args.run)
    manifest = args.manifest(all_labels=True)
    resize = encoder.resize or 1.0
    features = extract(
        encoder,
        manifest,
        size=size,
        resize=resize,
        batch_size=args.batch_size,
        workers=args.workers,
        device=device,
        precision=args.precision,
    )
    about = {"run": str(args.run), "arch": encoder.arch, "size": size, "resize": resize, "precision": args.precision}
    try:
        with replacing(args.out) as temporary:
            write(temporary, manifest, {stage: features[stage] for stage in args.stages}, about)
    except OSError as error:
        raise unwritable(args.out, error) from error
    widths = ", ".join(f"{stage} ({features[stage].shape[1]})" for stage in args.stages)
    print(f"{args.out}: {len(manifest):,} images, {widths}")
    return 0


def write_npz(path: Path, manifest: Manifest, features: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Write arrays of n rows, readable with `allow_pickle=False`: "file" and, where known, "patient" and "split"
    (fixed-width text), "label_NAME" (int64 class numbers, -1 where the class is not known), and
    the `features` (n, C) float32 by their names.

    "classes_NAME" holds what the class numbers are called, and `ABOUT` the JSON of `about`.
    """
    columns: dict[str, np.ndarray] = {"file": np.array(manifest.files, dtype=np.str_), **_known(manifest)}
    for name in manifest.labels:
        columns[f"label_{name}"] = manifest.classes(name)
        columns[f"classes_{name}"] = np.array(manifest.known_classes(name), dtype=np.str_)
    columns |= features | {ABOUT: np.array(json.dumps(about))}
    # Not numpy's savez, which takes arrays by keyword and has a "file" of its own.
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in columns.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, values, allow_pickle=False)


def write_parquet(path: Path, manifest: Manifest, features: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Write a table of n rows: "file" and, where known, "patient" and "split" (text), "label_NAME" (text: the class's
    name, null where it is not known), and the `features` by their names, each a list of C float32; the JSON of `about`
    under `ABOUT` in the metadata.

    Raises UserError where pyarrow is not installed.
    """
    arrow, parquet = _pyarrow(path)
    columns = {"file": arrow.array([_text(name) for name in manifest.files])}
    columns |= {
        name: arrow.array([_text(text) for text in values.tolist()]) for name, values in _known(manifest).items()
    }
    for name in manifest.labels:
        # The last is that of -1.
        names = [*map(_text, manifest.known_classes(name)), None]
        columns[f"label_{name}"] = arrow.array([names[number] for number in manifest.classes(name).tolist()])
    for name, values in features.items():
        flat = arrow.array(np.ascontiguousarray(values, dtype=np.float32).ravel())
        columns[name] = arrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
    table = arrow.table(columns).replace_schema_metadata({ABOUT: json.dumps(about)})
    parquet.write_table(table, path)


_WRITERS = {".npz": write_npz, ".parquet": write_parquet}


def _known(manifest: Manifest) -> dict[str, np.ndarray]:
    texts = {"patient": manifest.patients, "split": manifest.splits}
    return {name: np.asarray(values, dtype=np.str_) for name, values in texts.items() if values is not None}


def _pyarrow(out: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"--out {out}: Parquet is written by pyarrow, which is not installed: pip install pyarrow, or name an .npz "
            "file"
        ) from error
    return pyarrow, pyarrow.parquet


def _text(name: str) -> str:
    """Names of files may hold bytes that are no text, and Parquet's text is UTF-8."""
    return name.encode(errors="backslashreplace").decode()
