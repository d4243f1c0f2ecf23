"""`fastmoco data scan`: which images can be used, which cannot, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fastmoco.data.dali import dali_installed
from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.verify import Skipped


@dataclass(kw_only=True, slots=True)
class ScanArgs:
    """Check that every image decodes; list those that are left out, and why. What is found is remembered."""

    data: tyro.conf.Positional[Path]
    """Folder of images; sub-folders are searched."""
    labels: Path | None = None
    """CSV file that lists the images, paths relative to the data folder; all images in the folder if not given."""
    label: tuple[str, ...] = ()
    """Label columns of the CSV file."""
    file_column: str = "file"
    """Name of the CSV column with the path of the image."""
    patient_column: str = "patient"
    """Name of the CSV column with the patient, if the file has one."""
    split_column: str = "split"
    """Name of the CSV column with the split, if the file has one."""
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    """Whether DALI's decoder is tried too, beside Pillow; auto: where DALI is installed."""
    strict: bool = False
    """End with status 1 if any file is left out."""
    workers: int = 0
    """Threads that decode; 0: one a core."""


def scan_command(args: list[str]) -> int:
    """Print what was found. Returns the exit status: 1 with --strict and a file left out, otherwise 0."""
    options = tyro.cli(ScanArgs, prog="fastmoco data scan", args=args)
    decoder = options.decoder
    if decoder == "auto":
        decoder = "dali" if dali_installed() else "pillow"
    manifest = load_manifest(
        options.data,
        options.labels,
        label=options.label,
        file_column=options.file_column,
        patient_column=options.patient_column,
        split_column=options.split_column,
        decoder=decoder,
        workers=options.workers,
    )
    print(report(manifest.skipped, manifest))
    return 1 if options.strict and manifest.skipped else 0


def report(skipped: list[Skipped], manifest: Manifest) -> str:
    """The files left out, one a line with the reason, and counts of the others by suffix and by decoder."""
    lines = [f"left out: {item}" for item in skipped]
    kinds = Counter(name.rpartition(".")[2].lower() for name in manifest.files)
    lines.append(f"{len(manifest):,} images ({', '.join(f'{n:,} {kind}' for kind, n in kinds.most_common())})")
    by_dali = int(manifest.dali.sum())
    lines.append(f"decoded by DALI: {by_dali:,}; by Pillow: {len(manifest) - by_dali:,}; left out: {len(skipped):,}")
    return "\n".join(lines)
