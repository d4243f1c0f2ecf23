"""How fast are InfoNCE's loss and gradient over the queue, normalisation included, and in how much memory?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness, roofline
from bench.harness import Benchmark, Case, Missing, Outputs, Run
from bench.roofline import Work
from fastmoco.ops import definitions
from fastmoco.ops.infonce import infonce

TEMPERATURE = 0.07
BATCHES = (8, 16, 32, 64, 128, 256, 512)
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Inputs:
    """Queries that require a gradient and keys, (N, D) in float32 and of any length; the bank, (K, D) unit rows."""

    query: Tensor
    key: Tensor
    bank: Tensor


def case(n: int, k: int, d: int, dtype: str) -> Case:
    return Case({"N": n, "K": k, "D": d}, dtype)


def prepare(case: Case, device: str) -> Inputs:
    n, k, d = case.sizes.values()
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(n, d, generator=generator)
    # Related to the query, as a second view of an image is.
    key = query + torch.randn(n, d, generator=generator)
    bank = F.normalize(torch.randn(k, d, generator=generator), dim=1)
    return Inputs(query.to(device).requires_grad_(), key.to(device), bank.to(device, getattr(torch, case.dtype)))


def oracle(x: Inputs) -> Outputs:
    query = x.query.detach().double().requires_grad_()
    loss, _ = definitions.infonce(query, x.key.double(), x.bank.double(), temperature=TEMPERATURE, normalized=False)
    return outputs(loss, query)


def outputs(loss: Tensor, query: Tensor) -> Outputs:
    return {"loss": loss.detach(), "dquery": torch.autograd.grad(loss, query)[0]}


def work(case: Case) -> Work:
    n, k, d = case.sizes.values()
    return roofline.infonce(n, k, d, case.dtype)


BENCH = Benchmark(
    op="infonce",
    baseline="paper, eager",
    cases=[case(n, 65536, 128, dtype) for dtype in DTYPES for n in BATCHES],
    quick=[case(n, 8192, 128, dtype) for dtype in DTYPES for n in (32, 256)],
    headline=[case(n, 65536, 128, dtype) for dtype in DTYPES for n in (32, 256)],
    prepare=prepare,
    oracle=oracle,
    work=work,
)


@BENCH.provider("paper, eager")
def paper(x: Inputs) -> Run:
    """The published form: clone the queue, concatenate, divide, cross entropy."""

    def run() -> Outputs:
        q, k = F.normalize(x.query, dim=1), F.normalize(x.key, dim=1)
        queue = x.bank.to(torch.float32, copy=True)
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / TEMPERATURE
        target = torch.zeros(len(q), dtype=torch.long, device=q.device)
        return outputs(F.cross_entropy(logits, target), x.query)

    return run


@BENCH.provider("lightly NTXentLoss")
def lightly(x: Inputs) -> Run:
    try:
        from lightly.loss import NTXentLoss
    except ModuleNotFoundError as error:
        raise Missing("lightly is not installed") from error
    if x.bank.dtype != torch.float32:
        raise Missing("its memory bank is float32")
    criterion = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=tuple(x.bank.shape)).to(x.query.device)
    # It pushes the keys at every call with gradients; here nobody does, so that the negatives stay the oracle's and all
    # do the same work.
    criterion.memory_bank.bank = x.bank.clone()
    criterion.memory_bank._dequeue_and_enqueue = lambda batch: None
    return lambda: outputs(criterion(x.query, x.key), x.query)


@BENCH.provider("attention, queue in slices")
def library(x: Inputs) -> Run:
    """The library's fused attention with K = V = queue, its slices as batch entries, merged by their log-sum-exps."""
    (n, d), k = x.query.shape, len(x.bank)
    wanted = 64 if x.bank.is_cuda or x.bank.dtype == torch.bfloat16 else 8
    slices = max(count for count in range(1, wanted + 1) if k % count == 0)
    keys = x.bank.view(slices, 1, k // slices, d)

    def attention(q: Tensor) -> tuple[Tensor, Tensor]:
        scale, aten = 1 / TEMPERATURE, torch.ops.aten
        if not q.is_cuda:
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, keys, keys, scale=scale)
        elif q.dtype == torch.float32:
            out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, keys, keys, None, True, scale=scale)
        else:
            out, lse, *_ = aten._scaled_dot_product_flash_attention(q, keys, keys, scale=scale)
        return out[:, 0].float(), lse[:, 0, :n].float()

    def run() -> Outputs:
        unit, key = F.normalize(x.query, dim=1), F.normalize(x.key, dim=1)
        q = unit.detach()
        weighted, partial = attention(q.to(x.bank.dtype).expand(slices, 1, n, d))
        positive = (q * key).sum(dim=1) / TEMPERATURE
        lse = torch.cat([partial, positive[None]]).logsumexp(dim=0)
        pulled = torch.einsum("sn,snd->nd", (partial - lse).exp(), weighted)
        gradient = (pulled + (positive - lse).expm1()[:, None] * key) / (TEMPERATURE * n)
        return {"loss": (lse - positive).mean(), "dquery": torch.autograd.grad(unit, x.query, gradient)[0]}

    return run


@BENCH.provider("two torch.mm", exact=False)
def products(x: Inputs) -> Run:
    """What the two products take through memory, into outputs that are there already."""
    q = F.normalize(x.query.detach(), dim=1).to(x.bank.dtype)
    logits, weighted = q.new_empty(len(q), len(x.bank)), torch.empty_like(q)

    def run() -> Outputs:
        torch.mm(q, x.bank.T, out=logits)
        torch.mm(logits, x.bank, out=weighted)
        return {}

    return run


def ours(x: Inputs, implementation: str) -> Run:
    """As the training calls it: on unit vectors, which it makes itself, with a running maximum."""

    def run() -> Outputs:
        unit, key = F.normalize(x.query, dim=1), F.normalize(x.key, dim=1)
        return outputs(infonce(unit, key, x.bank, temperature=TEMPERATURE, implementation=implementation), x.query)

    return run


BENCH.ours(ours, like=lambda x: x.query)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; status 1 where a provider failed."""
    return harness.main([BENCH], "infonce", str(__doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
