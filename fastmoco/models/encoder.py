"""A ResNet whose residual stages can be seen."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastmoco.errors import UserError
from fastmoco.models.projector import Projector
from fastmoco.models.resnet import ARCHS, ResNet
from fastmoco.ops.precision import no_autocast, wide

Head = Literal["linear", "mlp", "projector", "none"]


class Features(NamedTuple):
    """What an encoder returns for a batch of N images.

    `embedding` is (N, dim), the head's output, not normalised. `stages` holds the outputs of residual stages 1 to 4,
    (N, C_s, H_s, W_s) each: C is 64, 128, 256, 512 for ResNet-18 and 34, and four times that for the deeper ones.
    """

    embedding: Tensor
    stages: tuple[Tensor, Tensor, Tensor, Tensor]


class Encoder(nn.Module):
    """The ResNet `arch`, with torchvision's names and initial weights, and `fc` replaced by a head.

    `head` is "linear" (features -> dim), "mlp" (features -> features -> dim, ReLU between, as in MoCo v2), "projector"
    (features -> dim -> dim -> dim with BatchNorm, as in Barlow Twins) or "none" (the pooled stage-4 feature itself).
    `zero_init_residual` starts the last BatchNorm of each block at 0, so that each block starts as the identity. With
    `seed` the weights are drawn from that seed alone, and the global random state is left as it was. `config` is that
    of the run it was trained in, `image_size` and `resize` say what images it was trained on, where known.
    """

    config: dict[str, Any]
    image_size: int | None = None
    resize: float | None = None

    def __init__(
        self,
        arch: str = "resnet50",
        *,
        head: Head = "none",
        dim: int = 128,
        zero_init_residual: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if arch not in ARCHS:
            raise UserError(f"--arch {arch}: not one of {', '.join(ARCHS)}")
        self.config = {}
        self.arch = arch
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.backbone = ResNet(arch, zero_init_residual=zero_init_residual)
            self.width = self.backbone.width
            self.backbone.fc = nn.Identity()
            self.head = _head(head, self.width, dim)

    @property
    def stage_widths(self) -> tuple[int, int, int, int]:
        """Channels of stages 1 to 4."""
        w = self.width // 8
        return w, 2 * w, 4 * w, 8 * w

    @property
    def has_head(self) -> bool:
        """Whether the embedding is another than the pooled stage-4 feature."""
        return not isinstance(self.head, nn.Identity)

    def forward(self, images: Tensor) -> Features:
        """`images` (N, 3, H, W) with values in [0, 1] -> Features."""
        stages = self.backbone.stages(images)
        x = stages[-1]
        # A fresh encoder gives all images nearly the same embedding. What tells them apart is then below bfloat16's
        # resolution, so that pooling and head, which cost next to nothing, are left to float32.
        with no_autocast(x):
            return Features(self.head(wide(x).mean(dim=(2, 3))), stages)


def _head(kind: Head, width: int, dim: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, dim)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))
    if kind == "projector":
        # Its layers alone: an encoder sees one view at a time.
        return nn.Sequential(*Projector(width, dim))
    raise UserError(f"--head {kind}: not one of linear, mlp, projector, none")
