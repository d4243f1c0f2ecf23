"""What all tests share."""

import contextlib
import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Before anything imports Triton, which reads it once: where there is no GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Drawn examples are the same in every run, and none fails because the machine is busy. (A machine that only runs
# tests/gpu may have no hypothesis.)
if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "steady", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("steady")

# What imports the Triton kernels cannot even be collected without Triton, which not every platform has.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_triton_*.py", "test_roofline.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says so at the end: the header is not printed by `make test`, which is quiet."""
    if collect_ignore_glob:
        terminalreporter.write_line(f"Triton is not installed, so left out: {', '.join(collect_ignore_glob)}")


def pytest_collection_finish() -> None:
    """Starts what processes of tests are forked from before anything else starts another such server."""
    if worlds := sys.modules.get("worlds"):
        worlds.start_server()


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a test finds out about its files out of the user's cache, and the other way round."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def memory_given_back() -> Iterator[None]:
    """What the tests of a file have freed goes back to the system; glibc would keep gigabytes of trainers' tensors."""
    yield
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave curves.png out, which takes longer than the steps of a test: test_run_folder.py has one draw it."""
    monkeypatch.setattr("fastmoco.train.record.draw_curves", lambda rows, path: None)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Maps the name of a set of real images to its folder, under $FASTMOCO_TEST_DATA or ../shared/data.

    Where the folder is absent the test is skipped; under CI that is a failure, since there nothing may pass
    unseen.
    """
    base = Path(os.environ.get("FASTMOCO_TEST_DATA") or ROOT.parent / "shared" / "data")

    def find(name: str) -> Path:
        folder = base / name
        if not folder.is_dir():
            reason = f"no test images at {folder}; set FASTMOCO_TEST_DATA to the folder that holds {name}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        return folder

    return find


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Maps a size ("40k") to the folder "small", where a file system of so many bytes is mounted until the test ends.

    Where mounting is not permitted the test is skipped; under CI that is a failure.
    """
    folder = tmp_path / "small"

    def mount(size: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
            reason = f"a small file system cannot be mounted here: {said}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, or the largest integer: an element left unwritten shows."""
    # Only warned, where cuBLAS would want an environment variable for it.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
