"""The step itself: what it updates, what it must not do, and what stops it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.data.loader import Batch
from fastmoco.distributed.world import World
from fastmoco.ops import dispatch
from fastmoco.train.checkpoint import non_finite
from fastmoco.train.objective import MomentumContrast
from fastmoco.train.trainer import Trainer
from runs import NoSync, references_only, small_config

CPU = torch.device("cpu")
UPDATES = pytest.mark.parametrize("update", ["fused", "torch"])


def trainer(method: str = "mse", **changes: Any) -> Trainer:
    config = small_config(Path(), Path(), method=method, **changes)
    return Trainer(config, precision=config.run.precision, world=World())


def batch(seed: int, n: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = [
        torch.rand(n, 3, 32, 32, generator=generator).half().to(memory_format=torch.channels_last) for _ in range(2)
    ]
    return Batch(views[0], views[1], np.arange(n))


def weights(t: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in t.module.state_dict().items()}


def before_step(t: Trainer, look: Callable[[], object]) -> None:
    """Have `look` called before each optimiser step, while there are gradients."""
    step = t.engine.step

    def stepped(lr: float, *, ema: float) -> None:
        look()
        step(lr, ema=ema)

    t.engine.step = stepped  # type: ignore[method-assign]


@pytest.mark.parametrize(("update", "accumulate"), [("fused", 1), ("torch", 2)])
@pytest.mark.parametrize("method", ["moco", "mse", "barlow"])
def test_a_step_does_not_wait_for_the_device(
    method: str, update: str, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole step with the implementations that know no device; those of Triton are watched in tests/gpu."""
    references_only(monkeypatch)
    t = trainer(method, accumulate=accumulate, precision="bf16", update=update)
    with NoSync():
        t.step([batch(i) for i in range(accumulate)], lr=0.1)
    assert len(t.history.read()) == 1


