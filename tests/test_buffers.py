"""A batch's memory is used again, and never while anybody holds the batch."""

from __future__ import annotations

import torch

from fastmoco.data.buffers import Buffers


def test_memory_comes_again_only_when_nobody_holds_it() -> None:
    buffers = Buffers(2)
    first = buffers.take((4, 3))
    assert first.shape == (4, 3) and first.dtype == torch.float16 and first.is_contiguous()
    place = first.data_ptr()
    part = first[1:].permute(1, 0)
    del first
    second = buffers.take((4, 3))
    assert second.data_ptr() != place
    beyond = buffers.take((4, 3))
    assert len({place, second.data_ptr(), beyond.data_ptr()}) == 3
    del part
    again = buffers.take((4, 3))
    assert again.data_ptr() == place
    # Kept alive by a graph that will need it.
    weight = torch.ones(3, dtype=torch.float16, requires_grad=True)
    product = (again * weight).sum()
    del again
    assert buffers.take((4, 3)).data_ptr() != place
    product.backward()
    del product
    assert buffers.take((4, 3)).data_ptr() == place
    assert buffers.take((2, 3)).data_ptr() != place
