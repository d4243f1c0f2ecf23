"""Checkpoints of other libraries: the query encoder in them, in torchvision's key layout, read without their code."""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoco.errors import UserError

# Where a checkpoint keeps the weights: Lightning and MoCo, Barlow Twins, others.
_CONTAINERS = ("state_dict", "model", "model_state_dict")
# What wrappers put before every key.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# What wrappers of the backbone alone put behind its prefix: DataParallel, fastmoco's Accelerated, torch.compile.
_WRAPPED = r"(?:(?:module|_orig_mod)\.)*"
# What stands before the backbone's keys, first the query's, and whose layout that is.
_BACKBONES = {
    "encoder_q.": "MoCo",
    "base_encoder.": "MoCo v3",
    "backbone.": "lightly, solo-learn or Barlow Twins",
    "encoder.": "solo-learn's first versions",
    "": "torchvision",
}
# What else such checkpoints hold: key encoders, heads, queues, stage projectors, online classifiers, loss state.
_OTHERS = (
    r"encoder_k\.|momentum_|key_|teacher_|student_|(backbone|head)_(momentum|ema)\.|queue|(local_)?projection_head|"
    r"projector|prediction_head|predictor|prototypes|local_memory_|p[1-4]\.|bn\.|fc\.|head\.|classifier|online_|"
    r"criterion|loss|knn|(\w+\.)+projectors\.stage\d+\."
)
_OWN = r"(conv1|bn1|layer[1-4])\."
# lightly's examples make the backbone a Sequential of a torchvision ResNet's children.
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


class Backbone(NamedTuple):
    """A backbone's `tensors` by torchvision's names, and how they were found: in the `layout` of which library, whose
    keys for them begin with `prefix`, and with which `others` beside them, by name, that were left out."""

    tensors: dict[str, Tensor]
    layout: str
    prefix: str
    others: list[str]

    def __str__(self) -> str:
        keys = f" ({self.prefix}*)" if self.prefix else ""
        said = f"{len(self.tensors)} tensors in the layout of {self.layout}{keys}"
        if not self.others:
            return said
        ours, theirs = len(self.prefix), [name for name in self.others if not name.startswith(self.prefix)]
        parts = [name[:ours] + name[ours:].partition(".")[0] for name in self.others if name not in theirs]
        parts += [name.partition(".")[0] for name in theirs]
        return f"{said}; left out {len(self.others)}: {_few(list(dict.fromkeys(parts)))}"


class _Allowed(type):
    """Classes that torch's reader takes for a dict: it lets items be set on that alone, which it tells by `==`. Objects
    made of them are equal to them, so that what `getattr` would have given can be called."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is dict or isinstance(other, _Inert)

    __hash__ = type.__hash__


class _Inert(list[Any], metaclass=_Allowed):
    """What stands for an object of a class that is not loaded: it can be made, filled and called, and does nothing.

    A list, as the reader appends to these alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *args: Any) -> _Inert:
        return self

    # It may be a key.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]


def read_checkpoint(path: Path) -> Any:
    """What `path`, a file of torch.save, holds, by torch's restricted reader (`weights_only`): tensors, containers and
    numbers as they are, and objects of any other class, of which no code is run or imported, as empty ones.

    Raises UserError where it cannot be read so.
    """
    if not path.stat().st_size:
        raise UserError(f"{path}: an empty file; write or fetch it again, or give another")
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            stand_ins = [(_Allowed("Inert", (_Inert,), {}), name) for name in names]
            with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load's own errors have no common class short of Exception
        # Reading a file that is no archive also fails on what its first pickle does not show: that its end is missing.
        refused = isinstance(error.__context__, pickle.UnpicklingError) or zipfile.is_zipfile(path)
        if not (refused and _is_whole(path)):
            raise UserError(
                f"{path}: truncated, damaged or no PyTorch file; write or fetch it again, or give another"
            ) from error
        raise UserError(
            f"{path}: not a checkpoint that can be read without executing code; give a run folder, a .safetensors file "
            "or a .pth file of tensors"
        ) from error


def _is_whole(path: Path) -> bool:
    """Whether `path` begins with a pickle, or is an undamaged archive with one as torch writes it; none of it runs."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as stream:
                return any(operation.name == "STOP" for operation, *_ in pickletools.genops(stream))
        with zipfile.ZipFile(path) as archive:
            held = any(name.endswith("/data.pkl") for name in archive.namelist())
            return held and archive.testzip() is None
    except Exception:  # what damaged archives and pickles raise is of many classes
        return False


def state_dict_of(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name of what `read_checkpoint` gave. Raises UserError where it holds no state dict of tensors."""
    if isinstance(loaded, Mapping):
        for name in _CONTAINERS:
            if isinstance(loaded.get(name), Mapping):
                loaded = loaded[name]
                break
    if not isinstance(loaded, Mapping) or not loaded:
        raise UserError(f"{path}: not a state dict of tensors, nor a checkpoint with one in {', '.join(_CONTAINERS)}")
    nested = [str(name) for name, value in loaded.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(
            f"{path}: no state dict of tensors, but dictionaries under {_few(nested)}; save the one with the encoder's "
            f"tensors by itself, or under {', '.join(_CONTAINERS)}"
        )
    others = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        code = any(isinstance(value, _Inert) for value in loaded.values())
        raise UserError(
            f"{path}: not a state dict of tensors{' that can be read without executing code' if code else ''}: "
            f"{_few(others)} are none"
        )
    return {str(name): value for name, value in loaded.items()}


def query_backbone(state: Mapping[str, Tensor], path: Path) -> Backbone:
    """The query encoder's backbone among `state`, with torchvision's names and without its last layer `fc`.

    Those of fastmoco's exports, torchvision, timm, facebookresearch/moco (v1 to v3), the intermediate-layer paper,
    lightly, solo-learn and barlowtwins are known. Raises UserError where there is none, and for keys that are neither
    the backbone's nor known to belong to something else, which it lists.
    """
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    for start in _BACKBONES:
        first = re.compile(rf"({re.escape(start)}{_WRAPPED})(conv1|0)\.weight")
        prefix = next((match[1] for match in map(first.fullmatch, state) if match), None)
        if prefix is not None:
            break
    else:
        raise UserError(
            f"{path}: no conv1.weight in it, alone or after {', '.join(filter(None, _BACKBONES))}: the keys must be "
            f"those of a ResNet of torchvision, or of a library that has one; it has {_few(list(state))}"
        )
    sequential = f"{prefix}conv1.weight" not in state
    found, others, unknown = {}, [], []
    for name, value in state.items():
        key = name.removeprefix(prefix)
        inside = name.startswith(prefix)
        if sequential and inside:
            key = _of_sequential(key)
        if inside and re.match(_OWN, key):
            found[key] = value
        elif re.match(_OTHERS, key if inside else name):
            others.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{path}: keys that are neither a ResNet's nor known of any library: {_few(unknown)}")
    return Backbone(found, _BACKBONES[start], prefix, others)


def _of_sequential(name: str) -> str:
    first, dot, rest = name.partition(".")
    return _SEQUENTIAL.get(first, first) + dot + rest


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
