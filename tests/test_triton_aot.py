"""What the compiler makes of the Triton kernels for A100, H100 and B200, without any of them (aot.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A minute of compiling.
pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[1]
# Bytes of shared memory that a block may have (CUDA C++ Programming Guide, compute capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536
KERNELS = {"sweep", "merge", "forward", "backward", "ema", "sgd_ema", "write_rows", "advance"} | {
    "standardize",
    "products",
    "finish",
    "gradient",
}
LARGE = ("infonce N=256 bf16", "sweep")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Of every kernel; compiled where the interpreter, chosen for the other tests, is not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(ROOT / "tests" / "aot.py")]
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def faults(report: dict) -> list[str]:
    found = []
    if report["local"]:
        found.append(f"{report['local']} accesses to local memory: registers are spilled")
    if report["shared"] > SHARED[report["architecture"]]:
        found.append(f"{report['shared']} bytes of shared memory do not fit")
    if report["registers"] * report["threads"] > REGISTERS:
        found.append(f"{report['registers']} registers for each of {report['threads']} threads do not fit")
    if report["dots"] and not report["tensor_cores"]:
        found.append("a matrix product does not run on tensor cores")
    return found


def test_no_kernel_spills_or_exceeds_the_device_and_products_run_on_tensor_cores(reports: list[dict]) -> None:
    bad = {f"{r['case']}: {r['kernel']}, sm_{r['architecture']}": faults(r) for r in reports if faults(r)}
    assert not bad


def test_everything_was_compiled(reports: list[dict]) -> None:
    assert {report["architecture"] for report in reports} == {80, 90, 100}
    assert {report["kernel"] for report in reports} == KERNELS
    assert {report["kernel"] for report in reports if report["dots"]} == {"sweep"}


def test_each_architecture_has_its_own_division_of_work(reports: list[dict]) -> None:
    """65,536 rows for two programs a multiprocessor, in whole steps of 64; 32 cells of 2,048 channels, for four."""
    launched = {(r["case"], r["kernel"], r["architecture"]): r["programs"] for r in reports}
    sweeps = {a: launched["infonce N=32 bf16", "sweep", a] for a in SHARED}
    assert sweeps == {80: 205, 90: 256, 100: 256}
    cells = {a: launched["pooled_mse 8 to 1, 2048 channels", "forward", a] for a in SHARED}
    assert cells == {80: 32 * 2048 // 128, 90: 32 * 2048 // 64, 100: 32 * 2048 // 64}


def test_memory_is_accessed_16_bytes_at_a_time(reports: list[dict]) -> None:
    """In every kernel but the one that moves a single number."""
    narrow = {r["kernel"] for r in reports if r["architecture"] != 90 and not r["vectors"]}
    assert narrow == {"advance"}


def test_large_products_use_the_architectures_own_instructions(reports: list[dict]) -> None:
    """Those that only an H100 or only a B200 has; below 64 rows mma.sync is all there is."""
    found = {r["architecture"]: r["tensor_cores"] for r in reports if (r["case"], r["kernel"]) == LARGE}
    assert found == {80: ["mma.sync"], 90: ["wgmma.mma_async"], 100: ["tcgen05.mma"]}
