"""Lists of tensors as one table in device memory, so that one launch goes over all of them.

A row of int64 a tensor, its addresses and its number of elements, then two int32's worth a block: its tensor and its
first element. The rows change only where memory was allocated anew, so tables are kept by their addresses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program, and its threads: 16 elements each, four loads of 16 bytes of float32 a list.
BLOCK, NUM_WARPS = 4096, 8

# Gradients may take turns in a few places; each table has a few hundred KB at most.
KEPT = 16

_tables: OrderedDict[tuple[object, ...], Table] = OrderedDict()
# A captured graph reads its table, and the upload it may repeat reads the host's copy, for as long as it is replayed.
_captured: set[Table] = set()


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """`memory`: `tensors` rows of addresses and size, then `blocks` pairs; `aligned` all to 16 bytes.

    `host` is what `memory` was uploaded from.
    """

    memory: Tensor
    host: Tensor
    tensors: int
    blocks: int
    aligned: bool


def table(lists: Sequence[Sequence[Tensor | None]]) -> Table:
    """The table of lists whose i-th tensors have one size; None has address 0. No two tables for the same memory."""
    addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in tensors] for tensors in lists]
    first = [tensor for tensor in lists[0] if tensor is not None]
    assert len(first) == len(lists[0])
    sizes = [tensor.numel() for tensor in first]
    device = first[0].device
    cuda = device.type == "cuda"
    # Another stream might read before this one has uploaded.
    stream = torch.cuda.current_stream(device).cuda_stream if cuda else 0
    key = (device, stream, *map(tuple, addresses), tuple(sizes))
    capturing = _capturing(device)
    if key in _tables:
        _tables.move_to_end(key)
        if capturing:
            _captured.add(_tables[key])
        return _tables[key]

    counts = (torch.tensor(sizes) + BLOCK - 1) // BLOCK
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    start = (torch.arange(len(tensor)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)) * BLOCK
    rows = torch.tensor([*addresses, sizes]).T
    host = torch.cat([rows.flatten(), torch.stack([tensor, start], dim=1).flatten()])
    if cuda:
        host = host.pin_memory()
    aligned = all(address % 16 == 0 for column in addresses for address in column)
    made = Table(host.to(device, non_blocking=True), host, len(sizes), len(tensor), aligned)
    if capturing:
        # Uploaded only when the graph is replayed, hence of no use to others.
        _captured.add(made)
        return made
    _tables[key] = made
    if len(_tables) > KEPT:
        _tables.popitem(last=False)
    return made


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@triton.jit
def locate(memory, tensors, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row of the table, its first element, and how many its tensor has from there on."""
    block = memory + tl.cast(tensors, tl.int64) * COLUMNS + 2 * tl.program_id(0)
    row = memory + tl.load(block) * COLUMNS
    start = tl.load(block + 1)
    return row, tl.multiple_of(start, BLOCK), tl.load(row + COLUMNS - 1) - start


@triton.jit
def pointer(row, column, start, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Element `start` of the tensor in this column."""
    address = tl.cast(tl.load(row + column), tl.pointer_type(ELEMENT))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + start
