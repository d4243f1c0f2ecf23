"""Which implementation of an operation runs: decided here, from the tensors' device and what is built.

An operation registers its implementations when its module is imported:

    dispatch.register("ema", "reference", _reference)
    dispatch.register("ema", "native", _native, device_types=("cpu",), missing=dispatch.NATIVE_MISSING)

and asks for one each time it is called:

    dispatch.pick("ema", tensor, implementation)(...)
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from fastmoco.errors import UserError

native: ModuleType | None = None
NATIVE_MISSING = ""
# The latest of what there is in the extension: one that was built from older sources goes unused, not half used.
_LATEST = "max_pool"
try:
    native = importlib.import_module("fastmoco._C")
    if not hasattr(native, _LATEST):
        native, NATIVE_MISSING = None, "the C++ extension was built from older sources: install fastmoco again"
except ModuleNotFoundError:
    NATIVE_MISSING = "the C++ extension was not built: install a C++ compiler, then install fastmoco again"
except ImportError as error:
    NATIVE_MISSING = f"the C++ extension does not load: {error}"

TRITON_MISSING = "" if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton"

# The first of these that can run is the one that does; "reference" runs anywhere.
PREFERENCE = ("triton", "native", "reference")


@dataclass(frozen=True, slots=True)
class Implementation:
    """One registered implementation.

    `device_types` and `dtypes` None mean any; `missing` is why it cannot run, or "". One that is `preferred` comes
    before the order of `PREFERENCE`.
    """

    function: Callable[..., Any]
    device_types: tuple[str, ...] | None
    missing: str
    dtypes: tuple[torch.dtype, ...] | None = None
    preferred: bool = False

    def runs(self, device_type: str, dtype: torch.dtype) -> bool:
        """Whether it can run on tensors of `device_type` and `dtype`."""
        return (
            not self.missing
            and (self.device_types is None or device_type in self.device_types)
            and (self.dtypes is None or dtype in self.dtypes)
        )

    def refusal(self, device_type: str, dtype: torch.dtype) -> str:
        """Why this implementation cannot run on tensors of `device_type` and `dtype`; "" when it can."""
        if self.missing:
            return self.missing
        if self.device_types is not None and device_type not in self.device_types:
            return f"it runs on {' and '.join(self.device_types)} tensors, not on {device_type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            name = str(dtype).removeprefix("torch.")
            narrow = dtype == torch.float64
            return f"it computes in float32, which is too narrow for {name}" if narrow else f"it does not take {name}"
        return ""


@dataclass(frozen=True, slots=True)
class Choice:
    """What `pick` chooses on a device type, and why the implementations preferred to it cannot run."""

    operation: str
    device_type: str
    chosen: str
    refusals: dict[str, str]


_registry: dict[str, dict[str, Implementation]] = {}


def register(
    operation: str,
    name: str,
    function: Callable[..., Any],
    *,
    device_types: tuple[str, ...] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    missing: str = "",
    preferred: bool = False,
) -> None:
    """Adds implementation `name` (one of `PREFERENCE`) of `operation`.

    device_types: device types its tensors may be on; None for any.
    dtypes: dtypes that the tensor given to `pick` may have; None for any floating dtype.
    missing: why it cannot run in this installation; "" when it can.
    preferred: whether it is chosen before those that `PREFERENCE` puts in front of it.
    """
    assert name in PREFERENCE, name
    implementations = _registry.setdefault(operation, {})
    assert name not in implementations, f"{operation}: {name} is registered already"
    implementations[name] = Implementation(function, device_types, missing, dtypes, preferred)
    # In the order in which they are tried.
    order = sorted(implementations, key=lambda name: (not implementations[name].preferred, PREFERENCE.index(name)))
    _registry[operation] = {name: implementations[name] for name in order}


def register_native(
    operation: str,
    definition: Callable[..., Any],
    native: Callable[..., Any],
    *,
    dtypes: tuple[torch.dtype, ...],
    missing: str = NATIVE_MISSING,
) -> None:
    """Adds an `operation` that has its definition as the reference, and C++ on a CPU for `dtypes`."""
    register(operation, "reference", definition)
    register(operation, "native", native, device_types=("cpu",), dtypes=dtypes, missing=missing)


def pick(operation: str, tensor: torch.Tensor, implementation: str | None = None) -> Callable[..., Any]:
    """The function that performs `operation` on tensors of `tensor`'s device type and dtype.

    implementation: the one to use; None takes the first that can run, in the order of `PREFERENCE` save for one that
        was registered as preferred.
    Raises UserError where the one named is unknown or cannot run here, saying why and which can.
    """
    implementations = _registry[operation]
    device_type, dtype = tensor.device.type, tensor.dtype
    if implementation is None:
        return next(known.function for known in implementations.values() if known.runs(device_type, dtype))
    if implementation in implementations:
        # Triton's interpreter runs kernels on CPU tensors: slow enough that it has to be asked for.
        interpreted = implementation == "triton" and device_type == "cpu" and _triton_interprets()
        refusal = implementations[implementation].refusal("cuda" if interpreted else device_type, dtype)
        if not refusal:
            return implementations[implementation].function
    else:
        refusal = "this operation has no such implementation"
    usable = [name for name, other in implementations.items() if not other.refusal(device_type, dtype)]
    raise UserError(
        f'{operation}: implementation="{implementation}" cannot be used here: {refusal}. '
        f"On {device_type} tensors choose one of {', '.join(usable)}, or None to have it chosen."
    )


def _triton_interprets() -> bool:
    if TRITON_MISSING:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def table(device_types: Iterable[str]) -> list[Choice]:
    """What runs in float32 for every registered operation on each of `device_types`, by operation name."""
    kinds = list(device_types)
    return [_choose(operation, device_type, torch.float32) for operation in sorted(_registry) for device_type in kinds]


def _choose(operation: str, device_type: str, dtype: torch.dtype) -> Choice:
    refusals: dict[str, str] = {}
    for name, implementation in _registry[operation].items():
        refusal = implementation.refusal(device_type, dtype)
        if not refusal:
            return Choice(operation, device_type, name, refusals)
        refusals[name] = refusal
    raise AssertionError(f"{operation}: no reference implementation is registered")
