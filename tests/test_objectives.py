"""The objectives beside MoCo, and MoCo both ways: what they compute, train, keep and refuse."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastmoco.distributed.collectives import start_sum
from fastmoco.distributed.exchange import draw_order
from fastmoco.distributed.world import World
from fastmoco.ops import definitions
from fastmoco.ops.mixed_crosscorr import mix
from fastmoco.plan.counts import count
from fastmoco.plan.traffic import flows
from fastmoco.train.config import LossConfig, ModelConfig
from fastmoco.train.objective import MomentumContrast, Objective, Output
from fastmoco.train.objectives import make_objective
from objectives import OBJECTIVES, TARGETS, order_within
from parity import assert_states_close
from runs import NARROW
from worlds import in_world

BATCH, SIDE = 12, 32


def module(world: World, name: str, method: str = "none", norm: str = "sync", **changes: Any) -> Objective:
    """With weights of its own in the key encoder, if any, and no residual branch at zero."""
    twins = OBJECTIVES[name].get("objective") == "barlow-twins"
    said: dict[str, Any] = {"method": method, "grids": (4, 4, 2, 2), "stage_weight": 0.5, "projector_width": 12}
    made = make_objective(
        ModelConfig(
            arch=NARROW,
            dim=16,
            zero_init_residual=False,
            norm=norm,
            head="projector" if twins else "linear",  # type: ignore[arg-type]
        ),
        LossConfig(temperature=0.2, **(said | {"barlow_correlation": "global"} | OBJECTIVES[name] | changes)),
        seed=3,
        world=world,
    ).double()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for key, value in made.state_dict().items():
            if key.startswith("key.") and key.endswith("weight"):
                value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator, dtype=torch.float64))
    return made


def views(rows: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    q = torch.rand(rows, 3, SIDE, SIDE, generator=generator) * torch.linspace(0.2, 1, rows).view(-1, 1, 1, 1)
    k = 0.8 * q + 0.2 * torch.rand(rows, 3, SIDE, SIDE, generator=generator)
    bank = normalize(torch.randn(50, 16, generator=generator, dtype=torch.float64), dim=1)
    q, k = (view.half().to(memory_format=torch.channels_last) for view in (q, k))
    return q.double(), k, bank


def given(name: str, bank: Tensor, order: Tensor, targets: Tensor) -> list[Tensor | None]:
    """What the forward takes beside the views."""
    if name == "symmetric":
        return [bank, None]
    if name == "mixed":
        return [None, order, torch.tensor(0.3, dtype=torch.float64)]
    return [targets if name == "supcon" else None, None, None]


def step(world: World, name: str, method: str, whole: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Losses, gradients and statistics of the micro-batch as one process would have them, and the bytes sent."""
    made = module(world, name, method)
    q, k, bank = views()
    part = BATCH // world.size
    own = slice(world.rank * part, (world.rank + 1) * part)
    order = whole[own] - own.start
    output: Output = made(q[own], k[own], *given(name, bank, order, TARGETS[own]))
    sent = dict(world.sent)
    torch.stack(list(output.losses.values())).sum().backward()
    found = {f"loss {key}": value.detach() for key, value in output.losses.items()}
    found |= {f"gradient {key}": p.grad for key, p in made.named_parameters() if p.grad is not None}
    for value in found.values():
        work = start_sum(world, value, kind="test")
        if work is not None:
            work.wait()
        value /= world.size
    buffers = {f"buffer {key}": value for key, value in made.named_buffers() if ".running_" in key}
    keys = {"rows key": output.key} if len(output.key) else {}
    return found | buffers | {"rows query": output.query} | keys, sent


@cache
def over_two_processes(name: str, method: str) -> list[tuple[dict[str, Tensor], dict[str, int]]]:
    """What `step` returns in each of two, worked out once: processes take longer to start than to train."""
    results: list[tuple[dict[str, Tensor], dict[str, int]]] = in_world(2, step, name, method, order_within(2))
    return results


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("symmetric", "barlow"),
        ("supcon", "none"),
        ("mixed", "barlow"),
        pytest.param("simclr", "mse", marks=pytest.mark.system),
        *(pytest.param(name, "none", marks=pytest.mark.system) for name in OBJECTIVES if name != "supcon"),
    ],
)
def test_over_two_processes_it_is_that_of_one(name: str, method: str) -> None:
    expected, _ = step(World(), name, method, order_within(2))
    results = over_two_processes(name, method)
    rows = {key: torch.cat([found[key] for found, _ in results]) for key in expected if key.startswith("rows")}
    for found, _ in results:
        assert_states_close(found | rows, expected, 1e-9, f"{name}, {method}")


