"""Amounts of bytes, and numbers of things, as people write them."""

from __future__ import annotations

import re

from fastmoco.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(text: str, option: str) -> int:
    """"1GB", "500 MB", "2.5G" or a plain number as bytes (GB: 10^9). Raises UserError naming `option`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text.upper())
    size = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"{option} {text}: give a size such as 500MB or 1GB")
    return size


def show_bytes(size: float) -> str:
    """For a person: "1.23 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def show_count(number: int, thing: str) -> str:
    """For a person: "1 shard", "1,024 shards"."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")
