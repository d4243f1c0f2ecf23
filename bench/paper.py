"""The published method, transcribed line by line in plain PyTorch: what fastmoco is proven against.

Source: Kaku, Upadhya and Razavian, "Intermediate Layers Matter in Momentum Contrastive Self Supervised Learning"
(arXiv 2110.14805) and its code. Nothing of fastmoco is imported here, and nothing is made fast: an oracle that shared
code with what it judges would share its mistakes. Everything is computed in the dtype and on the device of the encoder
state it is given: float64 for an oracle, float32 where `bench.step` times it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchvision.models.resnet import ResNet

State = dict[str, Tensor]
StageLoss = Literal["none", "mse", "barlow"]

CHEST_GRIDS = FUNDUS_GRIDS = (16, 16, 4, 4)
HISTOLOGY_GRIDS = (1, 1, 1, 1)
MSE_WEIGHT = 0.25
BARLOW_WEIGHT = 5e-5
BARLOW_SCALE = 1 / 32
BARLOW_TWINS_OFFDIAG = 0.005


# Networks


def build_encoder(arch: str, dim: int, mlp: bool) -> ResNet:
    """torchvision's ResNet, zero-init residual, `fc` giving (N, dim): one layer, with `mlp` MoCo v2's two."""
    # Here: it takes as long to import as torch itself, which whoever only names this step need not wait for.
    from torchvision.models import ResNet, get_model

    encoder = get_model(arch, weights=None, num_classes=dim, zero_init_residual=True)
    assert isinstance(encoder, ResNet)
    if mlp:
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    return encoder


def build_projector(features: int, width: int) -> nn.Sequential:
    """(N, features) -> (N, width) through three linear layers without bias."""
    return nn.Sequential(
        nn.Linear(features, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
    )


def encode(encoder: ResNet, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Images (N, 3, H, W) -> embedding (N, D) of length 1, and residual stages 1 to 4, (N, C_s, H_s, W_s)."""
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x))))
    stage1 = encoder.layer1(x)
    stage2 = encoder.layer2(stage1)
    stage3 = encoder.layer3(stage2)
    stage4 = encoder.layer4(stage3)
    pooled = torch.flatten(encoder.avgpool(stage4), 1)
    return F.normalize(encoder.fc(pooled), dim=1), [stage1, stage2, stage3, stage4]


