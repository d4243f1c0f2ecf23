"""Intermediate-layer losses for any network and any training loop: `from fastmoco.adapters.stages import StageLosses`.

They take the outputs of named parts of the network as it runs, by forward hooks (in Kaku et al. 2021 residual stages).
"""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmoco.adapters.listening import Listening
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
        Of more calls than that since the last sum the last count, with a warning: for both directions of a symmetric
        loss take the sum after each.
    stages: names of parts, as `named_modules` has them: "layer2" of a ResNet, "features.3" or "stages.1" of a ConvNeXt
        or EfficientNet, "blocks.5" of a vision transformer. Outputs are maps (N, C, H, W), or tokens (N, L, C).
    kind: mse, the mean squared error of both views' means over places (or over the cells of a `grid` x `grid` of each
        map), or barlow, the cross-correlation of projections of those means (Zbontar et al. 2021).
    weight: of every stage's loss: 1 (mse) or 0.0005 (barlow) if not given.
    channels_last: whether maps are (N, H, W, C), as a Swin transformer's. Where it is not given they are taken to be
        (N, C, H, W), unless a part shows that they are not: layers over the last dimension (LayerNorm, Linear) and none
        over the second (convolutions, BatchNorm), of which one is as wide as the map's last dimension and none as its
        second. That is an error then, as is the opposite where it is given as True. Of other parts, such as those that
        mix both kinds of layers, it cannot be told.
    off_diagonal, scale, projector_width: of barlow, whose projectors are this module's parameters, to be trained. For
        their widths an empty picture of `size` pixels a side goes through `model` once.

    `losses` holds the stages' parts of the last sum, by name, without gradient. The networks are not parts of this
    module, copies of them are not listened to, and they are left alone once this module is gone. Raises UserError for a
    stage that `model` has not, a weight that is no number from 0, or where an empty picture does not go through, and,
    called, where a view is missing, the outputs do not fit or their channels are seen to be elsewhere.
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
        if weight is not None and not (isinstance(weight, int | float) and 0 <= weight < math.inf):
            raise UserError(f"StageLosses: weight is one number, from 0, for every stage, not {weight!r}")
        if key_model is model:
            key_model = None
        self.stages, self.channels_last, self.losses = tuple(stages), channels_last, dict[str, Tensor]()
        self._over = {stage: _widths_over(find_part("StageLosses", model, stage)) for stage in stages}
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
        self._seen = [Listening("StageLosses", model, self.stages, 2 if key_model is None else 1)]
        self._seen += [] if key_model is None else [Listening("StageLosses", key_model, self.stages, 1)]
        for seen in self._seen:
            weakref.finalize(self, seen.remove).atexit = False

    def forward(self) -> Tensor:
        """The sum, of what was seen since the last call."""
        views: list[dict[int, Tensor]] = [{}, {}]
        for place, stage in enumerate(self.stages):
            outputs = [output for seen in self._seen for output in seen[stage].kept]
            if len(outputs) < 2:
                compiled = ""
                if "torch._dynamo" in sys.modules:
                    compiled = (
                        "; of compiled networks, no other of their class may have been compiled and called before"
                    )
                raise UserError(
                    f"StageLosses: {len(outputs)} of 2 views went through {stage} since the last call: run both "
                    f"through the networks, in training mode, before it{compiled}"
                )
            for view, output in zip(views, outputs, strict=True):
                view[place] = self._map(stage, output)
        self._warn_of_calls()
        for seen in self._seen:
            for used in seen.values():
                used.clear()
        parts = self.loss(*views)
        self.losses = {stage: part.detach() for stage, part in zip(self.stages, parts.values(), strict=True)}
        return torch.stack([*parts.values()]).sum()

    def _warn_of_calls(self) -> None:
        wanted = 2 // len(self._seen)
        most = max(used.calls for seen in self._seen for used in seen.values())
        if most > wanted:
            warnings.warn(
                f"StageLosses: {most} calls of a network since the last sum, of which the last {wanted} count: take "
                "the sum after each pair of views",
                stacklevel=3,
            )

    def _map(self, stage: str, output: Any) -> Tensor:
        """(N, C, H, W) of what a stage gave."""
        if isinstance(output, Tensor) and output.ndim == 4:
            second, last = self._over[stage]
            if self.channels_last and output.shape[1] in second and output.shape[3] not in second:
                raise UserError(
                    f"StageLosses: {stage} gives maps {tuple(output.shape)} whose channels are the second, as its "
                    f"layers over {output.shape[1]} say: leave channels_last out, which is not torch's memory format"
                )
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
        seen = Listening("StageLosses", model, self.stages, 1, always=True)
        modes = {part: part.training for part in model.modules()}
        picture = next(model.parameters()).new_zeros(1, _colours(model), size, size)
        try:
            model.eval()(picture)
            missing = [stage for stage, outputs in seen.items() if not outputs.kept]
            if missing:
                raise UserError(f"StageLosses: nothing went through {', '.join(missing)} as the model was called")
            return [self._map(stage, outputs.kept[0]).shape[1] for stage, outputs in seen.items()]
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"StageLosses: the model does not take an empty picture {tuple(picture.shape)}, which tells the widths "
                f"of projectors: give size= in pixels ({error})"
            ) from error
        finally:
            for part, mode in modes.items():
                part.training = mode
            seen.remove()


def _widths_over(part: nn.Module) -> tuple[set[int], set[int]]:
    """The widths of a part's layers over a map's second dimension and over its last; none where it has both kinds."""
    layers = list(part.modules())
    second = {width for layer in layers if isinstance(layer, _OVER_SECOND) for width in _width_of(layer)}
    last = {layer.normalized_shape[-1] for layer in layers if isinstance(layer, nn.LayerNorm)}
    last |= {layer.out_features for layer in layers if isinstance(layer, nn.Linear)}
    return (set(), set()) if second and last else (second, last)


def _width_of(layer: nn.Module) -> list[int]:
    """Channels that a layer over the second dimension gives."""
    return [getattr(layer, name) for name in ("out_channels", "num_features", "num_channels") if hasattr(layer, name)]


def _colours(model: nn.Module) -> int:
    """Channels of the pictures that `model` takes: those of its first convolution, or 3."""
    return next((part.in_channels for part in model.modules() if isinstance(part, nn.modules.conv._ConvNd)), 3)
