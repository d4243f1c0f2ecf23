"""What the GPU's tests share: each implementation that can run is a case of its own."""

from types import SimpleNamespace

import pytest
import torch

from cuda_checks import DEVICE, on_cuda
from fastmoco.errors import UserError
from fastmoco.ops import dispatch


def usable(operation: str) -> list[str]:
    """The implementations of `operation` that run on `DEVICE`, whether or not this machine has one."""
    names = []
    for name in dispatch.PREFERENCE:
        # Its interpreter has tests of its own: slow, and no judge of bfloat16.
        if name == "triton" and not on_cuda():
            continue
        try:
            dispatch.pick(operation, SimpleNamespace(device=DEVICE, dtype=torch.float32), name)
        except UserError:
            continue
        names.append(name)
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Where a test takes `implementation`, its module's OPERATION says of what."""
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", usable(metafunc.module.OPERATION))


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> None:
    """Fails, rather than skips, where there is no GPU: these tests are only run when asked for."""
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.fail("PyTorch sees no GPU here")
    torch.manual_seed(0)
