"""Fine-tuning as a cell: one start, one budget, one draw of the labels."""

from __future__ import annotations

import traceback
from typing import Any

from fastmoco.evaluate.cka import Kernel, feature_reuse
from fastmoco.evaluate.finetune import Finetuned, finetune
from fastmoco.models.encoder import Encoder
from fastmoco.study.cell import Cell
from fastmoco.study.cells import SECOND, draw_seed, finetune_settings
from fastmoco.study.work.context import Context
from fastmoco.study.work.encoders import load_start
from fastmoco.study.work.numbers import pack
from fastmoco.study.work.probing import budget_row
from fastmoco.study.work.similarity import STAGES

# RBF's width is the median distance: by an absolute one, hardly any two images are alike.
_KERNELS: tuple[Kernel, ...] = ("linear", "rbf")


def run(cell: Cell, context: Context, needed: dict[str, Cell]) -> dict[str, Any]:
    """{"probabilities" of the test images, "validation_score", "best_epoch", "best_step", "curve", "budget"}; after
    full fine-tuning with all labels "reuse" too, by kernel: CKA of each stage's features before with those after, or
    "notes" that say why there is none.

    Draws of one seed begin with the same encoder, from scratch too: they differ in the labelled images, in the
    classifier's first weights and in the order of the images.
    """
    s = cell.settings
    seed, second = s["seed"], s["target"] == SECOND
    splits = context.splits
    target = context.second if second else context.target
    images, said = budget_row(context, s["budget"], seed, s["draw"])
    encoder = load_start(context, s["init"], seed, needed)
    found = finetune(
        encoder,
        context.images,
        target,
        images,
        splits.validation,
        splits.test,
        finetune_settings(context.study, context.data, s["mode"], s["init"]),
        seed=draw_seed(seed, s["draw"]),
        device=context.device,
    )
    result = {
        "probabilities": pack(found.probabilities, target.kind),
        "validation_score": round(found.validation_score, 6),
        "best_epoch": found.best_epoch,
        "best_step": found.best_step,
        "curve": [{k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in found.curve],
        "budget": said,
    }
    if s["mode"] == "full" and s["budget"] == 1 and not second:
        # From scratch, what training kept of the random weights: what reuse is to be compared with.
        try:
            result["reuse"] = _reuse(context, encoder, found)
        except Exception as error:
            # Memory, mostly. What was trained is whole, and dear.
            traceback.print_exc()
            result["notes"] = [f"no feature reuse: {type(error).__name__}: {error}"]
    return result


def _reuse(context: Context, before: Encoder, found: Finetuned) -> dict[str, Any]:
    """By kernel, of each stage: mean and deviation over draws of test images of the CKA before against after."""
    pictures = context.images.select(context.splits.test)
    sets = []
    for encoder in (before, found.encoder):
        features = pictures.features(encoder, device=context.device)
        sets.append({stage: features[stage] for stage in STAGES})
    return {
        kernel: {stage: value.as_json() for stage, value in feature_reuse(*sets, kernel=kernel).items()}
        for kernel in _KERNELS
    }
