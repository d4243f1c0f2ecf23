"""fastmoco.adapters.lightly beside lightly itself: values, gradients, banks, state dicts and mistakes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmoco.adapters import lightly as ours
from fastmoco.adapters.between import take_rows
from fastmoco.distributed.world import World
from worlds import in_world

theirs = pytest.importorskip("lightly.loss", reason="lightly is not installed")
their_modules = pytest.importorskip("lightly.models.modules", reason="lightly is not installed")
their_bank = pytest.importorskip("lightly.models.modules.memory_bank", reason="lightly is not installed")
their_utils = pytest.importorskip("lightly.models.utils", reason="lightly is not installed")

SHAPES = [(1, 3), (2, 16), (7, 33), (32, 128)]


def views(shape: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two tensors that are not of unit length, and want gradients."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(*shape, generator=generator)
    b = a + torch.randn(*shape, generator=generator)
    return (3 * a).requires_grad_(), b.requires_grad_()


def with_gradients(
    loss: Callable[[Tensor, Tensor], Tensor], shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The loss of two views and its gradients to both."""
    a, b = (view.detach().to(dtype).requires_grad_() for view in views(shape, seed))
    value = loss(a, b)
    value.backward()
    assert a.grad is not None and b.grad is not None
    return [value.detach(), a.grad, b.grad]


def compare(found: Sequence[Tensor], expected: Sequence[Tensor], *, tolerance: float = 1e-6) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.0, -1.0])
def test_within_a_batch(shape: tuple[int, int], temperature: float) -> None:
    pair = ours.NTXentLoss(temperature), theirs.NTXentLoss(temperature)
    own, other = (with_gradients(loss, shape) for loss in pair)
    compare(own, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_against_a_memory_bank_that_the_batch_does_not_divide(shape: tuple[int, int]) -> None:
    size = (2 * shape[0] + 1, shape[1])
    own, other = ours.NTXentLoss(0.1, size), theirs.NTXentLoss(0.1, size)
    own.memory_bank.bank.copy_(other.memory_bank.bank)
    for step in range(5):
        compare(with_gradients(own, shape, step), with_gradients(other, shape, step))
        compare([own.memory_bank.bank], [other.memory_bank.bank])
        assert int(own.memory_bank.bank_ptr) == int(other.memory_bank.bank_ptr)
    # A batch that no gradient is wanted of is not kept.
    before = own.memory_bank.bank.clone()
    own(*(view.detach() for view in views(shape)))
    assert torch.equal(own.memory_bank.bank, before)
    assert own.state_dict() == other.state_dict() == {}


def test_a_bank_may_go_on_at_its_start_and_be_kept_with_the_model() -> None:
    loss = ours.NTXentLoss(0.1, (5, 4), wrap=True, persistent=True)
    rows = torch.arange(28.0).view(7, 4)
    loss.memory_bank(rows[:3], update=True)
    loss.memory_bank(rows[3:], update=True)
    assert torch.equal(loss.memory_bank.bank, rows[[5, 6, 2, 3, 4]]) and int(loss.memory_bank.bank_ptr) == 2
    loss.memory_bank(rows, update=True)
    assert torch.equal(loss.memory_bank.bank.sort(0).values, rows[2:])
    # The next batch goes over the oldest.
    assert torch.equal(loss.memory_bank.bank[int(loss.memory_bank.bank_ptr)], rows[2])
    again = ours.NTXentLoss(0.1, (5, 4), wrap=True, persistent=True)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.memory_bank.bank, loss.memory_bank.bank)


@pytest.mark.parametrize("size", [(6, 4), 0])
@pytest.mark.parametrize("first", [True, False])
def test_a_memory_bank_alone(size: Any, first: bool) -> None:
    own, other = (module.MemoryBankModule(size, feature_dim_first=first) for module in (ours, their_bank))
    own.bank.copy_(other.bank)
    for step in range(4):
        batch = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        (out, bank), (_, expected) = (module(batch, update=step != 2) for module in (own, other))
        assert out is batch
        assert bank is expected is None or torch.equal(bank, expected)


def test_a_bank_of_no_dimension_takes_its_batchs() -> None:
    with pytest.warns(UserWarning, match=r"size=\(n, dim\)"):
        loss = ours.NTXentLoss(0.2, 8)
    assert loss(*views((3, 5))).item() > 0
    assert loss.memory_bank.bank.shape == (8, 5)


@pytest.mark.parametrize(("shape", "double"), [((7, 33), 0), ((32, 128), 0), ((96, 20), 0), ((2, 16), 1), ((7, 33), 1)])
@pytest.mark.parametrize("weight", [5e-3, 1.0])
def test_barlow_twins(shape: tuple[int, int], double: bool, weight: float) -> None:
    """A batch of two, whose columns are +-1 whatever they are, in float64, as its gradient is all rounding else."""
    dtype, tolerance = (torch.float64, 1e-9) if double else (torch.float32, 1e-6)
    own, other = (
        with_gradients(module.BarlowTwinsLoss(weight), shape, dtype=dtype) for module in (ours, theirs)
    )
    compare(own, other, tolerance=tolerance)


