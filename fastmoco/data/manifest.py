"""The list of a data set's images with what is known of each: size, labels, patient, split."""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fastmoco.data.decode import IMAGE_SUFFIXES, decode
from fastmoco.data.store import BadFile, Store, open_store
from fastmoco.data.undecodable import Undecodable
from fastmoco.data.verify import Skipped, verify_files
from fastmoco.errors import UserError

FOLDER_LABEL = "folder"


@dataclass(kw_only=True)
class Manifest:
    """`n` decodable images under `root`: a folder of files or of tar shards, or an .npz file.

    `sizes` is (n, 2) int32, height and width in pixels after EXIF rotation. `stamps` is (n, 2) int64, the bytes and
    the modification time (ns; 0: not known) of each file when it was checked, or None: then reading checks neither.
    `dali` is (n,) bool: whether DALI decodes the file to what `decode` returns; all True where it is not given.
    `offsets` is (n,) int64, where each member of a tar shard begins in it, and None where the files lie by
    themselves. `labels` maps a column's name to (n,) int64 class numbers, and `class_names` says what each number
    was called. `patients` and `splits` are (n,) arrays of strings, or None where the data do not say. `skipped`
    lists the files that were left out, and why.
    """

    root: Path
    files: list[str]
    sizes: np.ndarray
    stamps: np.ndarray | None = None
    dali: np.ndarray = None  # type: ignore[assignment]  # never None once made
    offsets: np.ndarray | None = None
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    class_names: dict[str, list[str]] = field(default_factory=dict)
    patients: np.ndarray | None = None
    splits: np.ndarray | None = None
    skipped: list[Skipped] = field(default_factory=list)
    _store: Store = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dali is None:
            self.dali = np.ones(len(self.files), dtype=bool)
        self._store = open_store(self.root, self.offsets)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """Where image `index` lies; of a shard's member, the shard's path and the member's name in it."""
        return self.root / self.files[index]

    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded bytes of image `index`, or its pixels (H, W, 3) uint8 or uint16 where they are not encoded.

        Raises BadFile where it is missing, unreadable, or neither as long nor as old as when it was checked. Safe
        to call from several threads, as `decode_bytes` and `decode` are.
        """
        stamp = None if self.stamps is None else (int(self.stamps[index, 0]), int(self.stamps[index, 1]))
        offset = None if self.offsets is None else int(self.offsets[index])
        return self._store.read(self.files[index], stamp, offset)

    def decode_bytes(self, index: int, data: bytes | np.ndarray) -> np.ndarray:
        """What `read` returned for image `index` as (H, W, 3), uint8 or uint16.

        Raises BadFile where it does not decode, or to another size than when it was checked.
        """
        path = str(self.path(index))
        try:
            image = decode(data, path) if isinstance(data, bytes) else data
        except Undecodable as error:
            raise BadFile(path, f"cannot be decoded ({error}); was it changed since it was checked?") from error
        if image.shape[:2] != tuple(self.sizes[index]):
            raise BadFile(path, "its size is not what it was when it was checked; start again")
        return image

    def decode(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, 3), uint8 or uint16. Raises BadFile as `read` and `decode_bytes` do."""
        return self.decode_bytes(index, self.read(index))

    def select(self, chosen: np.ndarray) -> Manifest:
        """The manifest of some of the images, given as a mask or as indices."""
        indices = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        some = replace(
            self,
            files=[self.files[i] for i in indices],
            sizes=self.sizes[indices],
            stamps=None if self.stamps is None else self.stamps[indices],
            dali=self.dali[indices],
            offsets=None if self.offsets is None else self.offsets[indices],
            labels={name: values[indices] for name, values in self.labels.items()},
            patients=None if self.patients is None else self.patients[indices],
            splits=None if self.splits is None else self.splits[indices],
        )
        # What was opened or loaded serves the selection too.
        some._store = self._store
        return some

    def only_split(self, split: str) -> Manifest:
        """The images whose split column says `split`. Raises UserError where there are none."""
        if self.splits is None:
            raise UserError(f"--split {split}: the data have no split column; leave --split out")
        mask = self.splits == split
        if not mask.any():
            known = ", ".join(sorted(set(self.splits.tolist())))
            raise UserError(f"--split {split}: no image is in it; the splits are {known}")
        return self.select(mask)


