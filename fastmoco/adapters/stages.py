"""Intermediate-layer losses for any network and any training loop: `from fastmoco.adapters.stages import StageLosses`.

They take the outputs of named parts of the network as it runs, by forward hooks (in Kaku et al. 2021 residual stages).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmoco.adapters.parts import find_part
from fastmoco.errors import UserError
from fastmoco.losses import StageBarlow, StageMSE

RESNET = ("layer1", "layer2", "layer3", "layer4")

# Layers over a map's second dimension, its channels unless they are the last.
_OVER_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


class StageLosses(nn.Module):
    """Losses of the outputs of parts of `model`, for two views of the same images; called without arguments once both
    have gone through it, in training mode, it returns their sum, a 0-d tensor.

    key_model: the network of the second view, a momentum encoder; `model` itself if not given, by its last two calls.
    stages: names of parts, as `named_modules` has them: "layer2" of a ResNet, "features.3" or "stages.1" of a ConvNeXt
        or EfficientNet, "blocks.5" of a vision transformer. Outputs are maps (N, C, H, W), or tokens (N, L, C).
    kind: mse, the mean squared error of both views' means over places (or over the cells of a `grid` x `grid` of each
        map), or barlow, the cross-correlation of projections of those means (Zbontar et al. 2021).
    weight: of each stage's loss: 1 (mse) or 0.0005 (barlow) if not given.
    channels_last: whether maps are (N, H, W, C), as a Swin transformer's. Where it is not given they are taken to be
        (N, C, H, W), unless a part shows that they are not: layers over the last dimension (LayerNorm, Linear) and none
        over the second (convolutions, BatchNorm), of which one is as wide as the map's last dimension and none as its
        second. That is an error then. Of other parts, such as those that mix both kinds of layers, it cannot be told.
    off_diagonal, scale, projector_width: of barlow, whose projectors are this module's parameters, to be trained. For
        their widths an empty picture of `size` pixels goes through `model` once.

    `losses` holds the stages' parts of the last sum, by name, without gradient. The networks are not parts of this
    module, and copies of them are not listened to. Raises UserError for a stage that `model` has not, and, called,
    where a view is missing, the outputs do not fit or their channels are seen to be the last.
    """

    def __init__(
        self,
        model: nn.Module,
        key_model: nn.Module | None = None,
        *,
        stages: Sequence[str] = RESNET,
        kind: Literal["mse", "barlow"] = "mse",
        weight: float | None = None,
        grid: int = 1,
        channels_last: bool | None = None,
        off_diagonal: float = 0.005,
        scale: float = 1.0,
        projector_width: int = 2048,
        size: int = 224,
    ) -> None:
        super().__init__()
        if kind not in ("mse", "barlow"):
            raise UserError(f"StageLosses: kind is mse or barlow, not {kind!r}")
        if not stages or len(set(stages)) != len(stages):
            raise UserError(f"StageLosses: stages are different names, at least one, not {list(stages)}")
        self.stages, self.channels_last, self.losses = tuple(stages), channels_last, dict[str, Tensor]()
        self._last = {stage: _widths_over_last(find_part("StageLosses", model, stage)) for stage in stages}
        places = range(1, len(stages) + 1)
        self.loss: StageMSE | StageBarlow
        if kind == "mse":
            self.loss = StageMSE(places, [grid] * len(stages), 1.0 if weight is None else weight)
        else:
            self.loss = StageBarlow(
                places,
                self._widths(model, size),
                weight=5e-4 if weight is None else weight,
                scale=scale,
                off_diagonal=off_diagonal,
                projector_width=projector_width,
            )
        self._seen = [_listen(model, self.stages, 2 if key_model is None else 1)]
        self._seen += [] if key_model is None else [_listen(key_model, self.stages, 1)]

    def forward(self) -> Tensor:
        """The sum, of what was seen since the last call."""
        views: list[dict[int, Tensor]] = [{}, {}]
        for place, stage in enumerate(self.stages):
            outputs = [output for seen in self._seen for output in seen[stage]]
            if len(outputs) < 2:
                raise UserError(
                    f"StageLosses: {len(outputs)} of 2 views went through {stage} since the last call: run both "
                    "through the networks, in training mode, before it"
                )
            for view, output in zip(views, outputs, strict=True):
                view[place] = self._map(stage, output)
        for seen in self._seen:
            for used in seen.values():
                used.clear()
        parts = self.loss(*views)
        self.losses = {stage: part.detach() for stage, part in zip(self.stages, parts.values(), strict=True)}
        return torch.stack([*parts.values()]).sum()

    def _map(self, stage: str, output: Any) -> Tensor:
        """(N, C, H, W) of what a stage gave."""
        if isinstance(output, Tensor) and output.ndim == 4:
            last = self._last[stage]
            if self.channels_last is None and output.shape[3] in last and output.shape[1] not in last:
                raise UserError(
                    f"StageLosses: {stage} gives maps {tuple(output.shape)} whose channels are the last, as its layers "
                    f"over {output.shape[3]} say: give channels_last=True (or False, if they are {output.shape[1]})"
                )
            return output.permute(0, 3, 1, 2) if self.channels_last else output
        if isinstance(output, Tensor) and output.ndim == 3:
            return output.transpose(1, 2).unsqueeze(-1)
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"StageLosses: {stage} gives {shape}: maps (N, C, H, W) or tokens (N, L, C) are wanted")

    @torch.no_grad()
    def _widths(self, model: nn.Module, size: int) -> list[int]:
        """Channels of each stage."""
        seen = _listen(model, self.stages, 1, always=True)
        modes = {part: part.training for part in model.modules()}
        like = next(model.parameters())
        try:
            model.eval()(like.new_zeros(1, 3, size, size))
        finally:
            for part, mode in modes.items():
                part.training = mode
            seen.remove()
        missing = [stage for stage, outputs in seen.items() if not outputs]
        if missing:
            raise UserError(f"StageLosses: nothing went through {', '.join(missing)} as the model was called")
        return [self._map(stage, outputs[0]).shape[1] for stage, outputs in seen.items()]


def _widths_over_last(part: nn.Module) -> set[int]:
    """The widths of a part's layers over the last dimension; none where it has others, over the second."""
    layers = list(part.modules())
    if any(isinstance(layer, _OVER_SECOND) for layer in layers):
        return set()
    norms = {layer.normalized_shape[-1] for layer in layers if isinstance(layer, nn.LayerNorm)}
    return norms | {layer.out_features for layer in layers if isinstance(layer, nn.Linear)}


class _Seen(dict[str, deque[Any]]):
    """The last outputs of parts of a network, by name; `remove` ends the listening."""

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Any] = []

    def remove(self) -> None:
        """Listen no more."""
        for handle in self.handles:
            handle.remove()


def _listen(model: nn.Module, stages: Sequence[str], count: int, *, always: bool = False) -> _Seen:
    """What comes out of `stages` from now on, the last `count`, in training mode, or `always`."""
    seen = _Seen()
    for stage in stages:
        part = find_part("StageLosses", model, stage)
        seen[stage] = deque(maxlen=count)
        seen.handles.append(part.register_forward_hook(_keep(part, seen[stage], always)))
    return seen


def _keep(own: nn.Module, outputs: deque[Any], always: bool) -> Callable[..., None]:
    def hook(part: nn.Module, inputs: Any, output: Any) -> None:
        # A copy of the network has copies of its hooks.
        if part is own and (always or part.training):
            outputs.append(output)

    return hook
