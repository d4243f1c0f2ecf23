"""What a report consists of, whatever it is written as."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """A heading of level 1 (the title) to 4."""

    level: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A paragraph. `strong`: one that is to catch the eye."""

    text: str
    strong: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Items under each other; `folded`: behind `summary` until it is opened, where that is possible."""

    items: tuple[str, ...]
    summary: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Commands, to be copied."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table with a caption; every row has as many cells as `header`, the first of which names it. `notes` stand
    under it, each with the mark by which cells refer to it. `summary`: what it is folded behind until it is opened,
    where that is possible; not folded if empty."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    summary: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"{self.caption}: a row of {len(row)} cells under {len(self.header)} headings")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure. `name` is that of its file, `caption` says what is seen, also to who cannot see it."""

    name: str
    caption: str
    figure: Figure


Block = Heading | Text | Listing | Code | Table | Picture
