"""How well the encoder tells the training images' classes apart while it trains."""

from __future__ import annotations

import numpy as np

from fastmoco.data.manifest import Manifest
from fastmoco.data.quarantine import Bad, Quarantine
from fastmoco.data.store import BadFile
from fastmoco.evaluate.features import BadImage, extract
from fastmoco.evaluate.knn import monitor
from fastmoco.train.metrics import Row
from fastmoco.train.trainer import Trainer

# It looks at no more images than this: a score every few epochs should cost seconds.
MONITOR_IMAGES = 2000


def knn_row(trainer: Trainer, manifest: Manifest, quarantine: Quarantine, *, batch: int) -> Row:
    """Leave-one-out kNN scores of the query encoder's pooled stage-4 feature on some of the training images.

    An image that cannot be read joins `quarantine`, as found at micro-batch `batch`. Raises TooManyBad.
    """
    name = next(iter(manifest.labels))
    rng = np.random.Generator(np.random.Philox(key=[trainer.config.run.seed, 0x5A37]))
    chosen = np.sort(rng.permutation(len(manifest))[:MONITOR_IMAGES])
    views = trainer.config.views
    while True:
        chosen = np.array([index for index in chosen.tolist() if index not in quarantine], dtype=np.int64)
        some = manifest.select(chosen)
        try:
            features = extract(
                trainer.module.query,
                some,
                size=views.size,
                resize=views.resize or 1.0,
                batch_size=64,
                device=trainer.engine.device,
                precision=trainer.engine.precision,
                progress=False,
            )
            break
        except BadImage as bad:
            _set_aside(int(chosen[bad.index]), bad, manifest, quarantine, batch)
            # Where one is bad others may be, and looking is quicker than another extraction for each.
            for index in chosen.tolist():
                try:
                    manifest.read(index)
                except BadFile as other:
                    _set_aside(index, other, manifest, quarantine, batch)
    scores = monitor(features["stage4"], some.labels[name], some.patients)
    return {f"knn_{score}": value for score, value in scores.items() if value is not None}


def _set_aside(index: int, bad: BadFile, manifest: Manifest, quarantine: Quarantine, batch: int) -> None:
    quarantine.add(Bad(index, manifest.files[index], bad.reason, batch))
    quarantine.check(of=len(manifest))
