"""What a process sends in a step, by what it is for, and what of it passes a network interface."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastmoco.plan.counts import BYTES, Counts
from fastmoco.train.config import LossConfig, ModelConfig

# A sum leaves the total everywhere, a scatter a part of it in each process. A gather is given as much by each process,
# a collection a part of the whole by each. An exchange sends a part of what each is given to each.
Collective = Literal["sum", "scatter", "gather", "collection", "exchange"]
Backend = Literal["nccl", "gloo"]
When = Literal["query forward", "forward", "backward", "after"]

# DistributedDataParallel's buckets: the first small, so that sending begins early.
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20

# gloo over TCP. A message is announced, asked for and sent, each with a header of gloo's and those of Ethernet, IP and
# TCP with its time stamps; larger ones are cut at a megabyte, and a packet holds 1,448 bytes at the usual MTU of 1,500.
GLOO_HEADER, PACKET_HEADERS, SEGMENT, GLOO_LARGEST = 48, 66, 1448, 1 << 20


@dataclass(frozen=True)
class Flow:
    """What one kind of collective sends in a step.

    kind: as World.sent names it. given: bytes that a process hands to the collective, over all `calls` of a step.
    when: during what it can be sent, or before what goes on after it.
    """

    kind: str
    collective: Collective
    given: float
    calls: int
    when: When

    def sent(self, world: int) -> float:
        """Bytes that one of `world` processes sends by the algorithm that moves the least, as World.sent counts."""
        shares = {
            "sum": 2 * (world - 1) / world,
            "gather": world - 1,
            "collection": (world - 1) / world,
            "exchange": (world - 1) / world,
            "scatter": (world - 1) / world,
        }
        return self.given * shares[self.collective]

    def moved(self, world: int, backend: Backend) -> float:
        """Bytes of payload that one process really sends: gloo scatters sums by summing all of it everywhere."""
        twice = self.collective == "scatter" and backend == "gloo"
        return self.sent(world) * (2 if twice else 1)

    def between(self, world: int, per_node: int, backend: Backend) -> float:
        """Bytes of payload that a node of `per_node` processes sends to the others.

        All but exchanges go round a ring that leaves each node once; an exchange is between all pairs.
        """
        if self.collective == "exchange":
            return self.given * per_node * (world - per_node) / world
        return self.moved(world, backend) if world > per_node else 0.0

    def messages(self, world: int, backend: Backend) -> float:
        """Messages that one process sends, of gloo's."""
        if world == 1 or backend == "nccl":
            return 0.0
        phases = {"sum": 4, "scatter": 4, "gather": 2, "collection": 2, "exchange": 1}[self.collective]
        least = phases * (world - 1) * self.calls
        # A sum of one number has no halves to send, nor of fewer numbers than processes parts for all of them.
        if self.collective in ("sum", "scatter") and self.given / self.calls < 8 * world:
            least = max(1, math.ceil(self.given / self.calls / 4)) * self.calls
        return max(least, self.moved(world, backend) / GLOO_LARGEST)

    def on_interface(self, world: int, backend: Backend) -> float:
        """Bytes that the interface of a host with one process sends, headers included; of gloo over TCP."""
        packets = self.moved(world, backend) / SEGMENT
        return self.moved(world, backend) + packets * PACKET_HEADERS + self.messages(world, backend) * 3 * (
            GLOO_HEADER + PACKET_HEADERS
        )


