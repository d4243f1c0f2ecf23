"""How well the encoder tells the training images' classes apart while it trains."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastmoco.data.manifest import Manifest
from fastmoco.data.quarantine import Quarantine
from fastmoco.data.store import BadFile
from fastmoco.evaluate.features import BadImage, extract
from fastmoco.evaluate.knn import monitor
from fastmoco.models.encoder import Encoder
from fastmoco.train.metrics import Row
from fastmoco.train.trainer import Trainer

# It looks at no more images than this: a score every few epochs should cost seconds.
MONITOR_IMAGES = 2000


def knn_row(
    trainer: Trainer, encoder: Encoder, manifest: Manifest, quarantine: Quarantine, alive: Callable[[], None]
) -> Row:
    """Leave-one-out kNN scores of `encoder`'s pooled stage-4 feature on some of the training images with a class.

    Images in `quarantine` and others that cannot be read are left out: a score is no reason to set them aside, nor to
    stop. {} where fewer than two, or images of one class alone, are left. `alive` is called after each image looked at
    and each batch of features.
    """
    name = next(iter(manifest.labels))
    rng = np.random.Generator(np.random.Philox(key=[trainer.config.run.seed, 0x5A37]))
    classes = manifest.classes(name)
    known = np.flatnonzero(classes >= 0)
    drawn = np.sort(known[rng.permutation(len(known))[:MONITOR_IMAGES]]).tolist()
    chosen = [index for index in drawn if index not in quarantine and _readable(manifest, index, alive)]
    views = trainer.config.views
    while len(np.unique(classes[chosen])) > 1:
        some = manifest.select(np.array(chosen))
        try:
            features = extract(
                encoder,
                some,
                size=views.size,
                resize=views.resize or 1.0,
                batch_size=64,
                device=trainer.engine.device,
                precision=trainer.engine.precision,
                progress=False,
                after_batch=alive,
            )
        except BadImage as bad:
            del chosen[bad.index]
            continue
        scores = monitor(features["stage4"], classes[chosen], some.patients)
        return {f"knn_{score}": value for score, value in scores.items() if value is not None}
    return {}


def _readable(manifest: Manifest, index: int, alive: Callable[[], None]) -> bool:
    try:
        manifest.read(index)
    except BadFile:
        return False
    finally:
        alive()
    return True
