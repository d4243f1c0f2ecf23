"""Convolutions as matrix products, where that is the faster."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastmoco.ops.library import left_to_torch
from fastmoco.ops.unfold import unfold, windows


class Convolution(nn.Conv2d):
    """torch's Conv2d; in bfloat16, float32 or float64 on a CPU, a matrix product where the weights outweigh the map.

    oneDNN brings the weights of a convolution into a layout of its own at each call and their gradient back, and blocks
    over the map. Where the map has few places that is most of the time: the gradient of a 3 x 3 convolution of 512
    channels takes 27 ms for 32 maps of 2 x 2 in bfloat16, and 8 ms as a product (22 and 9 ms in float32). In float64
    torch has no oneDNN, and reads all weights again for each image. A channels-last map is a matrix (N H W, C) as it
    lies in memory, and so are channels-last weights, (C_out, 3 3 C_in): nothing is copied but what each window covers
    (ops/unfold.py), for kernels larger than 1. Both forms are the same sums in another order. Traced and exported
    networks have torch's convolutions, which hold for any number of images, and so have torch.func's transforms.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        if not self._as_product(x):
            return super().forward(x)
        assert not isinstance(self.padding, str)
        kernel, stride, padding = self.kernel_size, self.stride, self.padding
        h, w = (windows(*of) for of in zip(x.shape[2:], kernel, stride, padding, strict=True))
        if (kernel, stride, padding) == ((1, 1), (1, 1), (0, 0)):
            rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        else:
            rows = unfold(x, kernel, stride=stride, padding=padding)
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.out_channels, -1)
        product = linear(rows, weight, self.bias)
        return product.view(x.shape[0], h, w, self.out_channels).permute(0, 3, 1, 2)

    def _as_product(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float32, torch.float64) or x.ndim != 4:
            return False
        if torch.is_autocast_enabled("cpu") and x.dtype != torch.get_autocast_dtype("cpu"):
            return False
        if self.groups != 1 or self.dilation != (1, 1) or self.padding_mode != "zeros" or isinstance(self.padding, str):
            return False
        if left_to_torch():
            return False
        sides = [side + 2 * pad for side, pad in zip(x.shape[2:], self.padding, strict=True)]
        if any(side < kernel for side, kernel in zip(sides, self.kernel_size, strict=True)):
            # Refused by torch.
            return False
        places = x.shape[0] * (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])
        alone = self.kernel_size == (1, 1)
        if x.dtype == torch.bfloat16:
            pays = alone or places < self.weight[0].numel()
        else:
            # Here oneDNN is near the processor's limit unless the map is that small: measured in float32 from 32 to 224
            # px on ResNet-18 and 50.
            pays = self.weight.numel() > (10 if alone else 2000) * places
        return pays and x.is_contiguous(memory_format=torch.channels_last)
