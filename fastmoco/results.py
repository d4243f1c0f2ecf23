"""Files that long work ends in: tried before it begins, and what they held before is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from fastmoco.atomic import write_text
from fastmoco.errors import UserError


def try_out(path: Path, *, option: str = "--out") -> None:
    """Make the folder of the file `path` and try to write there. Raises UserError, with `option`, where that fails."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as stream:
            stream.write(b"tried")
    except OSError as error:
        raise unwritable(path, error, option) from error


def unwritable(path: Path, error: OSError, option: str = "--out") -> UserError:
    """That `path` cannot be written, and why."""
    return UserError(f"{option} {path}: cannot be written: {error.strerror or error}")


def write_results(texts: Mapping[Path, str], *, option: str = "--out") -> list[Path]:
    """Write files of one folder, each atomically; those that were there with other contents get the first free number.

    Returns where the earlier ones are now. Raises UserError, with `option`, where a file cannot be written.
    """
    paths = list(texts)
    try:
        earlier = [path for path in paths if path.exists()]
        kept: list[Path] = []
        if any(path.read_bytes() != texts[path].encode(errors="surrogateescape") for path in earlier):
            free = next(n for n in count(1) if not any(_numbered(path, n).exists() for path in paths))
            kept = [path.rename(_numbered(path, free)) for path in earlier]
        for path, text in texts.items():
            write_text(path, text)
    except OSError as error:
        raise unwritable(paths[0] if len(paths) == 1 else paths[0].parent, error, option) from error
    return kept


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")