def test_mistakes() -> None:
    for module in (ours, their_bank):
        with pytest.raises(ValueError, match="Illegal memory bank size -1"):
            module.MemoryBankModule(-1)
        with pytest.raises(ValueError, match=r"Illegal memory bank size \(1, 2, 3\)"):
            module.MemoryBankModule((1, 2, 3))
    for losses in (ours, theirs):
        with pytest.raises(ValueError, match="Illegal temperature"):
            losses.NTXentLoss(0.0)
        with pytest.raises(ValueError):
            losses.BarlowTwinsLoss()(*views((1, 4)))


@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "batch_norm": True}, {"num_layers": 1}])
def test_the_head_has_the_same_weights_under_the_same_names(options: dict[str, Any]) -> None:
    own, other = (module.MoCoProjectionHead(16, 24, 8, **options) for module in (ours, their_modules))
    assert [*own.state_dict()] == [*other.state_dict()]
    own.load_state_dict(other.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(own(x), other(x))


def test_momentum_moves_parameters_and_not_buffers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model(torch.randn(2, 3, 5, 5))
    other = copy.deepcopy(average)
    ours.update_momentum(model, average, m=0.99)
    their_utils.update_momentum(model, other, m=0.99)
    compare([*average.state_dict().values()], [*other.state_dict().values()])


def test_parameters_may_be_frozen_and_let_go() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for end, wanted in (("deactivate", False), ("activate", True)):
        for module in (ours, their_utils):
            model.requires_grad_(not wanted)
            getattr(module, f"{end}_requires_grad")(model)
            assert all(parameter.requires_grad == wanted for parameter in model.parameters())
        assert f"{end}_requires_grad" in ours.__all__


def test_a_shuffled_batch_comes_back() -> None:
    batch = torch.arange(10.0).view(5, 2)
    torch.manual_seed(3)
    shuffled, shuffle = ours.batch_shuffle(batch)
    torch.manual_seed(3)
    expected, their_shuffle = their_utils.batch_shuffle(batch)
    assert torch.equal(shuffled, expected) and torch.equal(shuffle, their_shuffle)
    assert torch.equal(ours.batch_unshuffle(shuffled, shuffle), batch)


def _of_all(world: World, module: str) -> dict[str, Any]:
    """What both libraries make of batches that differ between processes."""
    import lightly.loss
    import lightly.models.utils

    losses: Any = ours if module == "ours" else lightly.loss
    found: dict[str, Any] = {}
    for name, loss in {
        "batch": losses.NTXentLoss(0.2, gather_distributed=True),
        "bank": losses.NTXentLoss(0.2, (9, 12), gather_distributed=True),
        "barlow": losses.BarlowTwinsLoss(gather_distributed=True),
    }.items():
        if name == "bank":
            generator = torch.Generator().manual_seed(5)
            loss.memory_bank.bank.copy_(torch.randn(9, 12, generator=generator))
        found[name] = with_gradients(loss, (4, 12), seed=world.rank)
        if name == "bank":
            found[name].append(loss.memory_bank.bank)
    own: Any = ours if module == "ours" else lightly.models.utils
    torch.manual_seed(world.rank)
    batch = (torch.arange(12, dtype=torch.float16).view(4, 3) + 100 * world.rank).contiguous()
    shuffled, shuffle = own.batch_shuffle(batch, distributed=True)
    found["shuffle"] = [shuffled, own.batch_unshuffle(shuffled, shuffle, distributed=True)]
    assert torch.equal(found["shuffle"][1], batch)
    return found


def test_over_processes() -> None:
    """Negatives of all, the bank of all, C of all, and images that change places."""
    for own, other in zip(in_world(2, _of_all, "ours"), in_world(2, _of_all, "theirs"), strict=True):
        assert [*own] == [*other]
        for name in own:
            compare(own[name], other[name], tolerance=2e-6)


def _taken(world: World) -> bool:
    rows = torch.arange(6.0).view(3, 2) + 100 * world.rank
    everyone = torch.cat([rows - 100 * world.rank + 100 * rank for rank in range(world.size)])
    for seed in range(20):
        index = torch.randperm(3 * world.size, generator=torch.Generator().manual_seed(seed))
        wanted = everyone[index.view(world.size, 3)[world.rank]]
        if not torch.equal(take_rows(rows, index), wanted):
            return False
    return True


def test_rows_go_where_they_are_wanted() -> None:
    assert all(in_world(3, _taken))
