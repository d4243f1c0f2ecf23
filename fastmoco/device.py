"""The device that a --device option names."""

from __future__ import annotations

import torch

from fastmoco.errors import UserError


def find_device(name: str) -> torch.device:
    """The device called `name`, or for "auto" a GPU where there is one. Raises UserError where it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Moving a value there and back also refuses devices that hold no values.
        return torch.ones(1).to(name).cpu().to(name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        seen = f"cpu, cuda and cuda:0 to cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
        raise UserError(f"--device {name} cannot be used here: choose {seen}") from error


def device_name(device: torch.device | str) -> str:
    """What a GPU calls itself, such as NVIDIA H100; otherwise the kind of device, such as cpu."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
