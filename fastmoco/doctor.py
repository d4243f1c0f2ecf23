"""`fastmoco doctor`: what this machine and installation have, and what will run on them."""

import argparse
import importlib
import os
import pkgutil
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fastmoco import ops
from fastmoco.errors import UserError
from fastmoco.ops import dispatch
from fastmoco.precision import default_precision

# Distribution and the extra that brings it ("" for what every installation has).
PACKAGES = (
    ("torch", ""),
    ("torchvision", ""),
    ("triton", ""),
    ("nvidia-dali-cuda120", "dali-cuda12"),
    ("nvidia-dali-cuda130", "dali-cuda13"),
    ("deepspeed", "deepspeed"),
    ("pydicom", "dicom"),
    ("pyarrow", "parquet"),
    ("timm", "timm"),
)
INSTRUCTION_SETS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "sve", "bf16")


class Row(NamedTuple):
    """One finding: the table it belongs to, what was looked at, and what was found."""

    section: str
    name: str
    value: str


def report() -> list[Row]:
    """All findings, in the order they are printed; what is lacking is a finding, never an error."""
    return [*_system(), *_gpus(), *_packages(), *_extension(), *_operations()]


def main(argv: Sequence[str] = ()) -> int:
    """Prints the report as tables and returns 0, since a lack is a finding and not an error.

    With --distributed the exit status is that of the preflight: 1 where something would stop training.
    """
    parser = argparse.ArgumentParser(prog="fastmoco doctor", description=__doc__)
    parser.add_argument(
        "--distributed", action="store_true",
        help="started by srun or torchrun on several nodes: measure network, clocks and disks between them",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="with --distributed: the folder for run folders, seen by every node")
    options = parser.parse_args(argv)
    if options.distributed:
        from fastmoco.preflight.command import preflight

        return preflight(options.out)
    if options.out is not None:
        raise UserError("--out is the shared folder that --distributed looks at: give both")
    rows = report()
    console = Console()
    for section in dict.fromkeys(row.section for row in rows):
        table = Table(title=section, title_justify="left", box=box.SIMPLE, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            if row.section == section:
                # Values such as fastmoco[timm] would otherwise be read as rich's markup.
                table.add_row(row.name, row.value.replace("[", r"\["))
        console.print(table)
    return 0


def _system() -> list[Row]:
    capabilities = torch.cpu.get_capabilities()
    found = [name for name in INSTRUCTION_SETS if capabilities.get(name)]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    values = {
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "processor": str(capabilities.get("cpu_name") or platform.machine()),
        "cores": f"{usable} usable; torch uses {torch.get_num_threads()} threads",
        "instruction sets": ", ".join(found) or "none that matter here",
        "training precision on cpu": default_precision("cpu"),
    }
    return [Row("System", name, value) for name, value in values.items()]


def _gpus() -> list[Row]:
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return [Row("GPUs", "none", f"torch is built {built} and sees no device")]
    rows = []
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        value = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
        rows.append(Row("GPUs", f"cuda:{i}", value))
    return [*rows, Row("GPUs", "training precision on cuda", default_precision("cuda"))]


def _packages() -> list[Row]:
    found = {name: _version(name) for name, _ in PACKAGES}
    # Of builds for several CUDA versions one is enough.
    dali = [name for name, version in found.items() if name.startswith("nvidia-dali") and version]
    rows = []
    for name, extra in PACKAGES:
        enough = f" ({dali[0]} is enough)" if dali and name.startswith("nvidia-dali") else ""
        absent = f"not installed{enough}: pip install 'fastmoco[{extra}]'" if extra else "not installed"
        rows.append(Row("Packages", name, found[name] or absent))
    return rows


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _extension() -> list[Row]:
    if dispatch.native is None:
        return [Row("C++ extension", "fastmoco._C", dispatch.NATIVE_MISSING)]
    info = dispatch.native.build_info()
    return [
        Row("C++ extension", "fastmoco._C", f"built with {info['compiler']}"),
        Row("C++ extension", "OpenMP", "yes" if info["openmp"] else "no: its operations run on one thread"),
        Row("C++ extension", "instruction set", info["instruction_set"]),
        Row("C++ extension", "CUDA", _cuda(info["cuda"], info["cuda_targets"])),
    ]


def _cuda(version: str, targets: str) -> str:
    if not version:
        return f"none: {targets}; install with FASTMOCO_CUDA=1 to have the build insist on it"
    return f"{version}, for {targets}"


def _operations() -> list[Row]:
    # An operation registers itself when its module is imported.
    for module in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        importlib.import_module(module.name)
    device_types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for choice in dispatch.table(device_types):
        because = "".join(f"; not {name}: {refusal}" for name, refusal in choice.refusals.items())
        rows.append(Row("Operations", f"{choice.operation} on {choice.device_type}", choice.chosen + because))
    return rows
