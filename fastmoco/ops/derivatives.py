"""What the operations that compute their gradients with the loss say of further ones."""

from __future__ import annotations

import torch


def differentiated_again() -> bool:
    """To be called in a backward: whether its gradients are to be differentiated in turn."""
    # Grad mode is on in a backward with create_graph=True, and while a compiler traces it.
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def refuse_second_derivative(operation: str) -> None:
    """To be called in a backward: RuntimeError where its gradients are to be differentiated in turn.

    They would be taken for constants, and a gradient penalty be silently wrong. The operation's definition can be.
    """
    if differentiated_again():
        raise RuntimeError(
            f"{operation} has no second derivative: its gradients come with the loss, without a graph of their own. "
            f"fastmoco.ops.definitions.{operation} has one."
        )
