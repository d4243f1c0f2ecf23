"""The C++ of ops/convolve.py, in two forms: as the definition sums, and by Winograd's fewer products.

Winograd's F(2 x 2, 3 x 3) (csrc/winograd.h) takes 16 products for what a 3 x 3 kernel takes 36 for. It pays where both
sides of a map are longer than a tile and the map outweighs the weights, which are transformed at each call. In float32
its results are as near to the exact ones. In bfloat16 what is transformed is rounded once more, and results are off by
0.4 % (root mean square), not 0.2 %: too much for features, whose losses came 2 % apart where batches are small, and
little for gradients, so that only these are made by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastmoco.ops import dispatch
from fastmoco.ops.unfold import windows

# What channels are taken in, of both maps.
CHANNELS = 32


_NATIVE_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}

# The instruction sets that there are here for maps of either dtype, the best first.
SETS: dict[torch.dtype, list[str]] = {
    dtype: dispatch.native.convolve_sets(name) if dispatch.native is not None else []
    for dtype, name in _NATIVE_DTYPES.items()
}


def runs_native(dtype: torch.dtype, weight_shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether C++ convolves maps of `dtype` with weights (O, C, K, L), here; their gradients it makes of whole
    CHANNELS alone."""
    out, channels = weight_shape[:2]
    return bool(SETS.get(dtype)) and out % CHANNELS == 0 and (channels % CHANNELS == 0 or few(dtype, channels, stride))


def few(dtype: torch.dtype, channels: int, stride: Sequence[int]) -> bool:
    """Whether a map has so few channels that it is convolved by lines of the kernel, as images are. What a stride
    passes over has to fill words of 4 bytes."""
    return channels < CHANNELS and channels * stride[1] * dtype.itemsize % 4 == 0


def fewer_products(
    map_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    to_weights: bool = False,
) -> bool:
    """Whether Winograd's form is the faster for maps (N, C, H, W) and weights (O, C, K, L), or, `to_weights`, for the
    gradient to these."""
    if tuple(weight_shape[2:]) != (3, 3) or tuple(stride) != (1, 1) or max(padding) > 2:
        return False
    products = tiles = map_shape[0]
    for side, pad in zip(map_shape[2:], padding, strict=True):
        places = windows(side, 3, 1, pad)
        # Of each tap as many as do not fall on padding, which the other form leaves out.
        products *= sum(min(places, side + pad - tap) - max(0, pad - tap) for tap in range(3))
        tiles *= (places + 1) // 2
    # Measured with 64 to 512 channels on maps of 2 x 2 to 56 x 56 places: the transforms of maps, and of weights as if
    # they were so many tiles more.
    return products > (1.7 * 16 * tiles if to_weights else 1.1 * 16 * (tiles + 40))


def empty(like: Tensor, shape: Sequence[Any]) -> Tensor:
    """A channels-last map or weights of `shape`, of the dtype and on the device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def result_shape(
    map_shape: Sequence[int], weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Any, ...]:
    """That of a map (N, C, H, W) convolved with weights (O, C, K, L)."""
    sides = zip(map_shape[2:], weight_shape[2:], stride, padding, strict=True)
    return map_shape[0], weight_shape[0], *(windows(*side) for side in sides)


def empty_result(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """What a map (N, C, H, W) convolved with weight (O, C, K, L) fills, of x's dtype and on its device."""
    return empty(x, result_shape(x.shape, weight.shape, stride, padding))


def convolve(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """On the CPU, for what `runs_native`."""
    return _run("", x, weight, x.shape, weight.shape, stride, padding)


def map_gradient(
    dy: Tensor, weight: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """On the CPU, of a dtype that has SETS, channels in multiples of CHANNELS."""
    return _run("_map_gradient", dy, weight, shape, weight.shape, stride, padding)


def weight_gradient(
    x: Tensor, dy: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """As `map_gradient`."""
    return _run("_weight_gradient", x, dy, x.shape, shape, stride, padding)


_Sides = tuple[int, ...]


# A step asks for the same again and again, and to work it out takes as long as a small convolution.
@lru_cache(4096)
def _plan(
    result: str, map_shape: _Sides, weight_shape: _Sides, stride: _Sides, padding: _Sides
) -> tuple[_Sides, dict[str, Any]]:
    """The shape of a `result`, and what C++ is told beside addresses."""
    shapes = {
        "": result_shape(map_shape, weight_shape, stride, padding),
        "_map_gradient": map_shape,
        "_weight_gradient": weight_shape,
    }
    n, c, h, w = map_shape
    told = {"map": (n, h, w, c), "out": weight_shape[0], "kernel": weight_shape[2:]}
    return shapes[result], told | {"stride": stride, "padding": padding}


def _run(
    result: str,
    first: Tensor,
    second: Tensor,
    map_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """What C++ makes of two tensors: the map ("") or, as named, one of the gradients."""
    sizes = tuple(map_shape), tuple(weight_shape), tuple(stride), tuple(padding)
    shape, told = _plan(result, *sizes)
    winograd = (result or first.dtype != torch.bfloat16) and map_shape[1] % CHANNELS == 0
    if winograd and fewer_products(*sizes, to_weights=result == "_weight_gradient"):
        name = f"winograd{result}"
    elif not result and map_shape[1] % CHANNELS:
        name = "convolve_few"
    else:
        name = f"convolve{result}"
    first, second = (_as_words(tensor.contiguous(memory_format=torch.channels_last)) for tensor in (first, second))
    filled = empty(first, shape)
    getattr(dispatch.native, name)(
        first.data_ptr(),
        second.data_ptr(),
        filled.data_ptr(),
        **told,
        dtype=_NATIVE_DTYPES[first.dtype],
        instruction_set=SETS[first.dtype][0],
        threads=torch.get_num_threads(),
    )
    return filled


def _as_words(tensor: Tensor) -> Tensor:
    """`tensor` where words of 4 bytes can be read, which a part of a bfloat16 tensor may not be."""
    return tensor if tensor.data_ptr() % 4 == 0 else tensor.clone()