def flows(
    counts: Counts,
    model: ModelConfig,
    loss: LossConfig,
    *,
    size: int,
    world: int,
    precision: str,
    accumulate: int = 1,
    through_copies: bool = True,
    engine: Literal["ddp", "deepspeed"] = "ddp",
    zero: int = 1,
) -> list[Flow]:
    """What a process of `world` sends in an optimiser step of `accumulate` micro-batches.

    through_copies: whether the gradients of half-precision copies are averaged as they are (train/copies.py).
    """
    if world == 1:
        return []
    n, wide, narrow = counts.rows, max(BYTES[precision], 4), BYTES[precision]
    found = _embeddings(model, loss, n * accumulate, accumulate, wide)
    if loss.key_shuffle == "global":
        # Where the processes do not divide the rows, each keeps the rounded share of its own.
        away = (n - math.ceil(n / world)) * world / (world - 1) * accumulate * loss.keys_per_pair
        calls = accumulate * loss.keys_per_pair
        image, features = 3 * size * size * 2, (model.dim + counts.pooled) * wide
        found.append(Flow("shuffle", "exchange", away * image, calls, "query forward"))
        found.append(Flow("unshuffle", "exchange", away * features, calls, "forward"))
    if loss.method == "barlow" and loss.barlow_correlation == "global":
        times = max(loss.keys_per_pair, 1) * accumulate
        given = 2 * len(loss.stages) * n * loss.projector_width * narrow * times
        found.append(Flow("projections", "gather", given, times, "forward"))
    if model.norm == "sync":
        for collective, when, channels, calls in (
            ("gather", "forward", counts.channels_forward, counts.norms_forward),
            ("sum", "backward", counts.channels_backward, counts.norms_backward),
        ):
            found.append(Flow("norms", collective, 2 * channels * wide * accumulate, calls * accumulate, when))  # type: ignore[arg-type]
    found += _gradients(counts, narrow if through_copies else wide, narrow, wide, engine, zero, accumulate)
    # Whether a loss was not finite.
    found.append(Flow("control", "sum", 4, 1, "backward"))
    return found


def _embeddings(model: ModelConfig, loss: LossConfig, rows: int, calls: int, wide: int) -> list[Flow]:
    """What the objective gathers of `rows` images in `calls` micro-batches: keys for the queue, or, for a loss of all
    images, the embeddings of all views; of their classes and orders 8 bytes each."""
    row = model.dim * wide
    if loss.objective == "moco":
        return [Flow("keys", "gather", rows * row * loss.keys_per_pair, calls, "backward")]
    if loss.objective == "barlow-twins" and loss.barlow_correlation != "global":
        return []
    found = [Flow("embeddings", "gather", rows * row * (3 if loss.mix_weight else 2), calls, "forward")]
    if loss.objective == "supcon" or loss.mix_weight:
        found.append(Flow("classes", "gather", rows * 8, calls, "forward"))
    return found


def buckets(given: float) -> list[float]:
    """Bytes of the buckets in which DistributedDataParallel sums gradients of `given` bytes, as they get ready."""
    sizes = [min(given, float(FIRST_BUCKET))]
    while (left := given - sum(sizes)) > 0:
        sizes.append(min(left, float(BUCKET)))
    return sizes


def _gradients(
    counts: Counts,
    copied: int,
    narrow: int,
    wide: int,
    engine: Literal["ddp", "deepspeed"],
    zero: int,
    accumulate: int,
) -> list[Flow]:
    """Gradients, and under ZeRO weights; `copied`, `narrow` and `wide` are the bytes of a number of each kind."""
    if engine == "ddp":
        given = counts.copied_trained * copied + (counts.trained - counts.copied_trained) * wide
        return [Flow("gradients", "sum", given, len(buckets(given)), "backward")]
    whole = counts.trained * wide
    if zero == 0:
        return [Flow("gradients", "sum", whole, 1, "after")]
    reduced = whole - counts.linear_trained * (wide - narrow)
    kinds = 1 if narrow == wide else 2
    if zero in (1, 2):
        times = accumulate if zero == 2 else 1
        return [
            Flow("gradients", "sum", reduced * times, kinds * times, "after"),
            Flow("weights", "collection", whole, 1, "after"),
        ]
    fetched = (counts.trained + counts.averaged) * wide - counts.linear * (wide - narrow)
    return [
        Flow("gradients", "scatter", reduced * accumulate, kinds * accumulate, "after"),
        Flow("weights", "collection", fetched * accumulate, kinds * accumulate, "forward"),
    ]
