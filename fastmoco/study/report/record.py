"""How the study went: budgets, leaks, machines, times, commands, and what is missing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fastmoco.study.cell import Cell
from fastmoco.study.config import Study, variables
from fastmoco.study.estimate import in_words
from fastmoco.study.report.blocks import Block, Code, Heading, Listing, Table, Text
from fastmoco.study.report.gather import Findings
from fastmoco.study.report.words import share
from fastmoco.study.store import Record, Store


def budgets(every: Sequence[Findings]) -> list[Block]:
    """The labels that were used, with what was used instead of what was asked."""
    blocks: list[Block] = [Heading(level=2, text="Label budgets that were used")]
    rows, notes = [], []
    for found in every:
        by_budget = defaultdict(list)
        for row in found.budgets():
            by_budget[row["budget"]].append(row)
        for budget, each in sorted(by_budget.items()):
            rows.append((found.data.name, share(budget), str(found.used(budget)), str(len(each))))
            notes += sorted({f"{found.data.name}: {row['note']}" for row in each if row["note"]})
    if not rows:
        return [*blocks, Text(text="None yet.")]
    header = ("data", "asked", "labelled images, share of the training images", "draws")
    blocks.append(
        Table(caption="Labelled images by budget; draws of one seed are nested", header=header, rows=tuple(rows))
    )
    blocks.append(
        Text(
            text="Constants (C of the probes, the best step of fine-tuning, the best stage) are chosen on the "
            "validation images, all of them labelled at every budget, as in the paper."
        )
    )
    return [
        *blocks,
        Listing(items=tuple(notes), summary="What was used in place of what was asked", folded=len(notes) > 6),
    ]


def leaks(every: Sequence[Findings]) -> list[Block]:
    """What lies in two splits by leave, set by set."""
    blocks: list[Block] = [Heading(level=2, text="Leaks between splits")]
    if any(found.described is not None and found.described["leaks"] for found in every):
        said = "The study was told to go on in spite of what is listed here; scores may be too good."
        blocks.append(Text(text=said, strong=True))
    for found in every:
        listed = found.described["leaks"] if found.described is not None else []
        if listed:
            items = tuple(listed)
            summary = f"{found.data.name}: {len(items)} in two splits"
            blocks.append(Listing(items=items, summary=summary, folded=len(items) > 20))
        else:
            blocks.append(Text(text=f"{found.data.name}: {_without_leaks(found.described)}"))
    return blocks


def _without_leaks(described: Mapping[str, Any] | None) -> str:
    if described is None:
        return "not known yet: its first cell is missing."
    if described["patients"] is None:
        return "no picture is in two splits. Patients are not known, so that one may have pictures in two."
    return "no patient and no picture is in two splits."


def course(records: Mapping[str, Record], cells: Mapping[str, Cell]) -> list[Block]:
    """What ran where, and how long."""
    by_kind: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for record in records.values():
        by_kind[record["kind"], record["device"], record["machine"]].append(record["seconds"])
    rows = [
        (kind, device, machine, str(len(times)), in_words(sum(times)), f"{sum(times) / len(times):.1f}")
        for (kind, device, machine), times in sorted(by_kind.items())
    ]
    total = sum(record["seconds"] for record in records.values())
    blocks: list[Block] = [
        Heading(level=2, text="What ran where, and how long"),
        Text(text=f"{len(records)} of {len(cells)} cells are computed, {in_words(total)} of one process in all."),
        Table(
            caption="Cells by kind and machine",
            rows=tuple(rows),
            header=("kind", "device", "machine", "cells", "time", "seconds a cell"),
        ),
    ]
    encoders = tuple(
        f"{record['id']}: {record['result']['sha256']}" for record in records.values() if record["kind"] == "pretrain"
    )
    if encoders:
        blocks.append(Listing(items=encoders, summary="SHA-256 of the pretrained encoders' files", folded=True))
    used = sorted({", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in records.values()})
    blocks.append(Listing(items=tuple(used), summary="Versions"))
    other = _other_inputs(records)
    if other:
        blocks.append(
            Listing(
                items=tuple(other),
                folded=len(other) > 10,
                summary="Computed before their encoder was trained again, with the same settings",
            )
        )
    return blocks


def commands(study: Study, command: str, records: Mapping[str, Record]) -> list[Block]:
    """How all of it, and each part, is computed."""
    each = tuple(
        f"{record['command']}   ({record['seconds']:.1f} s), {record['device']}" for record in records.values()
    )
    alone = command.partition(" --")[0]
    blocks: list[Block] = [
        Heading(level=2, text="Commands"),
        Code(text=f"{command}    # what is missing, then this report\n{alone} --report only    # this report alone"),
    ]
    names = variables(study.file)
    if names:
        said = f"The file takes from the environment, where they are set, the folders of images: {', '.join(names)}."
        blocks.append(Text(text=said))
    return [*blocks, Listing(items=each, summary=f"Each of the {len(each)} finished cells by itself", folded=True)]


def missing(
    store: Store, records: Mapping[str, Record], cells: Mapping[str, Cell], damaged: Sequence[str]
) -> list[Block]:
    """What is not there, and why."""
    blocks: list[Block] = [Heading(level=2, text="Failed and missing cells")]
    failed = {
        cell_id: reason for cell_id, cell in cells.items() if cell_id not in records and (reason := store.failure(cell))
    }
    left = [cell_id for cell_id in cells if cell_id not in records and cell_id not in failed]
    if failed:
        items = tuple(f"{cell_id}: {reason.splitlines()[-1]}" for cell_id, reason in failed.items())
        blocks.append(Listing(items=items, summary="Failed"))
    if damaged:
        blocks.append(Listing(items=tuple(damaged), summary="Files that are damaged"))
    if left:
        blocks.append(Listing(items=tuple(left), summary=f"Not computed yet: {len(left)}", folded=len(left) > 10))
    return blocks if len(blocks) > 1 else [*blocks, Text(text="None: every cell is computed.")]


def _other_inputs(records: Mapping[str, Record]) -> list[str]:
    """Cells whose pretraining was computed again after them: its weights may differ by rounding."""
    items = []
    for record in records.values():
        changed = [need for need, key in record["inputs"].items() if need in records and records[need]["key"] != key]
        if changed:
            items.append(f"{record['id']}: {', '.join(changed)}")
    return items