@pytest.mark.parametrize(("name", "method"), [("symmetric", "barlow"), ("supcon", "none"), ("mixed", "barlow")])
def test_the_plan_says_what_is_sent(name: str, method: str) -> None:
    results = over_two_processes(name, method)
    made = module(World(), name, method)
    loss = LossConfig(method=method, projector_width=12, **({"barlow_correlation": "global"} | OBJECTIVES[name]))  # type: ignore[arg-type]
    model = ModelConfig(arch=NARROW, dim=16, norm="sync", head="projector" if name == "mixed" else "linear")
    counts = count(model, loss, size=SIDE, rows=BATCH // 2, precision="fp64", world=2)
    said = {
        (flow.kind, flow.when): flow.sent(2)
        for flow in flows(counts, model, loss, size=SIDE, world=2, precision="fp64", through_copies=False)
    }
    assert counts.trained == sum(p.numel() for p in made.parameters() if p.requires_grad)
    for _, sent in results:
        for kind in ("embeddings", "classes", "projections"):
            assert sent.get(kind, 0) == said.get((kind, "forward"), 0), kind
        assert sent["norms"] == said["norms", "forward"]
    assert said.get(("keys", "backward"), 0) == (2 * 6 * 16 * 8 if name == "symmetric" else 0)


def test_both_ways_is_the_mean_of_one_way_and_the_other_against_the_queue_of_before() -> None:
    both, one = (module(World(), "symmetric", "mse", "frozen", symmetric=symmetric) for symmetric in (True, False))
    assert isinstance(both, MomentumContrast) and isinstance(one, MomentumContrast)
    q, k, bank = views(5)
    found: Output = both(q, k, bank)
    there, back = one(q, k, bank), one(k.double(), q, bank)
    assert found.losses.keys() == there.losses.keys() and len(found.losses) == 5
    for key, loss in found.losses.items():
        torch.testing.assert_close(loss, (there.losses[key] + back.losses[key]) / 2, rtol=1e-12, atol=0)
    # Both views' keys, once each, are what the queue takes, after the losses.
    assert torch.equal(found.key, torch.stack([there.key, back.key], dim=1).flatten(0, 1))
    assert found.query.shape == (5, 16)
    query, key = (normalize(e(view).embedding, dim=1) for e, view in ((one.query, k.double()), (one.key, q)))
    expected, _ = definitions.infonce(query, key, bank, temperature=0.2, margin=0.1)
    torch.testing.assert_close(back.losses["infonce"], expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "symmetric"])
def test_each_loss_is_its_definition_of_the_encoders_embeddings(name: str) -> None:
    made = module(World(), name)
    q, k, bank = views(7)
    order, targets = draw_order(2, 1, 0, 7), TARGETS[:7]
    output: Output = made(q, k, *given(name, bank, order, targets))
    z1, z2 = (made.query(view.double()).embedding for view in (q, k))
    if name in ("simclr", "supcon"):
        classes = targets if name == "supcon" else torch.arange(7)
        expected, rank = definitions.supcon(z1, z2, classes, temperature=0.2, margin=0.1 if name == "simclr" else 0.0)
        assert torch.equal(output.rank, rank)
        wanted = {"ntxent" if name == "simclr" else "supcon": expected}
    else:
        wanted = {"barlow": definitions.crosscorr(z1, z2, off_diagonal=0.005, scale=0.1)}
        similarity = normalize(z1, dim=1) @ normalize(z2, dim=1).T
        assert torch.equal(output.rank, (similarity > similarity.diagonal()[:, None]).sum(dim=1))
    if name == "mixed":
        zm = made.query(mix(q, k.double(), order, 0.3)).embedding
        wanted["mixed"] = 0.1 * 0.005 * 3 * definitions.mixed_crosscorr(zm, z1, z2, order, 0.3)
    assert list(output.losses) == made.loss_names == list(wanted)
    for key, loss in output.losses.items():
        torch.testing.assert_close(loss, wanted[key], rtol=1e-9, atol=1e-12)
    parameters = list(made.parameters())
    own = torch.autograd.grad(torch.stack(list(output.losses.values())).sum(), parameters)
    other = torch.autograd.grad(torch.stack(list(wanted.values())).sum(), parameters)
    for a, b in zip(own, other, strict=True):
        assert float((a - b).norm()) <= 1e-8 * float(b.norm()) + 1e-12
    assert output.key.shape == (0, 16) and not made.averages