def initial_encoder_state(arch: str, dim: int, *, mlp: bool, seed: int, dtype: torch.dtype) -> State:
    """A fresh encoder's state dict in torchvision's key layout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder: nn.Module = build_encoder(arch, dim, mlp)
    return encoder.to(dtype).state_dict()


def initial_projector_states(arch: str, width: int, *, seed: int, dtype: torch.dtype) -> list[State]:
    """Fresh projectors for stages 1 to 4 of `arch`; keys are those of `build_projector`'s Sequential."""
    features = build_encoder(arch, 1, mlp=False).fc.in_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [build_projector(features // 2**s, width).to(dtype).state_dict() for s in (3, 2, 1, 0)]


# Losses


def info_nce(q: Tensor, k: Tensor, queue: Tensor, tau: float) -> Tensor:
    """q, k (N, D) and queue (K, D), rows of length 1 -> cross entropy with the positive as class 0."""
    positive = (q * k).sum(dim=1, keepdim=True)
    negative = q @ queue.T
    logits = torch.cat([positive, negative], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def stage_mse(a: Tensor, b: Tensor, grid: int) -> Tensor:
    """Stage maps (N, C, H, W) of the two views -> mean squared difference, both pooled to grid x grid."""
    a = F.adaptive_avg_pool2d(a, (grid, grid))
    b = F.adaptive_avg_pool2d(b, (grid, grid))
    return ((a - b) ** 2).mean()


def cross_correlation(z1: Tensor, z2: Tensor) -> Tensor:
    """Projections (N, d) of the two views, each put through BatchNorm without affine -> C (d, d)."""
    z1 = F.batch_norm(z1, None, None, training=True, eps=1e-5)
    z2 = F.batch_norm(z2, None, None, training=True, eps=1e-5)
    return z1.T @ z2 / len(z1)


def barlow(c: Tensor, scale: float, lambda_offdiag: float) -> Tensor:
    """scale * (sum (C_ii - 1)^2 + lambda_offdiag * sum_{i != j} C_ij^2)."""
    d = len(c)
    on = ((c.diagonal() - 1) ** 2).sum()
    # Without its last element the flattened matrix is d - 1 rows of d + 1, the diagonal in the first column.
    off = (c.flatten()[:-1].view(d - 1, d + 1)[:, 1:] ** 2).sum()
    return scale * (on + lambda_offdiag * off)


# The step


@dataclass(kw_only=True)
class Record:
    """What one step computed; every tensor is a detached copy.

    Query and key names are torchvision's (`conv1.weight`, ...); the projector lists are by stage, 1 to 4, and
    empty unless the stage loss is Barlow's.
    """

    losses: dict[str, Tensor]  # "infonce", "stage1".."stage4" as weighted in the sum, "total"; 0-d
    gradients: State
    projector_gradients: list[State]
    key_parameters: State  # as used in this step's key forward
    query_parameters: State  # after SGD
    projector_parameters: list[State]  # after SGD
    queue: Tensor  # (K, D) after the enqueue
    pointer: int  # the row the next key goes to


class Paper:
    """Pretraining of one process, a step at a time.

    `encoder_state` is in torchvision's key layout, the head at `fc.*` (`fc.0.*` and `fc.2.*` with `mlp`).
    `queue` is (K, D) Gaussian vectors, normalised here. `projector_states` has one state a stage for Barlow,
    else none. `stage_weight` is the lambda of every stage; None is the published one of the stage loss.
    `lambda_offdiag` 1 is the published loss, `BARLOW_TWINS_OFFDIAG` Barlow Twins'. `lr` and `m` may be set
    between steps. AssertionError or RuntimeError if the states do not fit.
    """

    def __init__(
        self,
        *,
        encoder_state: State,
        queue: Tensor,
        projector_states: Sequence[State] = (),
        arch: str = "resnet50",
        mlp: bool = False,
        m: float = 0.999,
        tau: float = 0.07,
        lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        stage_loss: StageLoss = "none",
        stage_weight: float | None = None,
        grids: tuple[int, int, int, int] = CHEST_GRIDS,
        barlow_scale: float = BARLOW_SCALE,
        lambda_offdiag: float = 1.0,
    ) -> None:
        assert len(projector_states) == (4 if stage_loss == "barlow" else 0)
        like = encoder_state["conv1.weight"]  # sets dtype and device

        self.query = build_encoder(arch, queue.shape[1], mlp).to(like)
        self.query.load_state_dict(encoder_state)
        self.key = copy.deepcopy(self.query)
        self.key.requires_grad_(False)
        self.query.train()
        self.key.train()

        self.projectors: list[nn.Sequential] = []
        for state in projector_states:
            width, features = state["0.weight"].shape
            projector = build_projector(features, width).to(like)
            projector.load_state_dict(state)
            projector.train()
            self.projectors.append(projector)

        self.queue = F.normalize(queue.to(like), dim=1)
        self.pointer = 0
        self.momentum_buffers: dict[nn.Parameter, Tensor] = {}

        self.m, self.tau = m, tau
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.stage_loss, self.grids = stage_loss, grids
        published = {"none": 0.0, "mse": MSE_WEIGHT, "barlow": BARLOW_WEIGHT}[stage_loss]
        self.stage_weight = published if stage_weight is None else stage_weight
        self.barlow_scale, self.lambda_offdiag = barlow_scale, lambda_offdiag

    def step(self, x_q: Tensor, x_k: Tensor) -> Record:
        """One step on two views (N, 3, H, W) of the same N images, N no greater than the queue."""
        losses = self.backward(x_q, x_k)
        self.sgd()
        # Neither SGD nor anything after the key's forward pass has touched the gradients and the key's weights.
        return Record(
            losses={name: value.detach().clone() for name, value in losses.items()},
            gradients=gradients_of(self.query),
            projector_gradients=[gradients_of(p) for p in self.projectors],
            key_parameters=parameters_of(self.key),
            query_parameters=parameters_of(self.query),
            projector_parameters=[parameters_of(p) for p in self.projectors],
            queue=self.queue.clone(),
            pointer=self.pointer,
        )

    def backward(self, x_q: Tensor, x_k: Tensor) -> dict[str, Tensor]:
        """All of a step but SGD; the losses, with the gradients left in the parameters."""
        self.update_key()

        with torch.no_grad():
            k, key_stages = encode(self.key, x_k)
        q, query_stages = encode(self.query, x_q)

        # A clone, because backward reads the negatives after the enqueue has overwritten some of them.
        losses = {"infonce": info_nce(q, k, self.queue.clone(), self.tau)}
        if self.stage_loss != "none":
            for s in range(4):
                value = self.stage(s, query_stages[s], key_stages[s])
                losses[f"stage{s + 1}"] = self.stage_weight * value
        losses["total"] = torch.stack(list(losses.values())).sum()

        self.enqueue(k)

        for module in (self.query, *self.projectors):
            module.zero_grad(set_to_none=True)
        losses["total"].backward()
        return losses

    @torch.no_grad()
    def update_key(self) -> None:
        """theta_k <- m theta_k + (1 - m) theta_q, parameters alone: BatchNorm buffers are not averaged."""
        for theta_k, theta_q in zip(self.key.parameters(), self.query.parameters(), strict=True):
            theta_k.copy_(self.m * theta_k + (1 - self.m) * theta_q)

    def stage(self, s: int, a: Tensor, b: Tensor) -> Tensor:
        """The unweighted loss of stage s + 1 between query map a and key map b, both (N, C, H, W)."""
        if self.stage_loss == "mse":
            return stage_mse(a, b, self.grids[s])
        z1 = self.projectors[s](a.mean(dim=(2, 3)))
        z2 = self.projectors[s](b.mean(dim=(2, 3)))
        return barlow(cross_correlation(z1, z2), self.barlow_scale, self.lambda_offdiag)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest N rows by keys (N, D), going round at the end of the queue."""
        assert len(keys) <= len(self.queue)
        for key in keys:
            self.queue[self.pointer] = key
            self.pointer = (self.pointer + 1) % len(self.queue)

    @torch.no_grad()
    def sgd(self) -> None:
        """torch.optim.SGD's rule for every query and projector parameter, BatchNorm and biases included."""
        for module in (self.query, *self.projectors):
            for p in module.parameters():
                assert p.grad is not None
                g = p.grad + self.weight_decay * p
                buf = self.momentum_buffers.get(p)
                buf = g if buf is None else self.momentum * buf + g
                self.momentum_buffers[p] = buf
                p.copy_(p - self.lr * buf)


def parameters_of(module: nn.Module) -> State:
    """Copies of a module's parameters by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def gradients_of(module: nn.Module) -> State:
    """Copies of a module's gradients by parameter name; AssertionError where a parameter has none."""
    gradients = {}
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        gradients[name] = p.grad.clone()
    return gradients
