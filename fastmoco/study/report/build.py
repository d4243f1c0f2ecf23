"""The report of a study, from its finished cells to its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastmoco.atomic import replacing, write_text
from fastmoco.errors import UserError
from fastmoco.evaluate.intervals import INTERVAL_OF_RUNS
from fastmoco.evaluate.pictures import png
from fastmoco.study.cell import Cell
from fastmoco.study.config import Study
from fastmoco.study.report import alike, delong, figures, record, tables
from fastmoco.study.report.blocks import Block, Heading, Picture, Text
from fastmoco.study.report.gather import Findings, read_records
from fastmoco.study.report.markdown import to_markdown
from fastmoco.study.report.page import to_html
from fastmoco.study.report.settings import settings
from fastmoco.study.report.statistics import Statistics
from fastmoco.study.report.verdict import verdict
from fastmoco.study.store import Store

FOLDER = "report"


def write_report(study: Study, store: Store, cells: Mapping[str, Cell], command: str) -> list[Path]:
    """Write report/report.html, which stands alone, and report/report.md with its PNG files, into the study's folder.

    Cells that are missing are told of, and what needs them is a dash. Raises UserError where it cannot be written.
    """
    title = f"Study: {', '.join(data.name for data in study.data)}"
    blocks = make_report(study, store, cells, command)
    folder = store.out / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {block.name: block for block in blocks if isinstance(block, Picture)}
        for name, picture in pictures.items():
            with replacing(folder / f"{name}.png") as temporary:
                temporary.write_bytes(png(picture.figure))
        for old in folder.glob("*.png"):
            if old.stem not in pictures:
                old.unlink(missing_ok=True)
        write_text(folder / "report.md", to_markdown(title, blocks))
        write_text(folder / "report.html", to_html(title, blocks))
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written: {error.strerror or error}") from error
    return [folder / "report.html", folder / "report.md"]


def make_report(study: Study, store: Store, cells: Mapping[str, Cell], command: str) -> list[Block]:
    """All that the report says, in its order."""
    records, damaged = read_records(store, cells)
    every = [Findings(study, data, records) for data in study.data]
    known = [Statistics(found, study.report.draws) for found in every if found.described is not None]
    blocks: list[Block] = []
    if len(known) == len(every):
        blocks += verdict(known)
    else:
        lacking = ", ".join(found.data.name for found in every if found.described is None)
        blocks.append(Text(text=f"No answer yet: nothing is known of {lacking}.", strong=True))
    blocks += _how(study)
    for own in known:
        blocks.append(Heading(level=2, text=own.found.data.name))
        blocks += tables.describe(own.found)
        blocks += tables.score_tables(own)
        blocks += tables.difference_tables(own)
        blocks += tables.second_table(own)
        blocks += delong.run_by_run(own.found)
        blocks += figures.label_curves(own)
        blocks += figures.stage_curves(own)
        blocks += [tables.neighbour_table(own), *tables.measure_table(own.found)]
        blocks += alike.heat_maps(own.found)
        blocks += alike.reuse(own.found)
        blocks += alike.output_distances(own)
        blocks += figures.training(own.found)
    blocks += settings(every)
    blocks += record.budgets(every)
    blocks += record.leaks(every)
    blocks += record.course(records, cells)
    blocks += record.commands(study, command, records)
    blocks += record.missing(store, records, cells, damaged)
    return blocks


def _how(study: Study) -> list[Block]:
    """What the numbers mean and what was chosen on which images, with what the study's file says of that."""
    seeds = len(study.grid.seeds)
    # Redrawn with replacement, S seeds vary by (S - 1) / S of their variance.
    shown = (
        "One seed shows nothing of the variance between seeds: the intervals are those of this one alone."
        if seeds == 1
        else f"{seeds} seeds redrawn show {seeds - 1}/{seeds} of the variance between seeds, so that the least and the "
        "greatest of them stand beside."
    )
    text = (
        "All scores are of test images, which no cell of the study trains on or chooses by: it chooses on the "
        "validation images. On what its settings were chosen before, the study cannot know"
        + (". " if study.grid.note else ", and its file says nothing of it. ")
        + f"In brackets: {INTERVAL_OF_RUNS}; differences are paired, run by run, on the same patients. {shown} Points "
        "are hundredths of AUC."
    )
    blocks: list[Block] = [Text(text=text)]
    if study.grid.note:
        blocks.append(Text(text=f"Of the settings, the study's file says: {study.grid.note}", strong=True))
    return blocks
