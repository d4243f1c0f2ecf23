"""What an evaluation found: the record, and its table for the terminal, Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastmoco.data.sizes import show_count
from fastmoco.evaluate.intervals import INTERVAL
from fastmoco.evaluate.scores import Scores
from fastmoco.evaluate.weighted import CALIBRATION_BINS

Method = Literal["knn", "probe"]
_HEADER = ("encoder", "features", "kNN AUC [95 %]", "acc.", "probe AUC [95 %]", "AP", "acc.", "F1", "ECE", "C")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One classifier on one feature set of one encoder: chosen by validation images, scored on test images.

    `width` counts the features. `c` is the probe's inverse regularisation strength, None for kNN. `chosen`
    marks the feature set whose validation AUC is the best of its encoder's, for this method.
    """

    encoder: str
    features: str
    width: int
    method: Method
    c: float | None
    validation_auc: float | None
    chosen: bool
    test: Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All rows for one label column, and how they were come by.

    `images` and `patients` (None where unknown) count those of each split; `test_classes` counts the test
    images of each class; `left_out` those that could not be decoded. `origin` says where the splits come
    from, `context` where the features do.
    """

    label: str
    images: dict[str, int]
    patients: dict[str, int] | None
    test_classes: dict[str, int]
    origin: str
    seed: int
    neighbours: int
    draws: int
    left_out: int
    context: tuple[str, ...]
    rows: tuple[Row, ...]


def remarks(result: Result) -> list[str]:
    """What the reader of the table must know, a sentence each."""
    counts = ", ".join(
        f"{name} {n} images" + (f" of {result.patients[name]} patients" if result.patients else "")
        for name, n in result.images.items()
    )
    classes = ", ".join(f"{n} of class {name}" for name, n in result.test_classes.items())
    lines = [
        f"Splits: {counts} (test: {classes}); {result.origin}; seed {result.seed}.",
        "C and feature set (*) have the best AUC on the validation images; the fit is then repeated on "
        "training and validation images and scored once on the test images.",
        f"kNN: {result.neighbours} nearest by cosine. Probe: logistic regression on standardised features.",
        f"AP: average precision. ECE: expected calibration error, {CALIBRATION_BINS} equal bins of confidence.",
        f"[ ]: {INTERVAL}; {result.draws} draws.",
    ]
    lines += result.context
    if result.left_out:
        lines.append(f"{show_count(result.left_out, 'file')} left out: not there, or not to be decoded.")
    notes: dict[str, list[str]] = {}
    for row in result.rows:
        for note in row.test.notes:
            notes.setdefault(note, []).append(f"{row.encoder} {row.features} {row.method}")
    for note, where in notes.items():
        everywhere = len(where) == len(result.rows)
        lines.append(f"{note[0].upper()}{note[1:]} ({'all rows' if everywhere else ', '.join(where)}).")
    return lines


def print_result(result: Result, console: Console | None = None) -> None:
    """The table of one label, to the terminal."""
    table = Table(title=f"Test scores for {result.label}", title_justify="left", box=box.SIMPLE)
    for number, name in enumerate(_HEADER):
        table.add_column(Text(name), justify="left" if number < 2 else "right", no_wrap=True)
    before = ""
    for cells in _cells(result):
        if before and cells[0] != before:
            table.add_section()
        before = cells[0]
        # Text, as brackets would otherwise be read as markup.
        table.add_row(*(Text(cell) for cell in cells))
    # As wide as the table is: in a pipe, or a terminal of 80 columns, names and intervals would be cut.
    console = console or Console(width=max(Console().width, Console(width=1000).measure(table).maximum))
    console.print(table)
    for line in remarks(result):
        console.print(Text(line), soft_wrap=True)


def to_markdown(results: Sequence[Result]) -> str:
    """All tables as one Markdown document."""
    parts = ["# Evaluation\n"]
    for result in results:
        parts.append(f"## {_escape(result.label)}\n")
        rule = ["---", "---", *["---:"] * (len(_HEADER) - 2)]
        rows = [_HEADER, rule, *_cells(result)]
        parts += ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows] + [""]
        parts += [f"- {_escape(line)}" for line in remarks(result)] + [""]
    return "\n".join(parts)


def to_csv(results: Sequence[Result]) -> str:
    """One line a row of every result; an undefined score is an empty cell, its reason in the last column."""
    stream = io.StringIO()
    fields = ["label", "encoder", "features", "width", "method", "c", "validation_auc", "chosen"]
    fields += ["auc", "low", "high", "average_precision", "accuracy", "f1", "calibration_error"]
    fields += ["test_images", "seed", "notes"]
    writer = csv.DictWriter(stream, fields, lineterminator="\n")
    writer.writeheader()
    for result in results:
        for row in result.rows:
            record = asdict(row)
            record |= record.pop("test")
            record["notes"] = "; ".join(record["notes"])
            writer.writerow(
                {"label": result.label, "test_images": result.images["test"], "seed": result.seed, **record}
            )
    return stream.getvalue()


def to_json(results: Sequence[Result]) -> str:
    """Everything; an undefined score is null, its reason in the row's notes."""
    records = [{**asdict(result), "interval": INTERVAL, "remarks": remarks(result)} for result in results]
    return json.dumps(records, indent=2, allow_nan=False) + "\n"


def as_files(results: Sequence[Result]) -> dict[str, str]:
    """What the files evaluation.json, .csv and .md hold, by their names."""
    texts = {"json": to_json(results), "csv": to_csv(results), "md": to_markdown(results)}
    return {f"evaluation.{suffix}": text for suffix, text in texts.items()}


def _cells(result: Result) -> list[tuple[str, ...]]:
    """The table's lines: one a feature set, kNN and probe side by side."""
    by_key = {(row.encoder, row.features, row.method): row for row in result.rows}
    lines: list[tuple[str, ...]] = []
    for row in result.rows:
        if row.method != "knn":
            continue
        probe = by_key[row.encoder, row.features, "probe"]
        lines.append(
            (
                row.encoder,
                row.features,
                _auc_cell(row),
                _number(row.test.accuracy),
                _auc_cell(probe),
                _number(probe.test.average_precision),
                _number(probe.test.accuracy),
                _number(probe.test.f1),
                _number(probe.test.calibration_error),
                "undefined" if probe.c is None else f"{probe.c:g}",
            )
        )
    return lines


def _auc_cell(row: Row) -> str:
    low, high = row.test.low, row.test.high
    interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    return ("* " if row.chosen else "") + _number(row.test.auc) + interval


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("\n", " ")
