"""What a pretraining run can be told of its objective; the command line is made from it (see config.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastmoco.errors import UserError


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """The objective of the embeddings, plus a loss at residual stages."""

    objective: Literal["moco", "simclr", "supcon", "barlow-twins"] = "moco"
    """What the embeddings of two views are trained by: InfoNCE of a query against a key encoder's and a queue; NT-Xent
    against the other images of the batch (simclr); the same with all images of a class, by the first label, as
    positives (supcon); or the cross-correlation of projections (barlow-twins). The last three have one encoder and no
    queue, and both views train it."""
    symmetric: bool = False
    """With --objective moco, each view is query and key once, and the loss is the mean of both directions. Both are
    against the queue as it was before; then both views' keys enter it."""
    margin: float = 0.0
    """With --objective moco or simclr, what the similarity of the two views is lowered by in the loss (additive
    margin), from 0 to 2."""
    mix_weight: float = 0.0
    """With --objective barlow-twins, weight of its regulariser by mixed samples (published: 1 to 5); 0 for none. It
    takes a third forward."""
    method: Literal["moco", "none", "mse", "barlow"] = "moco"
    """Stage loss beside the objective: none (moco is the same), mean squared error, or cross-correlation."""
    temperature: float = 0.07
    """Temperature of a contrastive objective."""
    queue_size: int = 65536
    """Negatives kept (K)."""
    queue_dtype: Literal["fp32", "bf16"] = "fp32"
    """Numbers the negatives are kept in, whatever the precision: fp32 (fp64 in a run of that precision), or bf16, which
    halves their memory and about doubles the speed of the contrastive loss where bfloat16 is multiplied in hardware;
    keys are then rounded to 8 bits of mantissa."""
    ema: float = 0.999
    """Momentum m of the key encoder: key <- m * key + (1 - m) * query, once a step."""
    stages: tuple[int, ...] = (1, 2, 3, 4)
    """Residual stages, 1 to 4, that get a stage loss."""
    stage_weight: float = 0.25
    """Weight (lambda) of each stage's loss."""
    grids: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Side of the grid that stage 1 to 4's map is average-pooled to before the squared error."""
    barlow_scale: float = 1 / 32
    """Scale of the cross-correlation loss, at stages and as the objective."""
    barlow_off_diagonal: float = 1.0
    """Weight of its off-diagonal terms: 1 is the intermediate-layer paper's form, 0.005 Barlow Twins'."""
    barlow_correlation: Literal["per_rank", "global"] = "per_rank"
    """Images that the cross-correlation is of: each process's, or all processes' together, which gathers their
    projections. One process alone has all."""
    projector_width: int = 2048
    """Width of each stage's projector in front of the cross-correlation."""
    key_shuffle: Literal["none", "local", "global"] = "none"
    """Which images go through the key encoder together, so that BatchNorm's statistics do not tell which key is a
    query's: those of the queries' batch; the same in random order, which tells apart the --norm-groups; or random ones
    of all processes, each sent there and its features back."""

    @property
    def stage_loss(self) -> Literal["none", "mse", "barlow"]:
        """The kind of loss at residual stages."""
        return "none" if self.method == "moco" else self.method

    @property
    def title(self) -> str:
        """What is trained by, in a word or two: "moco", "mse" (a stage loss beside MoCo's), "simclr + mse" ..."""
        own = "symmetric moco" if self.symmetric else self.objective
        if self.stage_loss == "none":
            return own
        return self.stage_loss if own == "moco" else f"{own} + {self.stage_loss}"

    @property
    def keys_per_pair(self) -> int:
        """Keys of a pair of views that enter the queue."""
        return (2 if self.symmetric else 1) if self.objective == "moco" else 0

    @property
    def unused(self) -> dict[str, str]:
        """The fields that change nothing of what is trained by, each with why."""
        found: dict[str, str] = {}
        if self.stage_loss == "none":
            found |= dict.fromkeys(("stage_weight", "stages", "grids"), f"--method {self.method} has no stage losses")
        if self.objective != "moco":
            why = f"--objective {self.objective} has no queue and no key encoder"
            found |= dict.fromkeys(("queue_size", "queue_dtype", "ema", "key_shuffle"), why)
        if self.objective == "barlow-twins":
            found["temperature"] = "--objective barlow-twins has no temperature"
        return found

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"--temperature must be above 0, not {self.temperature}")
        # Similarities are from -1 to 1, and no two further apart than 2.
        if not 0 <= self.margin <= 2:
            raise UserError(f"--margin must be from 0 to 2, not {self.margin}")
        for name, of in (("symmetric", ("moco",)), ("margin", ("moco", "simclr")), ("mix_weight", ("barlow-twins",))):
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            if not 0 <= value < math.inf:
                raise UserError(f"{option} must be 0 or more, not {value}")
            if value and self.objective not in of:
                off = f"--no-{name}" if value is True else f"{option} 0"
                raise UserError(f"{option} is for --objective {' or '.join(of)}, not {self.objective}: give {off}")
        if self.objective != "moco" and self.key_shuffle != "none":
            raise UserError(f"--key-shuffle: --objective {self.objective} has no key encoder; leave it at none")
        if not 0 <= self.ema <= 1:
            raise UserError(f"--ema must be from 0 to 1, not {self.ema}")
        if not set(self.stages) <= {1, 2, 3, 4} or len(set(self.stages)) != len(self.stages):
            raise UserError(f"--stages must be different numbers from 1 to 4, not {' '.join(map(str, self.stages))}")
        if self.stage_loss != "none" and not self.stages:
            raise UserError(f"--stages is empty, so --method {self.method} has no stage loss: use --method none")
        if self.projector_width < 1:
            raise UserError(f"--projector-width must be at least 1, not {self.projector_width}")
        if min(self.grids) < 1:
            raise UserError(f"--grids must be at least 1 each, not {' '.join(map(str, self.grids))}")
