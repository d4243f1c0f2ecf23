"""Every tolerance of the parity tests, once, and how differences are measured.

The scale was set by running `paper.Paper` against itself in float64 with only the memory format or the
dtype changed, on a CPU (ResNet-18 at 32 and 64 px, batches of 5 to 16; ResNet-50 at 64 px, batch 6; no stage
loss, MSE, Barlow). Over three steps channels-last float64 differs by at most 5e-15 in a loss and 5e-13 in a
gradient or weight. At the first step, zero-initialised or not, float32 differs by 2e-6 in a loss and bfloat16
autocast by 1.2e-2. On CUDA the float32 tolerances presume TF32 off, and `torch.backends.cudnn.allow_tf32` is
on by default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Losses, relative. float64 holds at every step, the others at the first only: from then on SGD feeds the
# rounding errors back into the weights, and in bfloat16 the second step may be 10 % off without any fault.
LOSS: dict[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}

# Gradients by `relative_error` of each tensor, at every step. The lower precisions have no entry: a ReLU
# input within rounding of zero falls on the other side of it, and where a stage has few elements a tensor's
# gradient is then 20 % off (seen in float32: one ReLU of 57344), with no fault and no trace in the loss.
GRADIENT: dict[torch.dtype, float] = {torch.float64: 1e-9}

# Least cosine between the encoder's whole gradient and the oracle's, at the first step, in those precisions.
# Measured: 0.9999 after one such ReLU in float32; 0.947 to 0.993 in bfloat16.
GRADIENT_COSINE: dict[torch.dtype, float] = {torch.float32: 0.999, torch.bfloat16: 0.9}

# Weights, queue and BatchNorm buffers in float64, by `relative_error`, after every step.
STATE = 1e-9

# An operation's loss and gradients by `relative_error`, against float64 on the very same inputs. Arithmetic and loss
# are float32 for the narrow dtypes, so theirs is the one rounding of a gradient, half a unit in the last place.
OPERATION: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 4e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value, computed in float64 on the CPU.

    One scale a tensor: an element near zero has no relative precision of its own. Where `expected` is all
    zero (convolutions behind a zero-initialised BatchNorm) it is the largest absolute value of `actual`. NaN
    or infinity anywhere gives infinity, so that `<=` fails. ValueError if the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shape {tuple(actual.shape)} against {tuple(expected.shape)}")
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    difference = (actual - expected).abs().max().item()
    scale = expected.abs().max().item()
    if not (math.isfinite(difference) and math.isfinite(scale)):
        return math.inf
    return difference / scale if scale > 0 else difference


def assert_states_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, what: str
) -> None:
    """AssertionError naming the worst tensor, unless names agree and each `relative_error` is within."""
    different = sorted(actual.keys() ^ expected.keys())
    assert expected and not different, f"{what}: names differ: {different}"
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= tolerance, f"{what}: {worst} is off by {errors[worst]:.2e}, over {tolerance:.0e}"


def gradient_cosine(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Cosine of two gradients, each as one long float64 vector. KeyError if `actual` lacks a name."""
    a = torch.cat([actual[name].detach().cpu().double().flatten() for name in expected])
    b = torch.cat([expected[name].detach().cpu().double().flatten() for name in expected])
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()
