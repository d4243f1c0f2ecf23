"""Compiles the Triton kernels for GPUs that are not here, and reads in the machine code what became of them.

The launchers themselves are run, on CPU tensors of the method's sizes and as if on the device in question, with the
launch replaced by a note of it: what is compiled is what they would launch there. Run as a program, in a process where
TRITON_INTERPRET is not set, it prints a JSON list of `Report`s; names of cases as arguments select some.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.shapes import resnet50_shapes
from fastmoco.kernels import crosscorr, ema, infonce, pooled_mse, queue_push, sgd_ema

# Multiprocessors of the A100, the H100 and the B200 (SXM), after which launchers cut up their work.
ARCHITECTURES = {80: 108, 90: 132, 100: 148}
LAUNCHERS = (crosscorr, ema, infonce, pooled_mse, queue_push, sgd_ema)
DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
TENSOR_CORES = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel, its arguments by name in order, the launch options, and how many programs there are of it."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]
    programs: int


@dataclass(frozen=True, slots=True)
class Report:
    """One kernel of one case on one architecture, launched as `programs`; `shared` in bytes, `local` the count of
    local-memory accesses, `vectors` that of accesses to global memory of 16 bytes."""

    case: str
    kernel: str
    architecture: int
    programs: int
    registers: int
    threads: int
    shared: int
    local: int
    tensor_cores: list[str]
    dots: int
    vectors: int


@contextmanager
def recording(architecture: int) -> Iterator[list[Launch]]:
    """Notes launches in place of making them, as on a device of that architecture."""
    launches: list[Launch] = []

    def run(self: JITFunction, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(self.arg_names, positional, strict=False))
        options = {name: value for name, value in named.items() if name not in self.arg_names}
        arguments |= {name: value for name, value in named.items() if name in self.arg_names}
        launches.append(Launch(self, {name: arguments[name] for name in self.arg_names}, options, math.prod(grid)))

    def processors(device: torch.device) -> int:
        return ARCHITECTURES[architecture]

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", run))
        for module in LAUNCHERS:
            if hasattr(module, "processors"):
                patches.enter_context(mock.patch.object(module, "processors", processors))
        yield launches


def source(launch: Launch) -> ASTSource:
    """The launch as the compiler sees it, specialised as the runtime would: on ones and on divisibility by 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name], aligned = f"*{DTYPES[value.dtype]}", value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            signature[parameter.name], aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        else:
            signature[parameter.name], aligned = "fp32", False
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def build(case: str, launch: Launch, architecture: int) -> Report:
    """Compiles one launch and reads its machine code."""
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", architecture, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        sass = _cuobjdump("-sass", cubin.name)
        usage = _cuobjdump("-res-usage", cubin.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None and re.search(r"\bEXIT\b", sass), "cuobjdump's output is not what it was"
    return Report(
        case=case,
        kernel=launch.kernel.__name__,
        architecture=architecture,
        programs=launch.programs,
        registers=int(registers[1]),
        threads=compiled.metadata.num_warps * 32,
        shared=compiled.metadata.shared,
        local=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        tensor_cores=sorted(set(TENSOR_CORES.findall(compiled.asm["ptx"]))),
        vectors=len(re.findall(r"\b(?:LDG|STG|LDGSTS)\S*\.128\b", sass)),
        dots=len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"])),
    )


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([CUOBJDUMP, option, path], check=True, capture_output=True, text=True).stdout


def _infonce(n: int, d: int, dtype: torch.dtype, *, k: int = 65536, simclr: bool = False) -> None:
    skip = torch.zeros(n, 2, dtype=torch.int64) if simclr else None
    # float16, and not the others, with the running maximum.
    infonce.infonce(
        torch.empty(n, d), torch.empty(n, d), torch.empty(k, d, dtype=dtype), skip, 0.07, 0.0, False, True, simclr
    )


def _crosscorr(n: int, d: int, form: str, dtype: torch.dtype = torch.float32) -> None:
    z = torch.ones(4, n, d, dtype=dtype)
    crosscorr.crosscorr(z, z.clone(), 1.0, 1 / 32, form, True)


def _pooled_mse(n: int, channels: int, side: int, grid: int, dtype: torch.dtype, *, pooled: bool = False) -> None:
    a = torch.empty(n, channels, side, side, dtype=dtype)
    _, difference = pooled_mse.pooled_mse(a, a[:, :, :grid, :grid] if pooled else a, grid)
    pooled_mse.pooled_mse_backward(difference, torch.ones(()), side, side, dtype)


def _resnet50(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype) for shape in resnet50_shapes(128)]


