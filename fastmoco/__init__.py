"""fastmoco: momentum-contrast pretraining of image encoders with intermediate-layer losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmoco.models.weights import load_encoder

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `fastmoco recipes` and `import fastmoco` need not wait for it.
    if name == "load_encoder":
        from fastmoco.models.weights import load_encoder

        return load_encoder
    raise AttributeError(f"module 'fastmoco' has no attribute {name!r}")
