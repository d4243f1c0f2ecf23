"""The precision training uses where the user names none."""

from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]


def default_precision(device_type: str) -> Precision:
    """Autocast to bfloat16 where the device multiplies it in hardware, else float32.

    Where bfloat16 is emulated it is the slower of the two, and the less exact. CUDA devices have it from
    compute capability 8.0 (A100) on, x86 processors with AVX512-BF16 or AMX.

    device_type: a torch device type; "cuda" speaks of the current device.
    """
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device_type == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    return "fp32"


def cpu_has_bf16() -> bool:
    """Whether this processor has instructions that multiply bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
