"""`fastmoco data scan`: which images can be used, which cannot, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from fastmoco.arguments import read_arguments
from fastmoco.data.manifest import Manifest, trusted_list
from fastmoco.data.manifest_file import SHARD_INDEX, is_manifest_file, write_manifest
from fastmoco.data.sizes import show_count
from fastmoco.data.source import Source
from fastmoco.errors import UserError


@dataclass(kw_only=True)
class ScanArgs(Source):
    """Check that every image decodes; list those that are left out, and why. What is found is remembered."""

    decoder: Literal["auto", "dali", "pillow"] = "auto"
    """Whether DALI's decoder is tried too, beside Pillow; auto: where DALI is installed."""
    strict: bool = False
    """End with status 1 if any file is left out."""
    out: Path | None = None
    """Manifest file to write. Given as --labels it is trusted: nothing is listed, checked or decoded again."""


def scan_command(args: list[str]) -> int:
    """Print what was found. Returns the exit status: 1 with --strict and a file left out, otherwise 0."""
    options = read_arguments(ScanArgs, prog="fastmoco data scan", args=args)
    if options.out is not None:
        _refuse_out(options.out, options.labels)
    manifest = options.manifest(options.decoder)
    print(report(manifest))
    trusted = trusted_list(options.images(), options.labels)
    if trusted is not None:
        print(untested(options.images(), trusted))
    if options.out is not None:
        try:
            write_manifest(options.out, manifest)
        except OSError as error:
            raise UserError(f"--out {options.out}: cannot be written: {error}") from error
        print(f"written: {options.out}")
    return 1 if options.strict and manifest.skipped else 0


def _refuse_out(out: Path, labels: Path | None) -> None:
    """Raise UserError where `out` cannot be a file, or is one that holds more than a manifest to be written anew."""
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: no such folder")
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; name a file")
    if labels is not None and out.exists() and out.samefile(labels):
        raise UserError(f"--out {out}: is the file of --labels, whose other columns would be lost; name another file")
    if out.exists() and not is_manifest_file(out):
        raise UserError(f"--out {out}: there already, and no manifest file; name another file")


def report(manifest: Manifest) -> str:
    """The files left out, one a line with the reason, and counts of the others by suffix and by decoder."""
    skipped = manifest.skipped
    lines = [f"left out: {item}" for item in skipped]
    kinds = Counter(PurePath(name).suffix[1:].lower() or "without suffix" for name in manifest.files)
    by_kind = ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common())
    lines.append(f"{show_count(len(manifest), 'image')} ({by_kind})")
    by_dali = int(manifest.dali.sum())
    lines.append(f"decoded by DALI: {by_dali:,}; on the host: {len(manifest) - by_dali:,}; left out: {len(skipped):,}")
    return "\n".join(lines)


def untested(data: Path, trusted: Path) -> str:
    """What a scan that read nothing must say: the list `trusted` was believed."""
    said = f"{trusted} is trusted: no image was read"
    if trusted == data / SHARD_INDEX:
        return f"{said}. To read and compare every image: fastmoco data pack --out {data} --check"
    return f"{said}; without it every image is"
