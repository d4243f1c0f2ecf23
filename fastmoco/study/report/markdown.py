"""A report as Markdown, its pictures as PNG files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from fastmoco.study.report.blocks import Block, Code, Heading, Listing, Picture, Table, Text


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The whole document; pictures are NAME.png in the same folder."""
    return "\n\n".join([f"# {_escaped(title)}", *filter(None, map(_markdown, blocks))]) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {_escaped(block.text)}"
        case Text():
            return f"**{_escaped(block.text)}**" if block.strong else _escaped(block.text)
        case Code():
            return "\n".join(f"    {line}" for line in block.text.splitlines())
        case Listing():
            items = "\n".join(f"- {_escaped(item)}" for item in block.items)
            return f"{_escaped(block.summary)}:\n\n{items}" if block.summary and items else items
        case Table():
            rule = ["---", *["---:"] * (len(block.header) - 1)]
            lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in (block.header, *block.rows)]
            lines.insert(1, "| " + " | ".join(rule) + " |")
            notes = "".join(f"\n- {_escaped(note)}" for note in block.notes)
            return f"{_escaped(block.caption)}:\n\n" + "\n".join(lines) + (f"\n{notes}" if notes else "")
        case Picture():
            return f"![{_escaped(block.caption)}]({block.name}.png)"


def _escaped(text: str) -> str:
    for character in "\\|*_[]<>":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")
