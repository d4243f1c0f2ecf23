"""BatchNorms over all processes, over groups of images and with frozen statistics, against torch's own in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastmoco.distributed.world import World
from fastmoco.errors import UserError
from fastmoco.models import norm as blocks
from fastmoco.models.batch_norms import (
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    convert_norms,
)
from fastmoco.models.encoder import Encoder
from parity import relative_error
from runs import NoSync
from worlds import in_world

ROWS, CHANNELS = 12, 5
SHAPES = [(ROWS, CHANNELS), (ROWS, CHANNELS, 3, 4)]


def norm_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.BatchNorm1d | nn.BatchNorm2d:
    """A BatchNorm for maps of `shape` with weights and running statistics of its own."""
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1], momentum=0.3).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert value is not None
            value.copy_(0.5 + torch.rand(shape[1], generator=generator))
    return norm


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, level: float = 3.0) -> tuple[Tensor, Tensor]:
    """A map whose images differ in mean and width, so that a part's statistics are not the whole's, and a gradient."""
    generator = torch.Generator().manual_seed(4)
    x, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    image = torch.arange(shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    x = (x * (1 + image / 5) + image / 2 + level).to(dtype)
    memory = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return x.contiguous(memory_format=memory), g.to(dtype).contiguous(memory_format=memory)


def run(norm: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """y, the gradients to x, weight and bias, and the buffers afterwards."""
    x = x.clone().requires_grad_()
    y = norm(x)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    names = [name for name, _ in norm.named_parameters()]
    dx, *rest = torch.autograd.grad(y, [x, *norm.parameters()], g)
    gradients = {f"d{name}": value for name, value in zip(names, rest, strict=True)}
    return {"y": y.detach(), "dx": dx} | gradients | {name: value.clone() for name, value in norm.named_buffers()}


def _synchronised(
    world: World, shape: tuple[int, ...], dtype: torch.dtype, level: float
) -> tuple[dict[str, Tensor], int]:
    norm = norm_of(shape, torch.promote_types(dtype, torch.float32))
    convert_norms(norm, "sync", world=world)
    assert isinstance(norm, (SyncBatchNorm1d, SyncBatchNorm2d))
    x, g = inputs(shape, dtype, level)
    own = slice(world.rank * ROWS // world.size, (world.rank + 1) * ROWS // world.size)
    with NoSync():
        results = run(norm, x[own], g[own])
    return results, world.sent["norms"]


def whole(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batch's maps, the sums of the processes' gradients to the weights, and one process's buffers."""
    maps = {name: torch.cat([part[name] for part in parts]) for name in ("y", "dx")}
    sums = {name: sum(part[name] for part in parts) for name in ("dweight", "dbias")}
    return parts[0] | maps | sums


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_synchronised_it_is_one_process_of_the_whole_batch(shape: tuple[int, ...], size: int) -> None:
    expected = run(norm_of(shape), *inputs(shape))
    results = in_world(size, _synchronised, shape, torch.float64, 3.0)
    parts = [part for part, _ in results]
    for name, value in whole(parts).items():
        assert relative_error(value, expected[name]) <= 1e-12, name
    for part in parts[1:]:
        assert all(torch.equal(part[name], parts[0][name]) for name in ("running_mean", "running_var"))
    # Two rows of statistics gathered from each, two summed.
    row = 2 * CHANNELS * 8
    assert [sent for _, sent in results] == [(size - 1) * row + 2 * row * (size - 1) // size] * size


def test_synchronised_statistics_far_from_zero_keep_their_digits() -> None:
    """As sums of squares a variance of 1 about a mean of 1000 would have no digit in float32."""
    shape = SHAPES[1]
    x, g = inputs(shape, torch.float32, 1000.0)
    expected = run(norm_of(shape), x.double(), g.double())
    actual = whole([part for part, _ in in_world(3, _synchronised, shape, torch.float32, 1000.0)])
    for name, value in actual.items():
        assert relative_error(value, expected[name]) <= 1e-4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_synchronised_narrow_maps_have_wide_statistics(dtype: torch.dtype) -> None:
    shape = SHAPES[1]
    x, g = inputs(shape, dtype)
    expected = run(norm_of(shape), x.double(), g.double())
    actual = whole([part for part, _ in in_world(2, _synchronised, shape, dtype, 3.0)])
    unit = torch.finfo(dtype).eps
    for name, value in actual.items():
        assert relative_error(value, expected[name]) <= (unit if name in ("y", "dx") else 1e-5), name


def test_in_evaluation_and_in_a_world_of_one_it_is_torchs() -> None:
    shape = SHAPES[1]
    x, g = inputs(shape)
    alone = norm_of(shape)
    convert_norms(alone, "sync", world=World())
    assert type(alone) is nn.BatchNorm2d
    # There is no process to meet: anything sent would raise.
    evaluated, torchs = norm_of(shape), norm_of(shape).eval()
    convert_norms(evaluated, "sync", world=World(size=2))
    mine, expected = run(evaluated.eval(), x, g), run(torchs, x, g)
    assert mine.keys() == expected.keys() and all(torch.equal(mine[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_frozen_statistics_are_used_and_stay(shape: tuple[int, ...]) -> None:
    frozen, torchs = norm_of(shape), norm_of(shape).eval()
    convert_norms(frozen, "frozen", world=World())
    assert frozen.training
    mine, expected = run(frozen, *inputs(shape)), run(torchs, *inputs(shape))
    assert mine.keys() == expected.keys() and all(torch.equal(mine[name], expected[name]) for name in expected)
    assert mine["dweight"].abs().min() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_have_their_own_statistics(shape: tuple[int, ...]) -> None:
    grouped = norm_of(shape)
    convert_norms(grouped, "batch", groups=3, world=World())
    x, g = inputs(shape)
    apart = [run(norm_of(shape), *part) for part in zip(x.chunk(3), g.chunk(3), strict=True)]
    expected = whole(apart)
    mine = run(grouped, x, g)
    for name in ("y", "dx", "dweight", "dbias"):
        assert relative_error(mine[name], expected[name]) <= 1e-12, name
    for name in ("running_mean", "running_var"):
        assert relative_error(mine[name], torch.stack([part[name] for part in apart]).mean(dim=0)) <= 1e-12, name
    assert mine["num_batches_tracked"] == 1
    assert torch.equal(grouped.eval()(x), nn.functional.batch_norm(
        x, grouped.running_mean, grouped.running_var, grouped.weight, grouped.bias
    ))  # fmt: skip
    grouped.train()
    with pytest.raises(UserError, match=r"--norm-groups 3: a process's 10 images"):
        grouped(x[:10])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("norm", "groups"), [("sync", 1), ("frozen", 1), ("batch", 2)])
def test_an_encoder_keeps_its_keys_and_its_blocks(
    norm: str, groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where plain BatchNorms would be fused with what follows."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the fused normalisation ran")

    monkeypatch.setattr(blocks, "batch_norm", refuse)
    monkeypatch.setattr(blocks, "LARGE", 0)
    encoder = Encoder("resnet18", seed=0)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    converted = copy.deepcopy(encoder)
    convert_norms(converted, norm, groups=groups, world=World(size=2))  # type: ignore[arg-type]
    changed = [part for part in converted.modules() if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert len(changed) == 20 and not any(isinstance(part, blocks.FusedBatchNorm2d) for part in changed)
    assert list(converted.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items())
    if norm != "sync":
        images = torch.rand(4, 3, 32, 32).to(dtype, memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            stages = converted.to(memory_format=torch.channels_last)(images).stages
        assert all(stage.dtype == dtype and stage.isfinite().all() for stage in stages)
