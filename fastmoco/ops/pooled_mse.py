"""Mean squared error of two feature maps after adaptive average pooling (Kaku et al. 2021, section 3)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from fastmoco.ops import dispatch
from fastmoco.ops.precision import no_autocast, wide


def pooled_mse(a: Tensor, b: Tensor, *, grid: int, implementation: str | None = None) -> Tensor:
    """`mean((pool(a) - pool(b))^2)` over all elements, pooled to `grid` x `grid` cells: a 0-d tensor.

    `a` and `b` are (N, C, H, W) of one shape and any floating dtype; cells overlap, or repeat, where the map's side
    is not a multiple of `grid`, as torch's adaptive pooling defines. The arithmetic and the result are float32, or
    float64 for float64 inputs. Gradients reach both.

    Raises ValueError for shapes that differ or are not maps, or a grid below 1.
    """
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"pooled_mse: two (N, C, H, W) maps of one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
    if grid < 1:
        raise ValueError(f"pooled_mse: grid must be at least 1, not {grid}")
    with no_autocast(a):
        return dispatch.pick("pooled_mse", a, implementation)(wide(a), wide(b), grid)


def reference(a: Tensor, b: Tensor, grid: int) -> Tensor:
    """The definition, written out."""
    return (adaptive_avg_pool2d(a, grid) - adaptive_avg_pool2d(b, grid)).square().mean()


dispatch.register("pooled_mse", "reference", reference)
