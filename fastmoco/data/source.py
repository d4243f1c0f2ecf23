"""The options that name a set of images, shared by the commands of `fastmoco data`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fastmoco.data.dali import dali_installed, require_dali
from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.errors import UserError


@dataclass(kw_only=True)
class Source:
    """What is known of a set of images, and how fast to look at it."""

    path: tyro.conf.Positional[Path | None] = None
    """The images, as --data names them."""
    data: Path | None = None
    """Folder of images, sub-folders included; folder of tar shards, or one; or .npz file as MedMNIST's. May be given
    without --data, as PATH."""
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

    def images(self) -> Path:
        """Where the images are. Raises UserError where that is not said, or said twice."""
        if self.path is not None and self.data is not None:
            raise UserError(f"--data {self.data}: {self.path} is named as well; name the images once")
        found = self.path or self.data
        if found is None:
            raise UserError("name the folder of images: as PATH, or with --data PATH")
        return found

    def threads(self) -> int:
        """`workers`, or as many as there are cores. Raises UserError where they are fewer than none."""
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: give a number of threads, or 0 for one a core")
        return self.workers or os.cpu_count() or 1

    def manifest(self, decoder: Literal["auto", "dali", "pillow"] = "auto") -> Manifest:
        """The images, checked as they are before training, by DALI too where it is told or installed.

        Raises UserError as `load_manifest`, `images` and `threads` do, and where DALI is asked for and not installed.
        """
        data, threads = self.images(), self.threads()
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
            workers=threads,
        )
