"""The plan: what it counts, what it says is sent and held, and how it adds times up."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmoco.cli import dispatch
from fastmoco.errors import UserError
from fastmoco.models.convolution import Convolution
from fastmoco.models.max_pool import MaxPool
from fastmoco.plan.cluster import ClusterConfig
from fastmoco.plan.command import Plan, PlanArgs, make_plan
from fastmoco.plan.counts import count
from fastmoco.plan.operations import BACKWARD, FORWARD, Operations, record
from fastmoco.plan.predict import predict
from fastmoco.plan.traffic import Flow, buckets
from fastmoco.train.objective import MomentumContrast
from fastmoco.train.recipes import find
from runs import small_config


def plan(recipe: str = "mocov2", **changes: Any) -> Plan:
    config = find(recipe)(Path(), Path())
    args = PlanArgs(views=config.views, model=config.model, loss=config.loss, optim=config.optim)
    for group in ("cluster", "views", "model", "loss", "optim"):
        section = getattr(args, group)
        setattr(args, group, replace(section, **{k: changes.pop(k) for k in list(changes) if hasattr(section, k)}))
    return make_plan(replace(args, **changes))


def sent(p: Plan, kind: str) -> float:
    return sum(flow.sent(p.world) for flow in p.flows if flow.kind == kind)


def test_operations_of_a_known_product() -> None:
    a, b = torch.empty(8, 16, device="meta", requires_grad=True), torch.empty(16, 4, device="meta", requires_grad=True)

    def run() -> Tensor:
        return (a @ b).relu().sum()

    operations, kept = record(run, [a, b])
    product = 2 * 8 * 16 * 4
    assert operations.flops.sum() == 3 * product, "forward, and the gradient to each factor"
    assert kept == 4 * 8 * 4, "the ReLU's result; the factors were given"
    # Product, ReLU and sum read and write: (128 + 64 + 32) + (32 + 32) + (32 + 1) numbers.
    assert operations.seconds(FORWARD, flops_per_s=1e30, bytes_per_s=4.0, least=0.0) == 224 + 64 + 33
    assert operations.seconds(FORWARD, flops_per_s=product, bytes_per_s=1e30, least=0.0) == pytest.approx(1.0)
    assert operations.seconds(FORWARD, flops_per_s=1e30, bytes_per_s=1e30, least=2.0) == 2.0 * 3
    assert operations.seconds(BACKWARD, flops_per_s=product, bytes_per_s=1e30, least=0.0) == pytest.approx(2.0)


def test_a_resnet50s_arithmetic_is_the_known_one() -> None:
    config = find("mocov2")(Path(), Path())
    counts = count(config.model, config.loss, size=224, rows=4, precision="bf16")
    # 4.09 G multiply-adds forward; the query's backward twice that but for the first convolution's input; the queue.
    forward, first, queue = 2 * 4.089e9, 2 * 64 * 3 * 49 * 112**2, 4 * 65536 * 128
    assert counts.operations.flops.sum() / 4 == pytest.approx(4 * forward - first + queue, rel=0.005)
    assert (counts.norms_forward, counts.norms_backward) == (106, 53)
    module = MomentumContrast(config.model, config.loss, seed=0)
    assert counts.averaged == sum(p.numel() for p in module.key.parameters())
    assert counts.trained == sum(p.numel() for p in module.query.parameters())


@pytest.mark.parametrize("method", ["moco", "mse", "barlow"])
def test_activations_are_those_that_a_real_step_keeps(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU, where no convolution is a product that keeps a copy of each place's neighbourhood, and pooling keeps
    # torch's indices.
    monkeypatch.setattr(Convolution, "form", lambda *_: "torch")
    monkeypatch.setattr(MaxPool, "forward", nn.MaxPool2d.forward)
    config = small_config(Path(), Path(), method=method)
    counted = count(config.model, config.loss, size=32, rows=4, precision="fp32").kept
    module = MomentumContrast(config.model, config.loss, seed=0).to(memory_format=torch.channels_last)
    bank = torch.randn(config.loss.queue_size, config.model.dim)
    view = torch.rand(4, 3, 32, 32).to(memory_format=torch.channels_last)
    seen = {t.untyped_storage().data_ptr(): t for t in (*module.parameters(), *module.buffers(), bank, view)}
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        if tensor.untyped_storage().data_ptr() not in seen:
            seen[tensor.untyped_storage().data_ptr()] = tensor
            kept += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(view, view, bank)
    assert counted == pytest.approx(kept, rel=0.02)


def test_bytes_of_a_resnet50_by_hand() -> None:
    p = plan(nodes=4, gpus=8, batch_size=4096, key_shuffle="global", norm="sync", precision="fp32")
    world, rows, elements = 32, 128, p.counts.trained
    assert sent(p, "gradients") == pytest.approx(2 * 31 / 32 * 4 * elements)
    assert sent(p, "keys") == 31 * rows * 128 * 4
    assert sent(p, "shuffle") == pytest.approx((rows - rows / world) * 3 * 224 * 224 * 2)
    assert sent(p, "unshuffle") == pytest.approx((rows - rows / world) * 128 * 4)
    channels = 26560  # of a ResNet-50's BatchNorms
    assert sent(p, "norms") == pytest.approx(31 * 2 * 2 * channels * 4 + 2 * 31 / 32 * 2 * channels * 4)
    # Through bfloat16 copies gradients of convolutions are halved; heads and BatchNorms are not.
    half = plan(nodes=4, gpus=8, batch_size=4096)
    copied = half.counts.copied_trained
    assert sent(half, "gradients") == pytest.approx(2 * 31 / 32 * (2 * copied + 4 * (elements - copied)))


def test_projections_are_gathered_and_not_correlations() -> None:
    p = plan("histology-barlow", gpus=4, batch_size=256, barlow_correlation="global")
    assert sent(p, "projections") == 3 * 2 * 4 * 64 * 2048 * 2
    own = plan("histology-barlow", gpus=4, batch_size=256)
    assert not sent(own, "projections")
    # Gram matrices of 256 rows in each process, and not of its own 64.
    more = p.counts.operations.flops.sum() - own.counts.operations.flops.sum()
    assert more == 4 * 8 * 2048 * (256**2 - 64**2)


def test_one_gpu_sends_nothing() -> None:
    p = plan(gpus=1)
    assert p.flows == [] and p.prediction.efficiency == 1.0 and p.prediction.sending == {}


def test_zero_shares_out_what_it_says() -> None:
    whole, *stages = (
        plan("histology-barlow", gpus=8, batch_size=256, precision="fp32", engine=engine, zero=zero)
        for engine, zero in (("ddp", 1), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3))
    )
    trained, averaged = whole.counts.trained, whole.counts.averaged
    for p, momentum, gradients, weights in zip(stages, (8, 8, 8), (1, 8, 8), (1, 1, 8), strict=True):
        assert p.memory["momentum"] == pytest.approx(4 * trained / momentum)
        assert p.memory["gradients"] == pytest.approx(4 * trained / gradients)
        assert p.memory["weights"] == pytest.approx(4 * trained / weights)
        assert p.memory["key weights"] == pytest.approx(4 * averaged / weights)
    sums = [sum(flow.sent(8) for flow in p.flows if flow.kind in ("gradients", "weights")) for p in (whole, *stages)]
    assert sums[0] == pytest.approx(2 * 7 / 8 * 4 * trained)
    assert sums[1] == sums[2] == pytest.approx(3 * 7 / 8 * 4 * trained)
    assert sums[3] == pytest.approx(7 / 8 * 4 * (2 * trained + averaged))
    # DeepSpeed sends linear layers in half precision, and convolutions of a class that it does not know as they are.
    half = plan("histology-barlow", gpus=8, batch_size=256, engine="deepspeed", zero=1)
    linear = half.counts.linear_trained
    assert 0 < linear < trained
    assert sent(half, "gradients") == pytest.approx(2 * 7 / 8 * (4 * trained - 2 * linear))


def test_gloo_scatters_by_summing() -> None:
    flow = Flow("gradients", "scatter", 1000.0, 1, "after")
    assert flow.sent(4) == flow.moved(4, "nccl") == 750.0
    assert flow.moved(4, "gloo") == Flow("gradients", "sum", 1000.0, 1, "after").sent(4) == 1500.0


def test_a_node_sends_a_ring_once_and_an_exchange_from_every_process() -> None:
    ring, pairs = (Flow("x", how, 1000.0, 1, "after") for how in ("sum", "exchange"))
    assert ring.between(8, 4, "nccl") == ring.sent(8)
    assert ring.between(8, 8, "nccl") == pairs.between(8, 8, "nccl") == 0.0
    assert pairs.between(8, 4, "nccl") == 4 * 1000.0 / 2


def test_buckets_add_up() -> None:
    for given in (1.0, float(1 << 20), 1e8):
        assert sum(buckets(given)) == given
    assert len(buckets(1e8)) == 5 and buckets(1e8)[0] == 1 << 20


class Fixed(Operations):
    """A forward of 2 s and a backward of 4."""

    def seconds(self, phase: int, **_: float) -> float:
        return 2.0 if phase == FORWARD else 4.0


def timed(*flows: Flow, **changes: Any) -> Any:
    # 1 GB/s, and no time for calls.
    cluster = ClusterConfig(nodes=2, gpus=1, between_gb_s=1.0, between_us=0.0, kernel_us=0.0, reached=1.0, **changes)
    return predict(cluster, Fixed(), flows, update_bytes=0.0)


def test_gradients_are_sent_behind_the_backward() -> None:
    assert timed().step == 6.0
    # 1 s over a backward of 4: all but the last bucket is done by its end.
    short = timed(Flow("gradients", "sum", 1e9, 41, "backward"))
    assert 0 < short.exposed["gradients"] < 0.03 and short.sending["gradients"] == pytest.approx(1.0)
    # 10 s: the first bucket is small and soon sent, and from the second on the link is busy.
    long = timed(Flow("gradients", "sum", 1e10, 401, "backward"))
    second, first = 4.0 * (26 << 20) / 1e10, 10.0 * (1 << 20) / 1e10
    assert long.exposed["gradients"] == pytest.approx(second + 10.0 - first - 4.0)
    assert long.efficiency == pytest.approx(6.0 / (2.0 + second + 10.0 - first))
    # Not begun before it is over.
    assert timed(Flow("gradients", "sum", 1e9, 1, "after")).exposed["gradients"] == pytest.approx(1.0)


def test_images_are_sent_behind_the_querys_forward_and_features_waited_for() -> None:
    assert timed(Flow("shuffle", "exchange", 1e9, 1, "query forward")).exposed["shuffle"] == 0.0
    assert timed(Flow("shuffle", "exchange", 5e9, 1, "query forward")).exposed["shuffle"] == pytest.approx(2.5 - 1.0)
    assert timed(Flow("unshuffle", "exchange", 2e9, 1, "forward")).exposed["unshuffle"] == pytest.approx(1.0)
    keys = Flow("keys", "gather", 1e9, 1, "backward")
    assert timed(keys).exposed["keys"] == 0.0
    assert timed(replace(keys, given=5e9)).exposed["keys"] == pytest.approx(1.0)


def test_a_measured_step_takes_the_place_of_the_computed_one() -> None:
    flow = Flow("gradients", "sum", 1e9, 1, "after")
    p = timed(flow, step_ms=3000.0)
    assert (p.forward, p.backward, p.step) == pytest.approx((1.0, 2.0, 4.0))
    computed = plan(gpus=8, batch_size=1024)
    measured = plan(gpus=8, batch_size=1024, pairs_per_s=computed.rows / computed.prediction.compute)
    assert measured.prediction.step == pytest.approx(computed.prediction.step)


def test_more_nodes_are_less_efficient_and_faster_links_more() -> None:
    one, four, slow = (
        plan(nodes=n, gpus=8, batch_size=256 * n, between_gb_s=gb) for n, gb in ((1, 50.0), (4, 50.0), (4, 1.0))
    )
    assert 1 > one.prediction.efficiency > four.prediction.efficiency > slow.prediction.efficiency
    assert four.pairs_per_s > 3 * one.pairs_per_s


def test_the_command_prints_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["plan", "mocov2-small", "--nodes", "2", "--gpus", "4", "--arch", "resnet18"]) == 0
    shown = capsys.readouterr().out
    for part in ("gradients", "keys", "activations", "queue", "GFLOP a pair", "Predicted:", "efficiency"):
        assert part in shown
    assert dispatch(["plan", "mocov2", "--gpus", "1", "--batch-size", "65536", "--memory-gb", "40"]) == 0
    shown = capsys.readouterr().out
    assert "nothing is sent" in shown and "does not fit" in shown


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["histology-barlow", "--nodes", "4"], "needs at least 2 images a GPU, not 1"),
        (["mocov2", "--gpus", "3"], "--batch-size 256 cannot be shared out evenly to 3 GPUs"),
        (["mocov3"], "no recipe 'mocov3'"),
        (["--gpus", "3"], "name a recipe first"),
    ],
)
def test_mistakes_are_named(args: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        dispatch(["plan", *args])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"nodes": 0}, "--nodes must be at least 1"),
        ({"between_gb_s": -1.0}, "--between-gb-s must be above 0"),
        ({"kernel_us": float("nan")}, "--kernel-us must be 0 or more"),
        ({"step_ms": 3.0, "pairs_per_s": 3.0}, "give one"),
    ],
)
def test_machines_that_cannot_be_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ClusterConfig(**values)


def test_a_plan_allocates_nothing() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan("chest-xray-mse", gpus=8, batch_size=8192)
    assert sys.platform != "linux" or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
