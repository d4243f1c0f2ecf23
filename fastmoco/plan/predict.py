"""How long a step takes, and which of it is waiting for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastmoco.plan.cluster import ClusterConfig
from fastmoco.plan.operations import BACKWARD, FORWARD, Operations
from fastmoco.plan.traffic import Flow, buckets


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step. `exposed`, by kind, is the part of `sending` that nothing is computed in."""

    forward: float
    backward: float
    update: float
    overhead: float
    sending: dict[str, float]
    exposed: dict[str, float]

    @property
    def compute(self) -> float:
        """What one GPU would take that sends nothing."""
        return self.forward + self.backward + self.update + self.overhead

    @property
    def step(self) -> float:
        """The whole step."""
        return self.compute + sum(self.exposed.values())

    @property
    def efficiency(self) -> float:
        """The share of a step that is not waiting: speed against as many GPUs that need not send."""
        return self.compute / self.step


def predict(
    cluster: ClusterConfig,
    operations: Operations,
    flows: Sequence[Flow],
    *,
    update_bytes: float,
    half: bool = True,
    accumulate: int = 1,
    rows: int = 1,
) -> Prediction:
    """The time of an optimiser step over `accumulate` micro-batches, of `rows` images a GPU, of `operations` each.

    update_bytes: what the optimiser moves in memory. half: whether arithmetic is in half precision.
    """
    gpu = cluster.device
    flops_per_s = gpu.tflops * 1e12 * cluster.reached * (1.0 if half else 0.5)
    bytes_per_s = gpu.memory_tb_s * 1e12 * cluster.reached
    forward, backward = (
        accumulate
        * operations.seconds(
            phase, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s, least=cluster.kernel_us * 1e-6
        )
        for phase in (FORWARD, BACKWARD)
    )
    update = update_bytes / bytes_per_s
    overhead = cluster.overhead_ms / 1e3
    measured = None
    if cluster.step_ms is not None:
        measured = cluster.step_ms / 1e3
    elif cluster.pairs_per_s is not None:
        measured = rows * accumulate / cluster.pairs_per_s
    if measured is not None:
        scale = measured / (forward + backward + update)
        forward, backward, update, overhead = forward * scale, backward * scale, update * scale, 0.0
    sending: dict[str, float] = {}
    for flow in flows:
        sending[flow.kind] = sending.get(flow.kind, 0.0) + cluster.seconds(flow)
    exposed = _exposed(cluster, flows, forward, backward / accumulate)
    return Prediction(forward, backward, update, overhead, sending, exposed)


def _exposed(cluster: ClusterConfig, flows: Sequence[Flow], forward: float, last_backward: float) -> dict[str, float]:
    """Seconds by kind that are waited for.

    Images are sent during the query's forward, about half of all. During the last backward keys and flags go first,
    then the gradients, bucket by bucket as they are ready: evenly over it. Everything else is waited for.
    """
    exposed = {flow.kind: 0.0 for flow in flows}
    behind: list[tuple[float, float]] = []
    for flow in flows:
        seconds = cluster.seconds(flow)
        if flow.when == "query forward":
            exposed[flow.kind] += max(0.0, seconds - forward / 2)
        elif flow.kind in ("keys", "control"):
            behind.insert(0, (0.0, seconds / flow.calls))
        elif flow.kind == "gradients" and flow.when == "backward":
            ready = 0.0
            for size in buckets(flow.given):
                ready += last_backward * size / flow.given
                behind.append((ready, seconds * size / flow.given))
        else:
            exposed[flow.kind] += seconds
    done = 0.0
    for ready, seconds in behind:
        done = max(done, ready) + seconds
    if behind:
        last = "gradients" if len(behind) > 2 else "keys"
        exposed[last] += max(0.0, done - last_backward)
    return exposed
