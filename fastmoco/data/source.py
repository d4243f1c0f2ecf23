"""The options that name a set of images, shared by the commands of `fastmoco data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastmoco.data.dali import dali_installed, require_dali
from fastmoco.data.manifest import Manifest, load_manifest


@dataclass(kw_only=True)
class Source:
    """What is known of a set of images, and how fast to look at it."""

    labels: Path | None = None
    """CSV file, manifest file or list of findings that lists the images (paths relative to the data folder) with
    labels, patient and split; without one, every image is used, with what its folders, the shards or the .npz file
    say."""
    label: tuple[str, ...] = ()
    """Label columns; if not given all, of a CSV file those of 2 to 1000 different values."""
    file_column: str = "file"
    """Name of the CSV column with the path of the image."""
    patient_column: str = "patient"
    """Name of the CSV column with the patient, if the file has one."""
    split_column: str = "split"
    """Name of the CSV column with the split, if the file has one."""
    workers: int = 0
    """Threads that read and decode; 0: one a core."""

    def manifest(self, data: Path, decoder: Literal["auto", "dali", "pillow"] = "auto") -> Manifest:
        """The images of `data`, checked as they are before training, by DALI too where it is told or installed.

        Raises UserError as `load_manifest` does, and where DALI is asked for and not installed.
        """
        if decoder == "dali":
            require_dali()
        if decoder == "auto":
            decoder = "dali" if dali_installed() else "pillow"
        return load_manifest(
            data,
            self.labels,
            label=self.label,
            file_column=self.file_column,
            patient_column=self.patient_column,
            split_column=self.split_column,
            all_labels=True,
            decoder=decoder,
            workers=self.workers,
        )
