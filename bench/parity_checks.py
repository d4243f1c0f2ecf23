"""Which of our operations stand beside which of the peers' in the table of parity."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import paper
from bench.harness import Missing
from fastmoco.adapters import lightly as under_lightly
from fastmoco.adapters import solo as under_solo
from fastmoco.ops import definitions
from fastmoco.ops.batch_contrast import ntxent, supcon
from fastmoco.ops.crosscorr import crosscorr
from fastmoco.ops.infonce import infonce
from fastmoco.ops.mixed_crosscorr import mixed_crosscorr
from fastmoco.ops.pooled_mse import pooled_mse
from fastmoco.train.config import LossConfig, ModelConfig
from fastmoco.train.objective import MomentumContrast

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Check:
    """`ours` against `theirs`, which makes the peer's function or raises Missing; both take tensors of `shapes`, which
    stand in unit length where `unit`, and give a loss. The peer's takes float64 too, where `exact`."""

    ours: str
    peer: str
    shapes: tuple[tuple[int, ...], ...]
    own: Loss
    theirs: Callable[[], Loss]
    unit: bool = False
    exact: bool = True


def _from_lightly(make: Callable[[Any], Loss]) -> Callable[[], Loss]:
    def build() -> Loss:
        try:
            import lightly.loss
        except ModuleNotFoundError as error:
            raise Missing("lightly is not installed") from error
        return make(lightly.loss)

    return build


def _with_bank(module: Any) -> Loss:
    """lightly's and ours alike: the negatives are the third input."""

    def loss(a: Tensor, b: Tensor, bank: Tensor) -> Tensor:
        value: Tensor = _criterion(module, bank)(a, b)
        return value

    return loss


def _criterion(module: Any, bank: Tensor) -> Any:
    """The NTXentLoss of `module`, lightly's or ours, with the negatives `bank`."""
    criterion = module.NTXentLoss(0.2, tuple(bank.shape))
    criterion.memory_bank.bank = bank.detach().clone()
    return criterion


def _both_logits(query0: Tensor, key1: Tensor, query1: Tensor, key0: Tensor, bank: Tensor) -> Tensor:
    """Both directions, of vectors of any length, each against the bank as it is given."""
    query0, key1, query1, key0 = (F.normalize(z, dim=1) for z in (query0, key1, query1, key0))
    return (paper.info_nce(query0, key1, bank.detach(), 0.2) + paper.info_nce(query1, key0, bank.detach(), 0.2)) / 2


def _logits(query: Tensor, key: Tensor, bank: Tensor) -> Tensor:
    """solo-learn's and MoCo's form: all logits, cross entropy."""
    return paper.info_nce(query, key, bank.detach(), 0.1)


def _solo_barlow(z1: Tensor, z2: Tensor) -> Tensor:
    c = paper.cross_correlation(z1, z2)
    return 0.025 * paper.barlow(c, 1.0, 5e-3)


@functools.cache
def _symmetric_moco() -> MomentumContrast:
    """With a key encoder that is not the query encoder, and no residual branch at zero."""
    made = MomentumContrast(
        ModelConfig(arch="resnet18", zero_init_residual=False), LossConfig(symmetric=True, temperature=0.2), seed=0
    )
    with torch.no_grad():
        for parameter in made.key.parameters():
            parameter.mul_(1.1)
    return made


def _trained_both_ways(view1: Tensor, view2: Tensor, bank: Tensor) -> Tensor:
    loss: Tensor = _symmetric_moco()(view1, view2, F.normalize(bank.detach(), dim=1)).losses["infonce"]
    return loss


def _two_infonces(view1: Tensor, view2: Tensor, bank: Tensor) -> Tensor:
    """The same encoders, each view once through both."""
    moco = _symmetric_moco()
    queries = [moco.query(view).embedding for view in (view1, view2)]
    keys = [moco.key(view).embedding.detach() for view in (view1, view2)]
    return _both_logits(queries[0], keys[1], queries[1], keys[0], F.normalize(bank, dim=1))


def _order(rows: Tensor) -> Tensor:
    """In which the second views are mixed: none with its own image's first."""
    return torch.arange(len(rows)).roll(1)