def load_manifest(
    data: Path,
    labels: Path | None = None,
    *,
    label: Sequence[str] = (),
    file_column: str = "file",
    patient_column: str = "patient",
    split_column: str = "split",
    decoder: str = "pillow",
    workers: int = 0,
    progress: bool = True,
) -> Manifest:
    """List the images of folder `data`, labelled by its class folders or by the CSV file `labels`.

    The CSV's `file_column` holds paths relative to `data`; each name in `label` becomes a label column;
    `patient_column` and `split_column` are used where the file has them. Without a CSV, images in sub-folders are
    labelled by the first folder of their path, under the name "folder", unless some lie outside every sub-folder.
    Files that `decoder` cannot decode are left out and listed in `skipped`.

    Raises UserError for a missing folder, an empty one, a missing column, or a listed file that is not there.
    """
    if not data.is_dir():
        raise UserError(f"--data {data}: not a folder" if data.exists() else f"--data {data}: no such folder")
    columns: dict[str, list[str]] = {}
    if labels is None:
        if label and tuple(label) != (FOLDER_LABEL,):
            raise UserError(f"--label {' '.join(label)}: name the CSV file that has this column with --labels")
        files = _scan(data)
        if not files:
            kinds = " ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"--data {data}: no images in it (looked for {kinds}, sub-folders included)")
        if all("/" in name for name in files):
            columns[FOLDER_LABEL] = [name.split("/", 1)[0] for name in files]
        patients = splits = None
    else:
        table = _read_csv(labels, required=(file_column, *label))
        files = table[file_column]
        columns = {name: table[name] for name in label}
        patients = table.get(patient_column)
        splits = table.get(split_column)
        repeated = [name for name, count in Counter(os.path.normpath(name) for name in files).items() if count > 1]
        if repeated:
            raise UserError(
                f"{labels}: {len(repeated)} files are listed more than once, the first is {repeated[0]!r}; give each "
                "image one row, or the same picture may be trained on and tested"
            )
        absent = [name for name in files if not (data / name).is_file()]
        if absent:
            raise UserError(
                f"{labels}: {len(absent)} of its {len(files)} files are not under {data}, the first is {absent[0]!r}; "
                f"column {file_column!r} must hold paths relative to --data"
            )
    checked, skipped = verify_files(data, files, decoder=decoder, workers=workers, progress=progress)
    encoded = {name: _encode(name, values) for name, values in columns.items()}
    everything = Manifest(
        root=data,
        files=files,
        sizes=checked.sizes,
        stamps=checked.stamps,
        dali=checked.dali,
        labels={name: numbers for name, (numbers, _) in encoded.items() if len(encoded[name][1]) > 1},
        class_names={name: names for name, (_, names) in encoded.items() if len(names) > 1},
        patients=None if patients is None else np.array(patients),
        splits=None if splits is None else np.array(splits),
        skipped=skipped,
    )
    constant = [name for name in label if name not in everything.labels]
    if constant:
        raise UserError(f"--label {constant[0]}: every image has the same value, so there is nothing to tell apart")
    decodable = checked.sizes[:, 0] > 0
    if not decodable.any():
        raise UserError(f"--data {data}: none of the {len(files)} files can be decoded; first: {skipped[0]}")
    return everything.select(decodable)


def _scan(folder: Path) -> list[str]:
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
        found += [
            prefix + name
            for name in names
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def _read_csv(path: Path, *, required: Sequence[str]) -> dict[str, list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
            header = list(reader.fieldnames or ())
    except FileNotFoundError:
        raise UserError(f"--labels {path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--labels {path}: cannot be read as CSV: {error}") from error
    for name in required:
        if name not in header:
            raise UserError(f"{path}: no column {name!r}; its columns are {', '.join(header) or '(none)'}")
    if not rows:
        raise UserError(f"{path}: has a header and no rows")
    # DictReader gives None for the cells that a short line lacks; line 1 is the header.
    for number, row in enumerate(rows, start=2):
        for name in required:
            if row[name] is None or row[name] == "":
                raise UserError(f"{path}, line {number}: column {name!r} is empty")
    return {name: [row[name] or "" for row in rows] for name in header}


def _encode(name: str, values: list[str]) -> tuple[np.ndarray, list[str]]:
    """Class numbers in the sorted order of the names; numeric names sort as numbers."""
    names = sorted(set(values), key=lambda text: (0, float(text), text) if _is_number(text) else (1, 0.0, text))
    if len(names) > 1000:
        raise UserError(f"--label {name}: {len(names)} different values; a label column names classes, not quantities")
    number = {text: i for i, text in enumerate(names)}
    return np.array([number[text] for text in values], dtype=np.int64), names


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
