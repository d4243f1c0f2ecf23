"""Weights in and out: torchvision's key layout, in safetensors or PyTorch files; reading never executes code."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fastmoco.atomic import replacing
from fastmoco.errors import UserError
from fastmoco.models.encoder import Encoder
from fastmoco.models.foreign import Backbone, query_backbone, read_checkpoint, state_dict_of
from fastmoco.models.resnet import ARCHS, BasicBlock, Bottleneck

# The key of the safetensors header under which fastmoco keeps what it knows of the file, as JSON.
METADATA_KEY = "fastmoco"
# The one under which the tensors' checksum stands: safetensors has none, and reads flipped bits as weights.
CHECKSUM_KEY = "crc32"
CHECKPOINTS = "checkpoints"
# The query encoder with its head, where a run keeps that alone of its checkpoints.
QUERY = "query.safetensors"
# In a run folder: its settings.
CONFIG = "config.json"
EXPORTED = "encoder.safetensors"
SAFETENSORS = ".safetensors"
# Of files that torch.save writes.
PYTORCH = (".pth", ".pt", ".bin")


def load_encoder(path: str | Path) -> Encoder:
    """The encoder in `path`, in evaluation mode: a run folder, a checkpoint, an exported encoder, or a ResNet of
    torchvision's or of a library that `foreign.query_backbone` knows (.safetensors, or .pth and .ckpt, of which no code
    is run).

    From a run or a checkpoint the query encoder comes with its head; otherwise the head is the identity, and the
    embedding is the pooled stage-4 feature. `image_size` and `resize` are set where the file says them.

    Raises UserError where the file is missing, damaged or holds no torchvision ResNet.
    """
    return _read_encoder(Path(path))[0]


def _read_encoder(path: Path) -> tuple[Encoder, Backbone]:
    """As `load_encoder`, and how its backbone was found in the file."""
    file = weights_file(path)
    state, meta = read_weights(file)
    config = meta.get("config", {})
    if "step" in meta:
        names = [name.removeprefix("module.") for name in state]
        query = _strip(state, "module.query.")
        own = _strip(query, "backbone.")
        others = [name for name in names if not name.startswith("query.backbone.")]
        found = Backbone(own, f"fastmoco, at step {meta['step']}", "query.", others)
        model = config["model"]
        encoder = Encoder(model["arch"], head=model["head"], dim=model["dim"])
        _load(encoder, encoder.arch, query, file)
    else:
        found = query_backbone(state, file)
        if "arch" in meta:
            found = found._replace(layout="fastmoco")
        encoder = Encoder(infer_arch(found.tensors, file))
        _load(encoder.backbone, encoder.arch, found.tensors, file)
    encoder.config = config
    encoder.image_size = config.get("views", {}).get("size")
    encoder.resize = config.get("views", {}).get("resize")
    return encoder.eval(), found


def save_encoder(path: Path, encoder: Encoder, config: dict[str, Any]) -> None:
    """Write the backbone of `encoder` to `path` in torchvision's key layout, without `fc`.

    A .safetensors file has `config`, of the run it comes from, in its header; .pth, .pt and .bin are torch.save's, of
    the tensors alone.

    Raises UserError for other names and where the file cannot be written; `path` is then as it was.
    """
    if path.suffix not in (SAFETENSORS, *PYTORCH):
        raise UserError(f"{path}: a file of weights is named {SAFETENSORS}, or {', '.join(PYTORCH)} for torch.save's")
    tensors = {name: value.detach().cpu().contiguous() for name, value in encoder.backbone.state_dict().items()}
    if path.suffix in PYTORCH:
        held = io.BytesIO()
        torch.save(tensors, held)
        with _writing(path) as temporary:
            temporary.write_bytes(held.getbuffer())
        return
    meta = {"arch": encoder.arch, "config": config, "input": "RGB in [0, 1], no mean or deviation taken off"}
    write_weights(path, tensors, meta)


def initial_backbone(init: str, arch: str) -> tuple[dict[str, Tensor], str]:
    """The state dict that --init names, checked to be an `arch`, and a line that says where it was found and how.

    Raises UserError where it cannot be had or is another architecture.
    """
    if init == "torchvision":
        from torchvision.models import get_model_weights

        weights = get_model_weights(arch).DEFAULT
        try:
            state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(
                f"--init torchvision: {weights.url} cannot be downloaded ({error}); fetch it elsewhere and "
                "give the file to --init"
            ) from error
        found = query_backbone(state, Path(weights.url))
        return found.tensors, f"starting from {weights.url.rpartition('/')[2]}: {arch}, {found}"
    file = weights_file(Path(init))
    encoder, found = _read_encoder(file)
    if encoder.arch != arch:
        raise UserError(f"--init {init} holds a {encoder.arch}, not --arch {arch}")
    return encoder.backbone.state_dict(), f"starting from {file}: {arch}, {found}"


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a .safetensors or .pth file, and what fastmoco wrote into its header ({} for other files).

    Raises UserError where the file is missing, damaged, or would need code to be executed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix != SAFETENSORS:
        return state_dict_of(read_checkpoint(path), path), {}
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is truncated or damaged ({error}); use another file, or for a run remove it to go on from the "
            "checkpoint before"
        ) from error
    if CHECKSUM_KEY in header and header[CHECKSUM_KEY] != _checksum(tensors):
        raise UserError(
            f"{path} is damaged: its tensors are not those that were written; use another file, or for a run remove it "
            "to go on from the checkpoint before"
        )
    return tensors, json.loads(header.get(METADATA_KEY, "{}"))


def write_weights(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` to `path` as safetensors with `meta` in its header, atomically.

    Raises UserError where the file cannot be written (a full disk, no permission); `path` is then as it was.
    """
    with _writing(path) as temporary:
        # Not save_file, which writes to a temporary file of its own naming that a killed process leaves behind.
        header = {METADATA_KEY: json.dumps(meta), CHECKSUM_KEY: _checksum(tensors)}
        temporary.write_bytes(save(tensors, metadata=header))


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """As `replacing`, in a folder that is made where it is not there. Raises UserError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} could not be written: {reason}; name another file, or make room") from error


def _checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of the tensors' bytes in the order of their names, in hexadecimal."""
    crc = 0
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def infer_arch(state: dict[str, Tensor], file: Path) -> str:
    """Which torchvision ResNet a state dict belongs to, from its blocks."""
    blocks = tuple(
        len({m[1] for name in state if (m := re.match(rf"layer{stage}\.(\d+)\.", name))}) for stage in (1, 2, 3, 4)
    )
    block = Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock
    first = state["conv1.weight"].shape if "conv1.weight" in state else ()
    channels = first[0] if len(first) == 4 else 0
    arch = next((arch for arch, plan in ARCHS.items() if plan == (block, blocks, channels)), None)
    if arch is None:
        shown = ", ".join(list(state)[:3])
        raise UserError(
            f"{file}: not a torchvision ResNet 18 to 152 (blocks {blocks}, {channels} channels; first keys: {shown})"
        )
    return arch


