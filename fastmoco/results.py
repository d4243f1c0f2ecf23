"""Files that long work ends in: tried before it begins; an evaluation keeps what they held before."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from fastmoco.atomic import replacing, write_text
from fastmoco.errors import UserError


def try_out(path: Path, *, option: str = "--out") -> None:
    """Make the folder of the file `path` and try to write there. Raises UserError, with `option`, where that fails."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: name a file")
    _try(path.parent, path, option)


def try_folder(folder: Path, *, option: str = "--out") -> None:
    """As `try_out`, of files in `folder`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder} is a file: name a folder")
    _try(folder, folder, option)


def unwritable(path: Path, error: OSError, option: str = "--out") -> UserError:
    """That `path` cannot be written, and why."""
    return UserError(f"{option} {path}: cannot be written: {error.strerror or error}")


def write_results(texts: Mapping[Path, str], *, option: str = "--out") -> list[Path]:
    """Write files of one folder, each atomically; those that were there with other contents get the first free number.

    Returns where the earlier ones are now; until all of them are there, they keep their names as well. Raises
    UserError, with `option`, where a file cannot be written.
    """
    paths = list(texts)
    try:
        earlier = [path for path in paths if path.exists()]
        kept: list[Path] = []
        if any(path.read_bytes() != texts[path].encode(errors="surrogateescape") for path in earlier):
            free = next(n for n in count(1) if not any(_numbered(path, n).exists() for path in paths))
            for path in earlier:
                with replacing(_numbered(path, free)) as temporary:
                    shutil.copy2(path, temporary)
                kept.append(_numbered(path, free))
        for path, text in texts.items():
            write_text(path, text)
    except OSError as error:
        raise unwritable(paths[0] if len(paths) == 1 else paths[0].parent, error, option) from error
    return kept


def _try(folder: Path, named: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"tried")
    except OSError as error:
        in_the_way = next((part for part in (folder, *folder.parents) if part.exists()), folder)
        if not in_the_way.is_dir():
            raise UserError(f"{option} {named}: cannot be written: {in_the_way} is a file, not a folder") from error
        raise unwritable(named, error, option) from error


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.{number}{path.suffix}")
