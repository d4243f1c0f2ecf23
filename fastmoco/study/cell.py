"""A cell: one unit of the study's work, minutes long, and what it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["data", "baselines", "pretrain", "probes", "similarity", "finetune"]

REVISIONS: dict[Kind, int] = {"data": 1, "baselines": 2, "pretrain": 1, "probes": 1, "similarity": 1, "finetune": 2}
"""Raise a kind's by one where a change of the program changes what its cells find: a hash holds no program, and what
was computed before would be taken for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """`settings` are plain JSON values: all that the result depends on, of other cells their hashes; "revision" is the
    kind's in `REVISIONS`.

    `needs` names the cells that come first. `work` is a guess at its cost, in images that go through the encoder
    and back.
    """

    id: str
    kind: Kind
    settings: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    work: float = 1.0

    @property
    def hash(self) -> str:
        """SHA-256 of kind and settings, in hexadecimal."""
        return digest([self.kind, self.settings])

    @property
    def group(self) -> str:
        """Cells that take about equally long: what stands for them in an estimate of time."""
        s = self.settings
        parts = [self.kind, s["data"]["name"], *(str(s[name]) for name in ("mode", "target", "budget") if name in s)]
        return " ".join(parts)


def digest(value: Any) -> str:
    """SHA-256 of `value`'s canonical JSON, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
