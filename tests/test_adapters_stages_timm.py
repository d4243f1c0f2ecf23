"""StageLosses on timm's networks, beside what its `forward_intermediates` returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

from stage_steps import in_lightlys_loop, in_lightning

Case = tuple[Callable[[], nn.Module], list[str], list[int], int]

# How to make it, its stages, their numbers among the intermediate outputs, and the side of the pictures.
NETWORKS: dict[str, Case] = {
    "resnet": (partial(timm.create_model, "resnet18"), ["layer1", "layer3"], [1, 3], 32),
    "convnext": (
        partial(timm.create_model, "convnext_atto", depths=(1, 1, 1, 1)), ["stages.0", "stages.2"], [0, 2], 64,
    ),
    "efficientnet": (partial(timm.create_model, "test_efficientnet"), ["blocks.1", "blocks.3"], [1, 3], 64),
    "vit": (
        partial(timm.create_model, "vit_tiny_patch16_224", img_size=48, depth=4), ["blocks.1", "blocks.3"], [1, 3], 48,
    ),
    "swin": (
        partial(
            timm.create_model, "swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1, 1, 1),
            embed_dim=24, num_heads=(2, 2, 2, 2), drop_path_rate=0.0,
        ), ["layers.0", "layers.2"], [0, 2], 64,
    ),
}  # fmt: skip


def intermediates(model: nn.Module, x: Tensor, *, indices: list[int]) -> Sequence[Tensor]:
    if not isinstance(model, timm.models.VisionTransformer):
        found: list[Tensor] = model.forward_intermediates(x, indices, intermediates_only=True)
        return found
    pairs = model.forward_intermediates(
        x, indices, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    return [torch.cat([prefix, tokens], dim=1) for tokens, prefix in pairs]


@pytest.mark.parametrize("step", [in_lightlys_loop, in_lightning])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step(network: str, step: Callable[..., None]) -> None:
    torch.manual_seed(0)
    make, stages, indices, size = NETWORKS[network]
    capture = partial(intermediates, indices=indices)
    step(make().train(), stages, capture, size=size, channels_last=network == "swin")
