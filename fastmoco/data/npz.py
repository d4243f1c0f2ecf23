"""Images in one .npz file, laid out as MedMNIST is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.data.listing import Listing
from fastmoco.errors import UserError

_SPLITS = ("train", "val", "test")


def list_arrays(path: Path) -> Listing:
    """The images of the arrays `{train,val,test}_images` in `path`, with their splits and labels.

    Images are (n, H, W) or (n, H, W, 3), uint8 or uint16; `{split}_labels` are (n,) or (n, 1), the label "label", or
    (n, k), labels "label_0" to "label_<k - 1>". Names are "train/000012". Raises UserError for anything else.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            splits = [split for split in _SPLITS if f"{split}_images" in arrays]
            if not splits:
                raise UserError(f"--data {path}: none of train_images, val_images, test_images is in it")
            images = {split: _shape(path, f"{split}_images", arrays) for split in splits}
            labels = {split: arrays[f"{split}_labels"] for split in splits if f"{split}_labels" in arrays}
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy raise nearly anything on damaged files
        raise UserError(f"--data {path}: cannot be read as .npz: {error}") from error
    files = [f"{split}/{i:06d}" for split in splits for i in range(images[split][0])]
    found = path.stat()
    return Listing(
        root=path,
        files=files,
        columns=_columns(path, images, labels),
        splits=[name.partition("/")[0] for name in files],
        stamps=np.tile(np.array([[found.st_size, found.st_mtime_ns]], dtype=np.int64), (len(files), 1)),
        sizes=np.concatenate([np.tile(np.array([shape[1:3]], np.int32), (shape[0], 1)) for shape in images.values()]),
    )


def _shape(path: Path, key: str, arrays: Any) -> tuple[int, ...]:
    array = arrays[key]
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (3, 4) or array.shape[3:] not in ((), (1,), (3,)):
        raise UserError(
            f"--data {path}: {key} is {array.dtype} of shape {array.shape}; images must be uint8 or uint16, (n, H, W) "
            "or (n, H, W, 3)"
        )
    return tuple(array.shape)


def _columns(path: Path, images: dict[str, tuple[int, ...]], labels: dict[str, np.ndarray]) -> dict[str, Sequence[str]]:
    """The label columns over all images; none unless every split has them."""
    if set(labels) != set(images):
        return {}
    tables = {split: values.reshape(len(values), -1) if values.size else values for split, values in labels.items()}
    for split, table in tables.items():
        if len(table) != images[split][0] or table.ndim != 2:
            raise UserError(f"--data {path}: {split}_labels has {len(table)} rows for {images[split][0]} images")
    widths = {table.shape[1] for table in tables.values()}
    if len(widths) > 1:
        raise UserError(f"--data {path}: the labels of the splits have different numbers of columns")
    (width,) = widths
    whole = np.concatenate(list(tables.values()))
    return {
        "label" if width == 1 else f"label_{i}": [str(value) for value in whole[:, i].tolist()] for i in range(width)
    }
