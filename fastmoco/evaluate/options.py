"""The options that the commands on labelled images share: which images, at what size, on what device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fastmoco.data.manifest import Manifest, load_manifest
from fastmoco.data.verify import describe_skipped
from fastmoco.errors import UserError
from fastmoco.models.encoder import Encoder
from fastmoco.models.weights import weights_file

_LEAST = {"size": 1, "batch_size": 1, "workers": 0, "seed": 0, "draws": 1, "resize": 1}


@dataclass(kw_only=True, slots=True)
class LabelledImages:
    """Which images, with what labels, and what looks at them."""

    data: Path
    """Folder of images or of tar shards, or .npz file as MedMNIST's."""
    labels: Path | None = None
    """CSV file, manifest file or list of findings that lists the images (paths relative to the data folder) with
    labels and, where known, patient and split; without one, each image's class is its sub-folder, or what the shards
    or the .npz file say."""
    label: tuple[str, ...] = ()
    """Label columns, each evaluated by itself; of a CSV file none if not given, otherwise all."""
    file_column: str = "file"
    """Name of the CSV column with the path of the image."""
    patient_column: str = "patient"
    """Name of the CSV column with the patient, if the file has one; a patient's images stay in one split."""
    split_column: str = "split"
    """Name of the CSV column with the split (train, test, perhaps val), if it has one; drawn otherwise."""
    size: int | None = None
    """Side of the network's input, pixels; that of the run if not given."""
    device: str = "auto"
    """Device such as cpu or cuda:0; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name, None)
            if value is not None and not least <= value < math.inf:
                finite = "" if math.isfinite(value) else "finite and "
                raise UserError(f"--{name.replace('_', '-')} must be {finite}at least {least}, not {value}")

    def manifest(self, *, all_labels: bool = False) -> Manifest:
        """The images; what was left out is said. `all_labels` and raises are those of `load_manifest`."""
        manifest = load_manifest(
            self.data,
            self.labels,
            label=self.label,
            file_column=self.file_column,
            patient_column=self.patient_column,
            split_column=self.split_column,
            all_labels=all_labels,
        )
        if manifest.skipped:
            print(describe_skipped(manifest.skipped))
        return manifest

    def labelled(self) -> Manifest:
        """The images, some of which may be without a class. Raises UserError where there is no label column."""
        manifest = self.manifest()
        if not manifest.labels:
            raise UserError(
                f"--data {self.data}: no labels to evaluate with; sort the images into two or more class folders, or "
                "name a CSV file with --labels and its column with --label"
                if self.labels is None
                else f"--labels {self.labels}: say with --label which of its columns to evaluate"
            )
        return manifest

    def input_size(self, encoder: Encoder | None, run: Path | None) -> int:
        """Pixels a side of what `encoder`, read from `run`, is shown. Raises UserError where neither says."""
        size = self.size or (encoder.image_size if encoder is not None else None)
        if size is None:
            source = "without a run" if run is None else f"{run} does not say what size of image it was trained on:"
            raise UserError(f"{source} give --size")
        return size


def require_head(encoder: Encoder, run: Path) -> None:
    """Raise UserError where `encoder`, read from `run`, lacks the head that --stages final is of."""
    if encoder.has_head:
        return
    what = f"--stages final: {weights_file(run)} has no head"
    if run.is_dir():
        raise UserError(f"{what}, nor has the run folder another file that has one; leave final out")
    raise UserError(f"{what}; give the folder of its run, or a checkpoint, or leave final out")
