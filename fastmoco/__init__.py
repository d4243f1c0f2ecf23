"""fastmoco: momentum-contrast pretraining of image encoders with intermediate-layer losses."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
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


class _CheckoutKernels:
    """Finds fastmoco.kernels in the checkout's kernels/ folder, so that a bare checkout runs without installation."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != f"{__name__}.kernels":
            return None
        folder = Path(__file__).parents[1] / "kernels"
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


# An installed package has its kernels inside; site-packages may hold somebody else's `kernels` beside it.
if Path(__file__).parents[1].joinpath("pyproject.toml").is_file():
    sys.meta_path.insert(0, _CheckoutKernels())
