"""A manifest as a CSV file: what was checked once is taken on trust wherever the file is given."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from fastmoco.atomic import replacing
from fastmoco.errors import UserError

if TYPE_CHECKING:
    from fastmoco.data.manifest import Manifest

COLUMNS = ("file", "height", "width", "bytes", "mtime_ns", "dali")
OFFSET = "offset"
PATIENT, SPLIT = "patient", "split"
# A manifest file of this name beside tar shards says what is in them.
SHARD_INDEX = "index.csv"
# One of this name in a run folder, which images it is trained on.
MANIFEST = "manifest.csv"
# What no label can be called in a file.
RESERVED = frozenset({*COLUMNS, OFFSET, PATIENT, SPLIT})
# A label column names classes; with more values than this it is something else.
MOST_CLASSES = 1000
# The least and the greatest number in a column; in others, any from 0. Times before 1970 are negative.
_RANGES = {"height": (1, 2**31 - 1), "width": (1, 2**31 - 1), "dali": (0, 1), "mtime_ns": (-(2**62), 2**63 - 1)}
# Rows held as text at once: so few that they stay in the processor's cache, need no memory beside what they become, and
# are gone before Python looks for cycles among them, which it does at every 700th object.
_CHUNK = 600


def require_columns(path: Path, columns: Sequence[str], *, patient_column: str, split_column: str) -> None:
    """Raise UserError where a patient or split column of another name than the usual is not among `columns`."""
    for option, name, usual in (
        ("--patient-column", patient_column, PATIENT),
        ("--split-column", split_column, SPLIT),
    ):
        if name != usual and name not in columns:
            raise UserError(
                f"{option} {name}: {path} has no such column; its columns are {', '.join(columns) or '(none)'}"
            )


def is_manifest_file(path: Path) -> bool:
    """Whether `path` begins with a manifest's columns."""
    try:
        with _opened(path) as stream:
            return tuple(next(csv.reader(stream), ())[: len(COLUMNS)]) == COLUMNS
    except (OSError, csv.Error):
        return False


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest` to the CSV file `path`, whole or not at all.

    Columns: file, height, width, bytes, mtime_ns, dali (0 or 1), offset for members of tar shards, then each label
    (as the class's name), patient and split. Raises UserError where a label's name is one of the others, and OSError.
    """
    if manifest.stamps is None:
        raise UserError(f"{path}: a manifest that was never checked cannot be written; load it from its files first")
    reserved = RESERVED & set(manifest.labels)
    if reserved:
        raise UserError(f"{path}: a label cannot be called {min(reserved)!r}, which is a column of every manifest file")
    columns: dict[str, Any] = {
        "file": manifest.files,
        "height": manifest.sizes[:, 0],
        "width": manifest.sizes[:, 1],
        "bytes": manifest.stamps[:, 0],
        "mtime_ns": manifest.stamps[:, 1],
        "dali": manifest.dali.astype(np.int8),
    }
    if manifest.offsets is not None:
        columns[OFFSET] = manifest.offsets
    columns |= {name: np.array(manifest.class_names[name])[values] for name, values in manifest.labels.items()}
    columns |= {PATIENT: manifest.patients} if manifest.patients is not None else {}
    columns |= {SPLIT: manifest.splits} if manifest.splits is not None else {}
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
    ):
        writer = csv.writer(_Lines(stream))
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


class _Lines:
    """Ends lines as text files do. A csv writer told to do so itself would leave a carriage return in a cell bare."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, row: str) -> int:
        """Write one row, which ends in "\\r\\n"."""
        return self._stream.write(row[:-2] + "\n")


def read_manifest_file(
    path: Path,
    *,
    label: Sequence[str] = (),
    patient_column: str = PATIENT,
    split_column: str = SPLIT,
) -> dict[str, Any]:
    """What `write_manifest` wrote, as the fields of a Manifest but for its root. Nothing but `path` is looked at.

    The label columns are `label`, or every other column that holds no more than 1000 different values; their cells may
    be empty. Raises UserError where `path` lacks a manifest's columns or one that is asked for, and naming the line of
    a row that is short, or holds something other than its column should.
    """
    try:
        with _opened(path) as stream:
            return _Reader(path, stream, label, patient_column, split_column).fields()
    except (OSError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from error


def _opened(path: Path) -> TextIO:
    return path.open(newline="", encoding="utf-8-sig", errors="surrogateescape")


class _Reader:
    """Reads the rows in chunks, each turned into numbers before the next is read."""

    def __init__(
        self,
        path: Path,
        stream: TextIO,
        label: Sequence[str],
        patient_column: str,
        split_column: str,
    ) -> None:
        self._path = path
        rows = csv.reader(stream)
        self._header = next(rows, [])
        if not set(COLUMNS) <= set(self._header):
            raise UserError(
                f"{path}: is no manifest file: its first line must have the columns {','.join(COLUMNS)}. Write it with "
                "`fastmoco data scan`; a spreadsheet must save it with commas"
            )
        # Blank lines are none.
        self._rows = filter(None, rows)
        self._done = 0
        for name in label:
            if name not in self._header:
                raise UserError(f"{path}: no column {name!r}; its columns are {', '.join(self._header)}")
        require_columns(path, self._header, patient_column=patient_column, split_column=split_column)
        self._words: dict[str, list[np.ndarray]] = {
            name: [] for name in (patient_column, split_column) if name in self._header
        }
        self._patient, self._split = patient_column, split_column
        other = [name for name in self._header if name not in {*COLUMNS, OFFSET, patient_column, split_column}]
        self._codes: dict[str, dict[str, int]] = {name: {} for name in (label or other)}
        self._asked = frozenset(label)

    def fields(self) -> dict[str, Any]:
        """The fields of a Manifest."""
        files: list[str] = []
        numbers: dict[str, list[np.ndarray]] = {name: [] for name in self._header if name in (*COLUMNS[1:], OFFSET)}
        labels: dict[str, list[np.ndarray]] = {name: [] for name in self._codes}
        for table in self._chunks():
            files += table["file"]
            if "\0" in "".join(table["file"]):
                at = next(i for i, name in enumerate(table["file"]) if "\0" in name)
                raise self._wrong(at, "no file's name can hold a NUL byte")
            for name, parts in numbers.items():
                parts.append(self._numbers(name, table[name]))
            for name in list(self._codes):
                labels[name].append(self._coded(name, table[name]))
            for name, words in self._words.items():
                words.append(np.array(table[name]))
            self._done += len(table["file"])
        if not files:
            raise UserError(f"{self._path}: has a header and no rows")
        if len(set(files)) < len(files):
            raise UserError(f"{self._path}: lists a file more than once; give each image one row")
        whole = {name: np.concatenate(parts) for name, parts in numbers.items()}
        said = {name: np.concatenate(parts) for name, parts in self._words.items()}
        encoded = {name: sort_classes(np.concatenate(labels[name]), list(codes)) for name, codes in self._codes.items()}
        return {
            "files": files,
            "sizes": np.stack([whole["height"], whole["width"]], axis=1).astype(np.int32),
            "stamps": np.stack([whole["bytes"], whole["mtime_ns"]], axis=1),
            "dali": whole["dali"] != 0,
            "offsets": whole.get(OFFSET),
            "labels": {name: values for name, (values, _) in encoded.items()},
            "class_names": {name: names for name, (_, names) in encoded.items()},
            "patients": said.get(self._patient),
            "splits": said.get(self._split),
        }

    def _chunks(self) -> Iterator[dict[str, tuple[str, ...]]]:
        width = len(self._header)
        while rows := list(islice(self._rows, _CHUNK)):
            if set(map(len, rows)) != {width}:
                at = next(i for i, row in enumerate(rows) if len(row) != width)
                raise self._wrong(at, f"{len(rows[at])} cells, not {width}")
            yield dict(zip(self._header, zip(*rows, strict=True), strict=True))

    def _wrong(self, at: int, what: str) -> UserError:
        """What to say of row `at` of this chunk. Lines are counted only now, since that would slow every reading."""
        with _opened(self._path) as stream:
            rows = csv.reader(stream)
            left, line = self._done + at + 1, 0
            for row in rows:
                # Counted from the header, which is a row too.
                if row and left == 0:
                    break
                left -= bool(row)
                line = rows.line_num
        return UserError(f"{self._path}, line {line + 1}: {what}")

    def _numbers(self, name: str, cells: tuple[str, ...]) -> np.ndarray:
        """(n,) int64. Raises UserError where a cell is out of its column's range."""
        try:
            values = np.fromiter(map(int, cells), np.int64, len(cells))
        except (ValueError, OverflowError):
            at = next(i for i, cell in enumerate(cells) if not _fits(cell))
        else:
            least, most = _RANGES.get(name, (0, 2**63 - 1))
            wrong = (values < least) | (values > most)
            if not wrong.any():
                return values
            at = int(np.argmax(wrong))
        raise self._wrong(at, f"{name} cannot be {cells[at]!r}")

    def _coded(self, name: str, cells: tuple[str, ...]) -> np.ndarray:
        codes = self._codes[name]
        for cell in dict.fromkeys(cells):
            codes.setdefault(cell, len(codes))
        if len(codes) > MOST_CLASSES:
            if name in self._asked:
                raise too_many_classes(name, len(codes))
            del self._codes[name]
        return np.array([codes[cell] for cell in cells], dtype=np.int64)


def _fits(cell: str) -> bool:
    """Whether `cell` is a whole number of 64 bits."""
    try:
        return -(2**63) <= int(cell) < 2**63
    except ValueError:
        return False


def sort_classes(numbers: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Class numbers (n,) int64, and the names in an order of their own: numeric names as numbers, then words."""
    order = sorted(range(len(names)), key=lambda i: (*_sort_key(names[i]), names[i]))
    rank = np.empty(len(names), dtype=np.int64)
    rank[order] = np.arange(len(names))
    return rank[numbers], [names[i] for i in order]


def _sort_key(text: str) -> tuple[int, float]:
    try:
        value = float(text)
    except ValueError:
        return 1, 0.0
    return (0, value) if math.isfinite(value) else (1, 0.0)


def too_many_classes(name: str, count: int) -> UserError:
    """What to say of a label column with `count` different values."""
    return UserError(f"--label {name}: {count} different values; a label column names classes, not quantities")
