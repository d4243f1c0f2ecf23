"""Which objective a run has."""

from __future__ import annotations

from fastmoco.distributed.world import World
from fastmoco.train.config import LossConfig, ModelConfig
from fastmoco.train.joint import JointEmbedding
from fastmoco.train.objective import MomentumContrast, Objective


def make_objective(model: ModelConfig, loss: LossConfig, *, seed: int, world: World | None = None) -> Objective:
    """The module that `loss.objective` names, with weights drawn by `seed`."""
    kind = MomentumContrast if loss.objective == "moco" else JointEmbedding
    return kind(model, loss, seed=seed, world=world)
