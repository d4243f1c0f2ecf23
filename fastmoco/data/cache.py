"""Where what was found out about a data set is remembered."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_file(kind: str, of: Path) -> Path:
    """The file in the user's cache folder for what is known of `of`, a file or folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmoco"
    key = hashlib.sha256(os.fsencode(of.resolve())).hexdigest()[:16]
    return base / f"{kind}-{key}"