def _ema(source: torch.dtype) -> None:
    ema.ema_update(_resnet50(), _resnet50(source), _resnet50(torch.bfloat16), 0.999)


def _sgd_ema(gradient: torch.dtype) -> None:
    lists = [_resnet50(dtype) for dtype in (torch.float32, gradient, torch.float32, torch.float32, torch.bfloat16)]
    options = {"lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4, "ema": 0.999, "found_inf": torch.zeros(())}
    sgd_ema.sgd_ema_update(*lists, **options)


def _queue_push(n: int, d: int, dtype: torch.dtype) -> None:
    queue_push.queue_push(torch.empty(65536, d, dtype=dtype), torch.zeros((), dtype=torch.int64), torch.empty(n, d))


# The method's sizes, for every architecture.
METHOD: dict[str, Callable[[], None]] = {
    f"infonce N={n} {DTYPES[dtype]}": partial(_infonce, n, 128, dtype)
    for n in (8, 32, 256)
    for dtype in (torch.float32, torch.bfloat16)
} | {
    "crosscorr N=32": partial(_crosscorr, 32, 2048, "gram"),
    "pooled_mse 56 to 16, fp32": partial(_pooled_mse, 32, 256, 56, 16, torch.float32),
    "pooled_mse 56 to 16, bf16": partial(_pooled_mse, 32, 256, 56, 16, torch.bfloat16),
    "pooled_mse 64 to 1, 256 channels": partial(_pooled_mse, 32, 256, 64, 1, torch.bfloat16),
    "pooled_mse 8 to 1, 2048 channels": partial(_pooled_mse, 32, 2048, 8, 1, torch.bfloat16),
    "ema ResNet-50": partial(_ema, torch.float32),
    "sgd_ema ResNet-50": partial(_sgd_ema, torch.float32),
    "queue_push 256": partial(_queue_push, 256, 128, torch.bfloat16),
}
# Other paths through the kernels, for one.
OTHERS: dict[str, Callable[[], None]] = {
    "infonce fp32 SimCLR": partial(_infonce, 512, 128, torch.float32, k=512, simclr=True),
    "infonce fp16 running maximum": partial(_infonce, 256, 128, torch.float16),
    "infonce fp32 D=512": partial(_infonce, 256, 512, torch.float32),
    "infonce bf16 D=129": partial(_infonce, 33, 129, torch.bfloat16, k=1021),
    "crosscorr N=256 bf16": partial(_crosscorr, 256, 2048, "gram", torch.bfloat16),
    "crosscorr direct, odd": partial(_crosscorr, 33, 37, "direct"),
    "ema of bf16": partial(_ema, torch.bfloat16),
    "sgd_ema of fp16": partial(_sgd_ema, torch.float16),
    "pooled_mse 56 to 1": partial(_pooled_mse, 8, 256, 56, 1, torch.bfloat16),
    "pooled_mse 7 to 4, 3 channels, pooled": partial(_pooled_mse, 8, 3, 7, 4, torch.float16, pooled=True),
    "pooled_mse 7 to 4, 2048 channels": partial(_pooled_mse, 256, 2048, 7, 4, torch.bfloat16),
}


def reports(names: list[str]) -> Iterator[Report]:
    """Every launch of the cases named, or of all; what several cases launch alike is compiled once."""
    built: dict[tuple[str, str, int], Report] = {}
    for name, run in (METHOD | OTHERS).items():
        if names and name not in names:
            continue
        for architecture in ARCHITECTURES if name in METHOD else (90,):
            with recording(architecture) as launches:
                run()
            assert launches, name
            for launch in launches:
                key = source(launch).hash(), repr(launch.options), architecture
                if key not in built:
                    built[key] = build(name, launch, architecture)
                yield replace(built[key], case=name, programs=launch.programs)


if __name__ == "__main__":
    json.dump([asdict(report) for report in reports(sys.argv[1:])], sys.stdout, indent=1)
