"""Convolutions by this package's own code or as matrix products, where that is the faster."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastmoco.ops.convolve import convolve_unchecked
from fastmoco.ops.convolve_native import CHANNELS, fewer_products, result_shape, runs_native
from fastmoco.ops.library import left_to_torch, watched
from fastmoco.ops.unfold import unfold, windows

Form = Literal["torch", "product", "convolve"]

# Whether this processor multiplies bfloat16 in tiles (AMX), several times as fast as in vectors: zeros too.
TILES = torch.cpu.get_capabilities().get("amx_bf16", False)
# Places of the result up to which its own form is the faster, measured on ResNet-18 and 50: in bfloat16 of kernels over
# several places and of those over one, in float32 of the former.
FEW_PLACES = {torch.bfloat16: (1024, 256), torch.float32: (256, 0)}


class Convolution(nn.Conv2d):
    """torch's Conv2d; on a CPU, in bfloat16, float32 or float64, its own forms where they are the faster.

    Without a bias, what has a result of few places is convolved by ops/convolve.py, which leaves out what falls on
    padding: for 32 maps of 4 x 4 places and 256 channels forward and backward take 3.8 ms in bfloat16 (AVX512-BF16) and
    6.4 in float32 (AVX-512), where torch's take 7.6 and 12.4. So is a 3 x 3 kernel of stride 1 over any map for which
    Winograd's fewer products are the faster, in bfloat16 for the gradients alone: for 16 maps of 56 x 56 places and 64
    channels 23 and 35 ms, torch's 30 and 56. So are images, whose few channels are convolved by lines of the kernel, in
    float32 in half of torch's time; of three channels in bfloat16 where the stride across is even.

    The rest is a matrix product where the weights outweigh the map. oneDNN brings the weights of a convolution into a
    layout of its own at each call and their gradient back, and blocks over the map. Where the map has few places that
    is most of the time: the gradient of a 3 x 3 convolution of 512 channels takes 27 ms for 32 maps of 2 x 2 in
    bfloat16, and 8 ms as a product (22 and 9 ms in float32). In float64 torch has no oneDNN, and reads all weights
    again for each image. A channels-last map is a matrix (N H W, C) as it lies in memory, and so are channels-last
    weights, (C_out, 3 3 C_in): nothing is copied but what each window covers (ops/unfold.py), for kernels larger than
    1.

    All forms but Winograd's are the same sums in another order. Traced and exported networks have torch's convolutions,
    which hold for any number of images, and so have torch.func's transforms.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        form = self.form(x)
        if form == "torch":
            return super().forward(x)
        if form == "product":
            return self._product(x)
        # Another dtype than the map's they have under autocast alone, which would cast them for torch's.
        y: Tensor = convolve_unchecked(x, self.weight.to(x.dtype), self.stride, self._border(), None)
        return y

    def result_shape(self, x: Tensor) -> tuple[int, ...]:
        """That of what a map (N, C_in, H, W) becomes."""
        return result_shape(x.shape, self.weight.shape, self.stride, self._border())

    def _product(self, x: Tensor) -> Tensor:
        kernel, stride, padding = self.kernel_size, self.stride, self._border()
        h, w = (windows(*of) for of in zip(x.shape[2:], kernel, stride, padding, strict=True))
        if (kernel, stride, padding) == ((1, 1), (1, 1), (0, 0)):
            rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        else:
            rows = unfold(x, kernel, stride=stride, padding=padding)
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, -1)
        product = linear(rows, weight, self.bias)
        return product.view(x.shape[0], h, w, self.out_channels).permute(0, 3, 1, 2)

    def _border(self) -> tuple[int, ...]:
        assert not isinstance(self.padding, str)
        return self.padding

    def form(self, x: Tensor) -> Form:
        """By what a map is convolved the fastest."""
        weight = self.weight
        if not (x.is_cpu and weight.is_cpu) or x.dtype not in (torch.bfloat16, torch.float32, torch.float64):
            return "torch"
        if x.ndim != 4 or x.shape[1] != weight.shape[1]:
            return "torch"
        if x.dtype != (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype):
            return "torch"
        if self.groups != 1 or self.dilation != (1, 1) or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return "torch"
        seen = watched()
        # What is mapped is not to be asked for its memory format.
        if (seen and left_to_torch()) or not x.is_contiguous(memory_format=torch.channels_last):
            return "torch"
        if seen:
            return self._fastest(x)
        # A step asks for the same maps again, and the answer takes as long as a small convolution.
        known: dict[Any, Form] = self.__dict__.setdefault("_known", {})
        case = x.shape, x.dtype, weight.shape, self.bias is None, self.stride, self.padding
        form = known.get(case)
        if form is None:
            if len(known) == 100:
                known.clear()
            form = known[case] = self._fastest(x)
        return form

    def _fastest(self, x: Tensor) -> Form:
        sides = [side + 2 * pad for side, pad in zip(x.shape[2:], self._border(), strict=True)]
        if x.numel() == 0 or any(side < kernel for side, kernel in zip(sides, self.kernel_size, strict=True)):
            # Refused by torch, some of them.
            return "torch"
        if self._own(x):
            return "convolve"
        return "product" if self._outweighs(x) else "torch"

    def _own(self, x: Tensor) -> bool:
        if self.bias is not None or not runs_native(x.dtype, self.weight.shape, self.stride):
            return False
        if x.dtype == torch.bfloat16 and TILES:
            return False
        if x.shape[1] < CHANNELS:
            # Measured on images; of more channels, or places taken singly, torch's is as fast.
            return x.shape[1] <= 4 and self.kernel_size != (1, 1)
        if fewer_products(x.shape, self.weight.shape, self.stride, self._border()):
            return True
        _, _, down, across = self.result_shape(x)
        return down * across <= FEW_PLACES[x.dtype][self.kernel_size == (1, 1)]

    def _outweighs(self, x: Tensor) -> bool:
        places = x.shape[0] * (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])
        alone = self.kernel_size == (1, 1)
        if x.dtype == torch.bfloat16:
            return alone or places < self.weight[0].numel()
        # Here oneDNN is near the processor's limit unless the map is that small: measured in float32 from 32 to 224 px
        # on ResNet-18 and 50.
        return self.weight.numel() > (10 if alone else 2000) * places