def _mixed(mixed: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    return mixed_crosscorr(mixed, z1, z2, _order(z1), 0.3)


def _mixed_as_published(mixed: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    return definitions.mixed_crosscorr(mixed, z1, z2, _order(z1), 0.3)


def _classes(rows: Tensor) -> Tensor:
    """Of nine or ten images each, and some that are of unknown class."""
    return torch.arange(len(rows)) % 7 - 1


CHECKS = (
    Check(
        "adapters.lightly.NTXentLoss, memory bank", "lightly", ((32, 128), (32, 128), (4096, 128)),
        _with_bank(under_lightly), _from_lightly(_with_bank), unit=True,
    ),
    Check(
        "adapters.lightly.NTXentLoss, within the batch", "lightly", ((64, 128), (64, 128)),
        under_lightly.NTXentLoss(0.5), _from_lightly(lambda module: module.NTXentLoss(0.5)),
    ),
    Check(
        "adapters.lightly.BarlowTwinsLoss", "lightly", ((64, 512), (64, 512)),
        under_lightly.BarlowTwinsLoss(), _from_lightly(lambda module: module.BarlowTwinsLoss()),
    ),
    Check(
        "adapters.solo.mocov2plus_loss_func", "its formula in torch", ((32, 128), (32, 128), (4096, 128)),
        lambda q, k, bank: under_solo.mocov2plus_loss_func(q, k, bank.detach().T), lambda: _logits, unit=True,
    ),
    Check(
        "adapters.solo.barlow_loss_func", "its formula in torch", ((64, 512), (64, 512)),
        under_solo.barlow_loss_func, lambda: _solo_barlow,
    ),
    Check(
        "ops.infonce", "the paper's code", ((32, 128), (32, 128), (65536, 128)),
        lambda q, k, bank: infonce(q, k, bank.detach(), temperature=0.07),
        lambda: lambda q, k, bank: paper.info_nce(q, k, bank.detach(), 0.07), unit=True,
    ),
    Check(
        "ops.crosscorr", "the paper's code", ((32, 2048), (32, 2048)),
        lambda a, b: crosscorr(a, b, scale=5e-5 / 32),
        lambda: lambda a, b: 5e-5 * paper.barlow(paper.cross_correlation(a, b), 1 / 32, 1.0),
    ),
    Check(
        "ops.pooled_mse", "the paper's code", ((8, 64, 37, 29), (8, 64, 37, 29)),
        lambda a, b: pooled_mse(a, b, grid=16), lambda: lambda a, b: paper.stage_mse(a, b, 16),
    ),
    Check(
        "ops.ntxent, margin", "its formula in torch", ((64, 128), (64, 128)),
        lambda a, b: ntxent(a, b, temperature=0.2, margin=0.1).loss,
        lambda: lambda a, b: definitions.supcon(a, b, torch.arange(len(a)), temperature=0.2, margin=0.1)[0],
    ),
    Check(
        "ops.supcon", "its formula in torch", ((64, 128), (64, 128)),
        lambda a, b: supcon(a, b, _classes(a), temperature=0.1).loss,
        lambda: lambda a, b: definitions.supcon(a, b, _classes(a), temperature=0.1)[0],
    ),
    Check(
        "ops.mixed_crosscorr, N x N", "its formula in torch", ((64, 512),) * 3, _mixed, lambda: _mixed_as_published
    ),
    Check(
        "ops.mixed_crosscorr, D x D", "its formula in torch", ((256, 128),) * 3, _mixed, lambda: _mixed_as_published
    ),
    Check(
        "adapters.lightly.NTXentLoss.symmetric", "its formula in torch", (*((32, 128),) * 4, (4096, 128)),
        lambda *z: _criterion(under_lightly, z[-1]).symmetric(*z[:-1]), lambda: _both_logits, unit=True,
    ),
    Check(
        "train.objective.MomentumContrast, symmetric", "its formula in torch", ((8, 3, 64, 64),) * 2 + ((4096, 128),),
        _trained_both_ways, lambda: _two_infonces, exact=False,
    ),
)  # fmt: skip
