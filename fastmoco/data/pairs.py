"""Which image the second view of a pair is cut from: the first view's, or another of the same patient."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fastmoco.data.draws import uniforms
from fastmoco.data.manifest import Manifest
from fastmoco.data.patients import patient_groups
from fastmoco.errors import UserError

PairKind = Literal["image", "patient"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Partners of n images: others of their patient, each as likely, and the image itself where it is the only one.

    These are the pairs of MICLe (Azizi et al. 2021, "Big Self-Supervised Models Advance Medical Image Classification").
    `members` (n,) int64 are the images, patient after patient. Of each image, `place` (n,) int64 says where in
    `members` it stands, `first` (n,) where its patient's begin, and `count` (n,) how many they are.
    """

    members: np.ndarray
    place: np.ndarray
    first: np.ndarray
    count: np.ndarray

    @staticmethod
    def of_groups(groups: np.ndarray) -> Pairs:
        """Partners among images of the same number in `groups` (n,)."""
        _, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
        members = np.argsort(group, kind="stable")
        return Pairs(members, np.argsort(members), (np.cumsum(counts) - counts)[group], counts[group])

    def __len__(self) -> int:
        return len(self.members)

    @property
    def paired(self) -> int:
        """How many images have another as their partner."""
        return int((self.count > 1).sum())

    def partners(self, seed: int, epoch: int, indices: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """The partners (N,) int64 of the images `indices` (N,) in `epoch`, a function of (seed, epoch, image, turn).

        `turns` (N,) int64 sets apart the times that an image comes in an epoch.
        """
        return self._after(indices, self._steps(seed, epoch, indices, turns))

    def partner(self, seed: int, epoch: int, index: int, turn: int, bad: Container[int]) -> int:
        """The partner of one image where those among `bad` cannot be it: the next of its patient's after the one that
        was drawn, and the image itself where no other is left.
        """
        row = np.array([index])
        step = int(self._steps(seed, epoch, row, np.array([turn]))[0])
        others = int(self.count[index]) - 1
        for further in range(others):
            found = int(self._after(row, (step + further) % others)[0])
            if found not in bad:
                return found
        return index

    def _steps(self, seed: int, epoch: int, indices: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """Which of an image's others was drawn, (N,) int64, counted from the image round to the one before it."""
        u = uniforms(seed, epoch, indices, turns, stream=_STREAM, count=1)[:, 0]
        return np.floor(u * (self.count[indices] - 1)).astype(np.int64)

    def _after(self, indices: np.ndarray, steps: np.ndarray | int) -> np.ndarray:
        # Of a patient's only image this is the image.
        place = self.place[indices] - self.first[indices] + 1 + steps
        return self.members[self.first[indices] + place % self.count[indices]]


# Apart from the streams of the views, 0, and of the order.
_STREAM = 0x9A125


def find_pairs(kind: PairKind, manifest: Manifest) -> Pairs | None:
    """The partners that `kind` wants for the images of `manifest`; None where both views are cut from one image.

    Raises UserError where pairs are to be of patients and the data name none, or none that has two images.
    """
    if kind not in get_args(PairKind):
        raise UserError(f"pairs: one of {', '.join(get_args(PairKind))}, not {kind!r}")
    if kind == "image":
        return None
    if manifest.patients is None:
        raise UserError(
            "--pairs patient: the data do not say which patient an image is of. Give a CSV file that does with "
            "--labels, its column with --patient-column (study, say) if it is not called patient; or use --pairs image"
        )
    pairs = Pairs.of_groups(patient_groups(manifest.patients, len(manifest)))
    if not pairs.paired:
        raise UserError(
            f"--pairs patient: no patient has two of the {len(manifest)} images. Is --patient-column the right column? "
            "Where each image is of another patient, use --pairs image"
        )
    return pairs