def run_folder(path: Path) -> Path:
    """The run that `path`, a run folder, a checkpoint or an exported encoder, belongs to."""
    if path.is_dir():
        return path
    return path.parent.parent if path.parent.name == CHECKPOINTS else path.parent


def weights_file(path: Path) -> Path:
    """The file that `load_encoder` reads: of a run folder its newest checkpoint, or what is left of it, the query
    encoder with its head, or the exported encoder.

    Raises UserError where there is none.
    """
    if not path.exists():
        raise UserError(f"{path}: no such run folder or file")
    if path.is_file():
        return path
    checkpoints = sorted((path / CHECKPOINTS).glob("step-*.safetensors"))
    if checkpoints:
        return checkpoints[-1]
    for name in (QUERY, EXPORTED):
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"{path}: neither {CHECKPOINTS}/step-*.safetensors nor {QUERY} nor {EXPORTED} in it; is it a run folder?"
    )


def _strip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _load(module: torch.nn.Module, arch: str, state: dict[str, Tensor], file: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        for name, value in module.state_dict().items():
            if name in state and state[name].shape != value.shape:
                raise UserError(
                    f"{file}: its weights are of other shapes than a {arch}'s: {name} is {tuple(state[name].shape)}, "
                    f"not {tuple(value.shape)}; of networks with these blocks only plain ResNets are read"
                ) from error
        raise UserError(f"{file} does not fit: {' '.join(str(error).split())}") from error
