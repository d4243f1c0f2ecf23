"""What images there are and what is said of them, before any is opened: folders, CSV files, lists of findings."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.data.decode import IMAGE_SUFFIXES
from fastmoco.data.manifest_file import (
    MOST_CLASSES,
    SHARD_INDEX,
    is_manifest_file,
    read_manifest_file,
    require_columns,
)
from fastmoco.errors import UserError

FOLDER_LABEL = "folder"
CLASS_LABEL = "class"
# The columns of a list without a header, in the order in which ChestX-ray14 was published.
FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
_SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
# patient/class/..._class1.png, as the IDC histology patches are laid out.
_PATCH = re.compile(r"(?:.*/)?(?P<patient>[^/]+)/(?P<folder>[^/]+)/[^/]*_class(?P=folder)\.\w+")
# 00000231_013.png: patient and follow-up number, as in ChestX-ray14.
_XRAY = re.compile(r"(?:.*/)?(?P<patient>\d{8})_\d{3}\.\w+")


@dataclass(kw_only=True)
class Listing:
    """`n` images by name and what is said of them, each in the order of `files`.

    `columns` maps the name of a label to the n values as text. `root`, `files` and `offsets` are a Manifest's.
    `stamps` (n, 2) int64 and `sizes` (n, 2) int32 are given where they are known without opening an image.
    """

    root: Path
    files: list[str]
    columns: dict[str, Sequence[str]] = field(default_factory=dict)
    patients: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    offsets: np.ndarray | None = None
    stamps: np.ndarray | None = None
    sizes: np.ndarray | None = None


def list_folder(data: Path) -> Listing:
    """All image files below folder `data`, sorted, with what their folders say.

    Folders train, test and val above class folders give splits. `patient/class/name_class.png` gives patients and
    labels "class"; otherwise the first folder of each path (below a split's) is its label "folder", unless some
    image lies outside every folder. Raises UserError where there are no images.
    """
    files = _walk(data)
    if not files:
        index = data / SHARD_INDEX
        if is_manifest_file(index):
            first = read_manifest_file(index)["files"][0]
            raise UserError(
                f"--data {data}: nothing that its {SHARD_INDEX} lists is there, first {first}; restore it, or copy the "
                "folder again"
            )
        arrays = sorted(data.glob("*.npz"))
        if arrays:
            raise UserError(f"--data {data}: no images in it; an .npz file is given by itself: --data {arrays[0]}")
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"--data {data}: no images in it (looked for {kinds}, sub-folders included)")
    return Listing(root=data, files=files, **said_by_folders(files))


def said_by_folders(files: Sequence[str]) -> dict[str, Any]:
    """The fields `columns`, `patients` and `splits` of a Listing, as far as the paths `files` tell."""
    said: dict[str, Any] = {}
    parts = [name.split("/") for name in files]
    firsts = {part[0] for part in parts}
    if {"train"} < firsts <= set(_SPLIT_FOLDERS) and all(len(part) > 2 for part in parts):
        said["splits"] = [_SPLIT_FOLDERS[part[0]] for part in parts]
        parts = [part[1:] for part in parts]
    patches = [_PATCH.fullmatch(name) for name in files]
    if all(patches):
        said["patients"] = [match["patient"] for match in patches if match]
        said["columns"] = {CLASS_LABEL: [match["folder"] for match in patches if match]}
    elif all(len(part) > 1 for part in parts):
        said["columns"] = {FOLDER_LABEL: [part[0] for part in parts]}
    return said


def list_table(
    data: Path,
    path: Path,
    *,
    label: Sequence[str],
    file_column: str,
    patient_column: str,
    split_column: str,
    all_labels: bool = False,
) -> Listing:
    """The images below `data` that the file `path` lists: CSV with a header, or lines "name 0 0 1 ..." without one.

    Of a CSV, the columns `label` are taken, or with `all_labels` and no `label` every other column that holds 2 to 1000
    different values, as those of a list without a header are; `file_column` has the paths, and `patient_column` and
    `split_column` are used where they are there; only under their usual names, "patient" and "split", may they be
    missing. Cells of the columns of labels may be empty. A line without a header has 14 numbers, 0 or 1,
    for the FINDINGS; the patient is taken from names such as 00000231_013.png.

    Files that are not there stay in the listing: reading them says so. Raises UserError for a missing or empty column,
    a file listed twice, or where no listed file is there.
    """
    lines = _findings(path)
    if lines is not None:
        require_columns(path, (), patient_column=patient_column, split_column=split_column)
        files = [line[0] for line in lines]
        columns: dict[str, Sequence[str]] = {
            name: [line[i] for line in lines] for i, name in enumerate(FINDINGS, start=1)
        }
        xrays = [_XRAY.fullmatch(name) for name in files]
        patients = [match["patient"] for match in xrays if match] if all(xrays) else None
        listing = Listing(root=data, files=files, columns=columns, patients=patients)
    else:
        said = (patient_column, split_column)
        table = _read_csv(
            path,
            required=(file_column, *label),
            optional=said,
            others=all_labels and not label,
        )
        taken = label or [
            name
            for name, cells in table.items()
            if name not in (file_column, *said) and 2 <= len(set(cells)) <= MOST_CLASSES
        ]
        listing = Listing(
            root=data,
            files=table[file_column],
            columns={name: table[name] for name in taken},
            patients=table.get(patient_column),
            splits=table.get(split_column),
        )
    _refuse_repeated(path, listing.files)
    if not any(os.path.isfile(os.path.join(data, name)) for name in listing.files):
        first = listing.files[0]
        raise UserError(
            f"{path}: none of its {len(listing.files):,} files is under {data}, first {first!r}; "
            f"names must be paths relative to --data{_unlike(data, first)}"
        )
    return listing


def _unlike(data: Path, name: str) -> str:
    """What to add where `name` is in folder `data` but for its suffix, or in a folder of it, or was packed."""
    for suffix in sorted(IMAGE_SUFFIXES):
        for end in (suffix, suffix.upper()):
            if os.path.isfile(os.path.join(data, name + end)):
                return f", with their suffix: {name + end} is there"
    if (data / SHARD_INDEX).is_file():
        return f", and it holds packed images, whose labels are in its {SHARD_INDEX}: pack them again with --labels"
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        if os.path.isfile(folder / name):
            return f": it is in {folder}"
    return ""


def _refuse_repeated(path: Path, files: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(os.path.normpath(name) for name in files).items() if count > 1]
    if repeated:
        raise UserError(
            f"{path}: {len(repeated)} files are listed more than once, the first is {repeated[0]!r}; give each "
            "image one row, or the same picture may be trained on and tested"
        )


def _walk(folder: Path) -> list[str]:
    """Relative paths of the image files below `folder`, sorted, so that the order is the same everywhere."""
    found: list[str] = []
    visited: set[str] = set()

    def refuse(error: OSError) -> None:
        raise UserError(f"--data {folder}: {error.filename} cannot be listed: {error.strerror}") from error

    for base, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        # Links may lead in circles.
        if (real := os.path.realpath(base)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(base).relative_to(folder).as_posix()
        prefix = "" if here == "." else here + "/"
        found += [prefix + name for name in names if not name.startswith(".") and _is_image(base, name)]
    return sorted(found)


def _is_image(folder: str, name: str) -> bool:
    """By its suffix; a file without one may be DICOM, which its first bytes tell."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    # Numbers count as no suffix: DICOM files are often named by their UID.
    if suffix and not suffix[1:].isdecimal():
        return False
    path = os.path.join(folder, name)
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _findings(path: Path) -> list[list[str]] | None:
    """The fields of every line of a list without a header; None where `path` is no such list."""

    def fits(line: list[str]) -> bool:
        return len(line) == 1 + len(FINDINGS) and set(line[1:]) <= {"0", "1"}

    lines: list[list[str]] = []
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, text in enumerate(stream, start=1):
                if not text.strip():
                    continue
                line = re.split(r"[\s,]+", text.strip())
                if not fits(line):
                    if not lines:
                        return None
                    raise UserError(f"{path}, line {number}: not a name and {len(FINDINGS)} numbers, each 0 or 1")
                lines.append(line)
    except (OSError, UnicodeDecodeError):
        return None
    return lines or None


def _separator(header: Sequence[str], name: str) -> str | None:
    """What separates the columns, other than a comma, if that makes `name` one of them."""
    line = ",".join(header)
    return next((each for each in ";\t|" if name in (cell.strip(' "') for cell in line.split(each))), None)


def _read_csv(path: Path, *, required: Sequence[str], optional: Sequence[str], others: bool) -> dict[str, list[str]]:
    """The cells of the columns `required`, the first of which may have no empty ones, of those in `optional` that there
    are, and of `others`, which are all that have a name.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            header = next(reader, [])
            for name in required:
                if name not in header:
                    other = _separator(header, name)
                    if other is not None:
                        raise UserError(
                            f"--labels {path}: its columns are separated by {other!r}; save it with commas between them"
                        )
                    raise UserError(f"{path}: no column {name!r}; its columns are {', '.join(header) or '(none)'}")
            require_columns(path, header, patient_column=optional[0], split_column=optional[1])
            more = filter(None, header) if others else ()
            places = {name: header.index(name) for name in (*required, *optional, *more) if name in header}
            table: dict[str, list[str]] = {name: [] for name in places}
            for row in reader:
                if not row:
                    continue
                for name, place in places.items():
                    cell = row[place] if place < len(row) else ""
                    if not cell and name == required[0]:
                        raise UserError(
                            f"{path}, line {reader.line_num}: column {name!r} is empty; fill it in, or leave the row "
                            "out"
                        )
                    table[name].append(cell)
    except FileNotFoundError:
        raise UserError(f"--labels {path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"--labels {path}: a folder; name the file in it that lists the images") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {path}: cannot be read as CSV: {error}") from error
    if not all(table.values()):
        raise UserError(f"{path}: has a header and no rows")
    return table
