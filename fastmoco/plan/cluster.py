"""GPUs, nodes and the links between them, and how long collectives take there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastmoco.errors import UserError
from fastmoco.plan.traffic import Backend, Flow


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 TFLOP/s, TB/s of memory, GB of memory, and GB/s one way to the other GPUs of a node (NVLink)."""

    tflops: float
    memory_tb_s: float
    memory_gb: float
    link_gb_s: float


# The makers' figures for the SXM forms.
GPUS = {
    "a100": Gpu(312, 2.04, 80, 300),
    "h100": Gpu(989, 3.35, 80, 450),
    "b200": Gpu(2250, 8.0, 180, 900),
}


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines. Figures that are not given are the makers' for the kind of GPU."""

    nodes: int = 1
    """Machines."""
    gpus: int = 8
    """GPUs of each, with one process each."""
    gpu: Literal["a100", "h100", "b200"] = "h100"
    """Kind of GPU."""
    tflops: float | None = None
    """Its peak in dense bfloat16, TFLOP/s; --precision fp32 is taken to run at half of it (TF32)."""
    memory_tb_s: float | None = None
    """Bandwidth of its memory, TB/s."""
    memory_gb: float | None = None
    """Size of its memory, GB."""
    reached: float = 0.5
    """Share of both peaks that kernels reach; half is what an H100 was seen to (docs/results/gpu/planned.md)."""
    kernel_us: float = 4.0
    """Least time of one operation, microseconds: what small batches are bounded by."""
    overhead_ms: float = 0.0
    """Time of a step that the formulas know nothing of, milliseconds."""
    step_ms: float | None = None
    """Measured time of a step of one GPU alone with its share of the batch: it takes the place of the computed one."""
    pairs_per_s: float | None = None
    """The same, as measured pairs a second of one GPU."""
    inside_gb_s: float | None = None
    """Bandwidth between the GPUs of a node, GB/s one way and a GPU."""
    inside_us: float = 1.0
    """Latency between them, microseconds."""
    between_gb_s: float = 50.0
    """Bandwidth between nodes, GB/s one way and a node, all its adapters together: 50 is one of 400 Gb/s."""
    between_us: float = 5.0
    """Latency between them, microseconds."""
    backend: Backend = "nccl"
    """What moves the data: nccl, or gloo over TCP, for processors."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in (
            "tflops", "memory_tb_s", "memory_gb", "step_ms", "pairs_per_s", "inside_gb_s", "between_gb_s", "reached"
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
        for name in ("kernel_us", "overhead_ms", "inside_us", "between_us"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")
        if self.step_ms is not None and self.pairs_per_s is not None:
            raise UserError("--step-ms and --pairs-per-s say the same: give one")

    @property
    def world(self) -> int:
        """Processes."""
        return self.nodes * self.gpus

    @property
    def device(self) -> Gpu:
        """The GPU, with what was given in place of the makers' figures."""
        known = GPUS[self.gpu]
        return Gpu(
            self.tflops or known.tflops,
            self.memory_tb_s or known.memory_tb_s,
            self.memory_gb or known.memory_gb,
            self.inside_gb_s or known.link_gb_s,
        )

    def seconds(self, flow: Flow) -> float:
        """What all calls of `flow` in a step take, the links free for them: bandwidth, latency and a kernel, added.

        A sum takes the ring's latency or the tree's, whichever is the less; gathers, scatters and collections the
        ring's; an exchange that of one message, since all are sent at once.
        """
        if self.world == 1:
            return 0.0
        steady = flow.moved(self.world, self.backend) / (self.device.link_gb_s * 1e9) if self.gpus > 1 else 0.0
        if self.nodes > 1:
            between = flow.between(self.world, self.gpus, self.backend)
            steady = max(steady, between / (self.between_gb_s * 1e9))
        return steady + flow.calls * (self.kernel_us + self._latency(flow)) * 1e-6

    def _latency(self, flow: Flow) -> float:
        slowest = self.between_us if self.nodes > 1 else self.inside_us
        if flow.collective == "exchange":
            return slowest
        inside, between = self.nodes * (self.gpus - 1) * self.inside_us, (self.nodes - 1) * self.between_us
        if flow.collective != "sum":
            return inside + between
        tree = (self.gpus - 1) * self.inside_us + math.log2(self.nodes) * self.between_us
        return 2 * min(inside + between, tree)
