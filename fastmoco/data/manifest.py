"""The list of a data set's images with what is known of each: size, labels, patient, split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fastmoco.data.decode import decode
from fastmoco.data.listing import Listing, list_folder, list_table
from fastmoco.data.manifest_file import (
    MOST_CLASSES,
    RESERVED,
    SHARD_INDEX,
    is_manifest_file,
    read_manifest_file,
    require_columns,
    sort_classes,
    too_many_classes,
)
from fastmoco.data.npz import list_arrays
from fastmoco.data.shards import find_shards, list_shards, require_shards
from fastmoco.data.store import BadFile, Store, open_store
from fastmoco.data.undecodable import Undecodable
from fastmoco.data.verify import Skipped, verify
from fastmoco.errors import UserError


@dataclass(kw_only=True)
class Manifest:
    """`n` decodable images under `root`: a folder of files or of tar shards, or an .npz file.

    `sizes` is (n, 2) int32, height and width in pixels after EXIF rotation. `stamps` is (n, 2) int64, the bytes and
    the modification time (ns; 0: not known) of each file when it was checked, or None: then reading checks neither.
    `dali` is (n,) bool: whether DALI decodes the file to what `decode` returns; all True where it is not given.
    `offsets` is (n,) int64, where each member of a tar shard begins in it, and None where the files lie by
    themselves. `labels` maps a column's name to (n,) int64 class numbers, and `class_names` says what each number
    was called, "" where its cell was empty. `patients` and `splits` are (n,) arrays of strings, or None where the data
    do not say. `skipped` lists the files that were left out, and why.
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

    def classes(self, label: str) -> np.ndarray:
        """(n,) int64: the class of every image by column `label` among those with a name, in their order; -1 where its
        cell is empty."""
        names, numbers = self.class_names[label], self.labels[label]
        if "" not in names:
            return numbers
        empty = names.index("")
        return np.where(numbers == empty, -1, numbers - (numbers > empty))

    def known_classes(self, label: str) -> list[str]:
        """What the numbers of `classes` are called."""
        return [name for name in self.class_names[label] if name]

    def only_split(self, split: str) -> Manifest:
        """The images whose split column says `split`. Raises UserError where there are none."""
        if self.splits is None:
            raise UserError(f"--split {split}: the data have no split column; leave --split out")
        mask = self.splits == split
        if not mask.any():
            known = ", ".join(sorted(set(self.splits.tolist())))
            raise UserError(f"--split {split}: no image is in it; the splits are {known}")
        return self.select(mask)


def refuse_inside(path: Path, option: str, manifest: Manifest) -> None:
    """Raise UserError where `path`, which `option` names, lies among the images, whose next listing would hold its
    pictures."""
    listed = manifest.offsets is None and manifest.root.is_dir()
    if listed and path.resolve().is_relative_to(manifest.root.resolve()):
        raise UserError(f"{option} {path} lies inside --data {manifest.root}, so its pictures would count as images")


def trusted_list(data: Path, labels: Path | None = None) -> Path | None:
    """The manifest file that is taken on trust for these: `labels`, or the index.csv of a folder of shards; or None."""
    if labels is None and find_shards(data) in ([], [data]):
        return None
    written = labels or data / SHARD_INDEX
    return written if is_manifest_file(written) else None