@pytest.mark.parametrize("operation", ["infonce", "pooled_mse", "pooled_mse_backward", "queue_push", "sgd_ema"])
def test_a_step_that_waits_inside_an_operation_is_noticed(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch of the test above, on steps that it must fail."""
    references_only(monkeypatch)
    reference = dispatch._registry[operation]["reference"].function

    def waiting(*args: Any, **options: Any) -> Any:
        torch.ones(()).item()
        return reference(*args, **options)

    monkeypatch.setitem(dispatch._registry, operation, {"reference": dispatch.Implementation(waiting, None, "")})
    t = trainer("mse", update="fused")
    with pytest.raises(AssertionError, match="synchronises"), NoSync():
        t.step([batch(0)], lr=0.1)


@pytest.mark.parametrize("method", ["moco", "mse", "barlow"])
def test_forward_and_losses_run_where_nothing_can_be_read(method: str) -> None:
    """On fake CUDA tensors any read raises, so the modules around the operations hold none on a GPU either.

    Of the operations only the fakes run here; their implementations are watched by the tests above.
    """
    t = trainer(method)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, torch.no_grad():
        module = t.module
        for part in module.modules():
            for store in (part._parameters, part._buffers):
                for name, value in store.items():
                    if value is not None:
                        fake = torch.empty(value.shape, dtype=value.dtype, device="cuda:0")
                        store[name] = torch.nn.Parameter(fake, False) if store is part._parameters else fake
        image = torch.empty(4, 3, 32, 32, device="cuda:0")
        bank = torch.empty(19, 16, device="cuda:0")
        losses, query, *_ = module(image, image, bank)
        assert set(losses) == set(module.loss_names)
        assert all(value.shape == () and value.device.type == "cuda" for value in losses.values())
        assert query.shape == (4, 16)
        with pytest.raises(Exception, match=r"_local_scalar_dense|DataDependent"):
            losses["infonce"].item()
    assert mode is not None


def test_gradients_never_enter_the_key_encoder() -> None:
    t = trainer("barlow")
    t.step([batch(0)], lr=0.1)
    assert all(p.grad is None and not p.requires_grad for p in t.module.key.parameters())


def test_the_queue_is_pushed_once_a_micro_batch() -> None:
    t = trainer(accumulate=3)
    t.step([batch(i) for i in range(3)], lr=0.1)
    assert t.queue.pointer.item() == 12
    assert t.queue_fill == 12 / 19
    t.step([batch(i) for i in range(3)], lr=0.1)
    assert t.queue.pointer.item() == 24 % 19
    assert t.queue_fill == 1.0


@pytest.mark.parametrize(
    ("queue_dtype", "precision", "kept"),
    [
        ("fp32", "fp32", torch.float32),
        ("fp32", "bf16", torch.float32),
        ("fp32", "fp64", torch.float64),
        ("bf16", "fp32", torch.bfloat16),
        ("bf16", "fp64", torch.bfloat16),
    ],
)
def test_the_queue_keeps_the_numbers_it_is_told_to(queue_dtype: str, precision: str, kept: torch.dtype) -> None:
    t = trainer("moco", queue_dtype=queue_dtype, precision=precision)
    t.step([batch(0)], lr=0.1)
    saved = t.checkpoint(1, "images")
    assert t.queue.bank.dtype == saved.tensors["queue.bank"].dtype == kept
    other = trainer("moco", queue_dtype=queue_dtype, precision=precision, seed=5)
    other.restore(saved)
    assert other.queue.bank.dtype == kept and torch.equal(other.queue.bank, t.queue.bank)
    assert other.queue.pointer.item() == 4


def test_accumulated_gradients_are_the_mean() -> None:
    """Two micro-batches give the mean of their gradients; the queue, as each saw it, is the same in both."""
    gradients: list[Tensor] = []
    for parts in ([0], [1], [0, 1]):
        t = trainer("moco", accumulate=len(parts), precision="fp64")
        # The second micro-batch must see the queue as the first does, for the mean to be exact.
        t.queue.push = lambda keys: None  # type: ignore[method-assign]
        before_step(t, lambda t=t: gradients.append(t.module.query.backbone.conv1.weight.grad.clone()))
        t.step([batch(i) for i in parts], lr=0.1)
    assert torch.allclose(gradients[2], (gradients[0] + gradients[1]) / 2, rtol=1e-9, atol=1e-12)


@UPDATES
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_suppresses_every_update_from_then_on(bad: float, update: str) -> None:
    t = trainer(log_every=9, update=update)
    t.step([batch(0)], lr=0.1)
    before = {name: p.clone() for name, p in t.module.query.named_parameters()}
    momentum = {name: value.clone() for name, value in t.engine.update.buffers.items()}
    broken = batch(1)
    broken.q[0, 0, 0, 0] = bad
    t.step([broken], lr=0.1)
    t.step([batch(2)], lr=0.1)
    for name, p in t.module.query.named_parameters():
        assert torch.equal(p, before[name]), name
    for name, value in t.engine.update.buffers.items():
        assert torch.equal(value, momentum[name]), name
    assert [bool(np.isfinite(row["infonce"])) for row in t.history.read()] == [True, False, True]


@UPDATES
def test_the_first_step_can_be_suppressed_too(update: str) -> None:
    t = trainer(update=update)
    before = weights(t)
    broken = batch(1)
    broken.k.fill_(float("nan"))
    t.step([broken], lr=0.1)
    for name, p in t.module.query.named_parameters():
        assert torch.equal(p, before[f"query.{name}"]), name
    assert all(not value.any() for value in t.engine.update.buffers.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_tensors_are_found(bad: float, dtype: torch.dtype) -> None:
    sound = {"a": torch.ones(3, dtype=dtype), "b": torch.tensor([1]), "c": torch.empty(0), "d": torch.tensor(0.5)}
    sound["largest"] = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    assert non_finite(sound) == []
    for size in (1, 2, 3, 16, 17, 67, 40_000):
        for place in {0, size // 2, size - 1}:
            tensor = torch.randn(size).to(dtype)
            tensor[place] = bad
            assert non_finite(sound | {"broken": tensor}) == ["broken"], (size, place)
    assert non_finite({"all": torch.full((2, 3), bad, dtype=dtype)}) == ["all"]


@UPDATES
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_step_is_sgds_own_and_then_the_average(update: str, momentum: float) -> None:
    """Starting SGD's momentum from zeros is torch's first step."""
    t = trainer("barlow", precision="fp64", update=update, sgd_momentum=momentum, log_every=9)
    plain = torch.optim.SGD(
        [torch.nn.Parameter(p.detach().clone()) for p in t.engine.trainable.values()],
        lr=0.1, momentum=momentum, weight_decay=1e-4, fused=False, foreach=False,
    )  # fmt: skip
    followers = {name: p.clone() for name, p in t.module.key.named_parameters()}

    def mirror() -> None:
        for mine, other in zip(t.engine.trainable.values(), plain.param_groups[0]["params"], strict=True):
            other.grad = mine.grad.clone()
        plain.step()

    before_step(t, mirror)
    m = t.config.loss.ema
    for i in range(3):
        t.step([batch(i)], lr=0.1)
        for (name, mine), other in zip(t.engine.trainable.items(), plain.param_groups[0]["params"], strict=True):
            assert torch.allclose(mine, other, rtol=1e-12, atol=1e-14)
            if name.startswith("query."):
                name = name.removeprefix("query.")
                followers[name] = m * followers[name] + (1 - m) * mine.detach()
                assert torch.allclose(t.module.key.get_parameter(name), followers[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-4)])
def test_both_updates_train_to_the_same_weights(precision: str, tolerance: float) -> None:
    changes: dict[str, Any] = {"precision": precision, "accumulate": 2, "log_every": 9}
    fused, plain = (trainer("mse", update=update, **changes) for update in ("fused", "torch"))
    for t in (fused, plain):
        for step in range(3):
            t.step([batch(2 * step), batch(2 * step + 1)], lr=0.01)
    expected = weights(plain)
    for name, value in weights(fused).items():
        assert torch.allclose(value, expected[name], rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize(("first", "second"), [("fused", "fused"), ("torch", "torch"), ("torch", "fused")])
def test_a_checkpoint_goes_on_bit_for_bit_and_with_either_update(first: str, second: str) -> None:
    def run(t: Trainer, steps: range) -> Trainer:
        for step in steps:
            t.step([batch(step)], lr=0.1)
        return t

    whole = run(trainer(update=first, log_every=9), range(2))
    saved = whole.checkpoint(2, "images")
    other = trainer(update=second, log_every=9, seed=7)
    other.restore(saved)
    assert {name for name in saved.tensors if name.startswith("momentum.")} == {
        f"momentum.{name}" for name in other.engine.trainable
    }
    run(whole, range(2, 4))
    run(other, range(2, 4))
    expected = whole.checkpoint(4, "images").tensors
    for name, value in other.checkpoint(4, "images").tensors.items():
        if first == second:
            assert torch.equal(value, expected[name]), name
        else:
            assert torch.allclose(value, expected[name], rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("method", ["moco", "mse", "barlow"])
def test_training_through_copies_is_autocast_to_the_last_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    through = trainer(method, precision="bf16", log_every=9)
    names = set(through.module.multiplied)
    assert names == set(through.engine.copies.by_name)
    assert {"query.backbone.conv1.weight", "key.backbone.conv1.weight"} <= names
    assert not any(".head" in name or ".bn" in name for name in names)
    monkeypatch.setattr(MomentumContrast, "multiplied", property(lambda self: []))
    plain = trainer(method, precision="bf16", log_every=9)
    assert not plain.engine.copies.by_name
    for t in (through, plain):
        for step in range(3):
            t.step([batch(step, 8)], lr=0.1)
    assert through.history.read() == plain.history.read()
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(through).items())
    for name, copy in through.engine.copies.by_name.items():
        assert torch.equal(copy, expected[name].bfloat16()), name


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"update": "torch"}, {"precision": "fp32"}])
def test_where_copies_would_round_or_go_stale_there_are_none(changes: dict[str, Any]) -> None:
    assert not trainer("mse", **{"precision": "bf16"} | changes).engine.copies.by_name


def test_a_checkpoint_holds_the_originals_and_the_copies_follow() -> None:
    t = trainer("barlow", precision="bf16", log_every=9)
    t.step([batch(0)], lr=0.1)
    saved = t.checkpoint(1, "images")
    assert all(value.dtype != torch.bfloat16 for value in saved.tensors.values())
    other = trainer("barlow", precision="bf16", log_every=9, seed=7)
    other.restore(saved)
    for x in (t, other):
        x.step([batch(1)], lr=0.1)
    expected = weights(t)
    assert all(torch.equal(value, expected[name]) for name, value in weights(other).items())


def test_a_parameter_without_a_gradient_is_left_alone_and_averaged() -> None:
    results = []
    for update in ("fused", "torch"):
        t = trainer("moco", update=update)
        t.step([batch(0)], lr=0.1)
        head = dict(t.module.query.head.named_parameters())
        before = {name: p.clone() for name, p in head.items()}

        def drop(head: dict[str, Tensor] = head) -> None:
            for p in head.values():
                p.grad = None

        before_step(t, drop)
        t.step([batch(1)], lr=0.1)
        assert all(torch.equal(p, before[name]) for name, p in head.items())
        results.append([p.clone() for p in t.module.key.head.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_embedding_spread_tells_collapse() -> None:
    t = trainer("moco")
    losses = {"infonce": torch.tensor(1.0)}
    same = torch.nn.functional.normalize(torch.ones(64, 16), dim=1)
    spread = torch.nn.functional.normalize(torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    t.history.add(losses, same, torch.tensor([0, 4, 5, 9]), divisor=1)
    t.history.next_row()
    t.history.add(losses, spread, torch.tensor([0, 0]), divisor=1)
    t.history.next_row()
    collapsed, healthy = t.history.read()
    assert collapsed["embedding_std"] < 1e-6
    assert (collapsed["top1"], collapsed["top5"]) == (0.25, 0.5) and healthy["top1"] == 1
    assert healthy["embedding_std"] == pytest.approx(1.0, abs=0.02)


def test_stages_can_be_chosen() -> None:
    t = trainer("barlow", stages=(2, 4))
    t.step([batch(0)], lr=0.1)
    (row,) = t.history.read()
    assert set(row) == {"loss", "infonce", "stage2", "stage4", "top1", "top5", "embedding_std"}
    assert row["loss"] == pytest.approx(row["infonce"] + row["stage2"] + row["stage4"], rel=1e-6)
