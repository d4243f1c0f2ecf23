"""What runs on a GPU when nothing is named."""

import pytest
import torch

from cuda_checks import on_cuda
from fastmoco.ops import crosscorr, dispatch, ema, infonce, pooled_mse, queue_push, sgd_ema, views

pytestmark = pytest.mark.gpu


def test_no_operation_falls_back_to_its_reference() -> None:
    assert all(module.__name__ for module in (crosscorr, ema, infonce, pooled_mse, queue_push, sgd_ema, views)), (
        "registered at import"
    )
    on_cpus = ("batch_norm", "fold", "max_pool", "unfold")
    slow = {
        choice.operation: choice.refusals
        for choice in dispatch.table(["cuda"])
        # cuDNN's BatchNorm and torch's pooling are the references' on a GPU, and convolutions there unfold nothing; the
        # C++ is there for CPUs.
        if choice.chosen == "reference" and not choice.operation.startswith(on_cpus)
    }
    assert not on_cuda() or not slow, f"only the reference runs: {slow}"


def test_the_extension_has_its_cuda_part() -> None:
    assert dispatch.native is not None, dispatch.NATIVE_MISSING
    info = dispatch.native.build_info()
    assert not on_cuda() or info["cuda"], f"built without CUDA: {info['cuda_targets']}"
    assert not on_cuda() or torch.cuda.get_device_capability() >= (8, 0)