def load_manifest(
    data: Path,
    labels: Path | None = None,
    *,
    label: Sequence[str] = (),
    file_column: str = "file",
    patient_column: str = "patient",
    split_column: str = "split",
    all_labels: bool = False,
    decoder: str = "pillow",
    workers: int = 0,
    progress: bool = True,
) -> Manifest:
    """List the images of `data` and check that they decode.

    `data` is a folder of images, an .npz file in MedMNIST's layout, or tar shards: one, or a folder of them. What
    these say of labels, patients and splits is taken (see `list_folder`, `list_arrays`, `list_shards`), unless the
    file `labels` lists images below folder `data` and says it: a CSV file or a list of findings (see `list_table`).
    If `labels` is a manifest file, or an index.csv beside the shards is one (see `trusted_list`), it is trusted, and
    nothing is opened; only the lengths of shards are looked at.
    `label` chooses among the label columns; of CSV files it names them, and where it is empty none are taken, or with
    `all_labels` every column that holds 2 to 1000 different values. Where a cell of theirs is empty, the
    class of that image is not known (see `Manifest.classes`).

    `decoder` is "pillow", or "dali" to find out which files DALI may decode; images that do not decode on the host
    and listed files that are not there are left out, and are in `skipped`. `workers` threads check them; 0: one a core.

    Raises UserError for a missing folder, an empty one, a missing column, a listed shard that is missing or too short,
    or where none of the listed files is there.
    """
    try:
        there = data.exists()
    except OSError as error:
        raise UserError(f"--data {data}: cannot be read: {error.strerror or error}") from error
    if not there:
        kind = "file" if data.suffix.lower() in (".npz", ".tar") else "folder"
        raise UserError(f"--data {data}: no such {kind}")
    shards = find_shards(data)
    written = trusted_list(data, labels)
    if written is not None:
        root = data.parent if shards == [data] else data
        fields = read_manifest_file(written, label=label, patient_column=patient_column, split_column=split_column)
        if fields["offsets"] is not None:
            require_shards(root, fields["files"], (fields["offsets"] + fields["stamps"][:, 0]).tolist(), written)
        return _without_constants(Manifest(root=root, **fields), label)
    if shards and labels is None:
        listing = list_shards(shards, patient_column=patient_column, split_column=split_column, progress=progress)
    elif data.is_dir() and labels is not None:
        listing = list_table(
            data,
            labels,
            label=label,
            file_column=file_column,
            patient_column=patient_column,
            split_column=split_column,
            all_labels=all_labels,
        )
    elif data.is_dir():
        require_columns(data, (), patient_column=patient_column, split_column=split_column)
        listing = list_folder(data)
    elif data.suffix.lower() == ".npz" and labels is None:
        require_columns(data, (), patient_column=patient_column, split_column=split_column)
        listing = list_arrays(data)
    elif labels is not None:
        raise UserError(f"--labels {labels}: {data} brings its own labels; leave --labels out, or give a manifest file")
    else:
        raise UserError(f"--data {data}: not a folder, nor an .npz or .tar file")
    return _checked(listing, data, label, decoder, workers, progress)


def _checked(
    listing: Listing, data: Path, label: Sequence[str], decoder: str, workers: int, progress: bool
) -> Manifest:
    for name in label:
        if name not in listing.columns:
            known = ", ".join(listing.columns)
            hint = f"there are {known}" if known else "name the CSV file that has this column with --labels"
            raise UserError(f"--label {name}: {data} has no such label; {hint}")
    reserved = () if label else sorted(RESERVED & set(listing.columns))
    if reserved:
        names, taken = ", ".join(reserved), "a label" if len(reserved) == 1 else "labels"
        print(f"{data}: {names} not taken as {taken}, as an index of images has columns so named (--label takes one)")
    columns = {name: listing.columns[name] for name in label or listing.columns if name not in reserved}
    encoded = {name: _encode(name, values) for name, values in columns.items() if name in label or _is_label(values)}
    checked = verify(listing, decoder=decoder, workers=workers, progress=progress)
    everything = Manifest(
        root=listing.root,
        files=listing.files,
        sizes=checked.sizes,
        stamps=checked.stamps,
        dali=checked.dali,
        offsets=listing.offsets,
        labels={name: numbers for name, (numbers, _) in encoded.items()},
        class_names={name: names for name, (_, names) in encoded.items()},
        patients=None if listing.patients is None else np.array(listing.patients),
        splits=None if listing.splits is None else np.array(listing.splits),
        skipped=checked.skipped,
    )
    decodable = checked.sizes[:, 0] > 0
    if not decodable.any():
        raise UserError(
            f"--data {data}: none of the {len(decodable)} files can be decoded; first: {checked.skipped[0]}"
        )
    return _without_constants(everything, label).select(decodable)


def _without_constants(manifest: Manifest, label: Sequence[str]) -> Manifest:
    """`manifest` without label columns of one value; UserError where such a one is in `label`."""
    constant = {name for name, names in manifest.class_names.items() if len(names) < 2}
    for name in label:
        if name in constant:
            raise UserError(f"--label {name}: every image has the same value, so there is nothing to tell apart")
    return replace(
        manifest,
        labels={name: values for name, values in manifest.labels.items() if name not in constant},
        class_names={name: names for name, names in manifest.class_names.items() if name not in constant},
    )


def _is_label(values: Sequence[str]) -> bool:
    return len(set(values)) <= MOST_CLASSES


def _encode(name: str, values: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Class numbers (n,) int64 and the sorted names."""
    number = {text: i for i, text in enumerate(dict.fromkeys(values))}
    if len(number) > MOST_CLASSES:
        raise too_many_classes(name, len(number))
    return sort_classes(np.array([number[text] for text in values], dtype=np.int64), list(number))
