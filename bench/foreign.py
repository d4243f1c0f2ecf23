"""Do checkpoints that other libraries' own code writes give the same features here, and ours there? One table.

`--peers FOLDER` holds what is not installed: clones named `lightly` (of lightly-ai/lightly), `solo-learn` (of
vturrisi/solo-learn), `moco`, `moco-v3` and `barlowtwins` (of facebookresearch/..., of moco the commit 7397dfe: later
ones import what is not in it) and `intermdiate_layer_matter_ssl` (of aakashrkaku/..., the paper's), so that there is,
say, FOLDER/moco/moco/builder.py; and `site`, a folder of `pip install --target` with what they import and is not
installed (lightning, pandas, timm with huggingface_hub). What is missing has a dash.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file

from bench.command import start
from bench.foreign_parts import NAMED, TIMM, features, installed, shaken
from bench.foreign_peers import PEERS
from bench.harness import Missing
from bench.parity import difference
from bench.timing import save
from fastmoco.errors import UserError
from fastmoco.models.encoder import Encoder
from fastmoco.models.foreign import query_backbone
from fastmoco.models.weights import EXPORTED, load_encoder, read_weights, save_encoder

COLUMNS = [
    "read by", "peer", "version", "what wrote the file", "arch", "keys read", "difference", "key encoder", "holds",
    "note",
]  # fmt: skip
# As a share of the largest number of a stage: the same float32 weights, in kernels that add in another order.
LIMIT = 1e-5
OURS = "fastmoco"


@dataclass(kw_only=True)
class ForeignArgs:
    """Let other libraries write checkpoints after a step of training, and compare the features of both sides."""

    peers: Path
    """Folder of the libraries' sources; `bench/foreign.py` says how it is laid out."""
    out: Path = Path("docs/results/foreign.md")
    """Markdown file to write; a JSON file of the same name is put beside it."""
    only: tuple[str, ...] = tuple(PEERS)
    """Libraries to take."""


def theirs_here(name: str, peers: Path) -> list[dict[str, Any]]:
    """A line for each file that the library `name` wrote; one with a note alone where it is not there or failed."""
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        run = subprocess.run(
            [sys.executable, "-m", "bench.foreign_peers", name, str(peers.resolve())],
            cwd=folder, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
        )  # fmt: skip
        if (missing := Path(folder, "missing.json")).is_file():
            return [_line(OURS, name) | {"note": json.loads(missing.read_text())}]
        if run.returncode:
            print(run.stdout + run.stderr, file=sys.stderr)
            said = (run.stderr.strip() or f"status {run.returncode}").splitlines()[-1]
            return [_line(OURS, name) | {"holds": False, "note": f"its code failed: {said}"}]
        return [read(name, made, Path(folder)) for made in torch.load(Path(folder, "made.pt"))]


def read(name: str, made: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The line of a file that `foreign_peers` describes as `made`."""
    line = _line(OURS, name) | {"version": made["version"], "what wrote the file": made["wrote"]}
    line["note"] = made["note"] or None
    file = folder / made["file"]
    try:
        encoder = load_encoder(file)
        state = read_weights(file)[0]
    except UserError as error:
        return line | {"holds": False, "note": f"not read: {str(error).replace(str(folder), '')}"}
    with torch.no_grad():
        found = encoder(made["images"])
    own = [*found.stages, found.embedding]
    query, *key = (difference(own, expected) for expected in made["features"])
    line |= {"arch": encoder.arch, "keys read": f"{len(query_backbone(state, file).tensors)} of {len(state)}"}
    line |= {"difference": query, "key encoder": key[0] if key else None}
    # Were the key encoder as near, nothing would say which of the two was read.
    return line | {"holds": query <= LIMIT and all(other > 100 * LIMIT for other in key)}


def ours_there(peers: Path) -> list[dict[str, Any]]:
    """Lines of files that this package exports, read strictly by torchvision and timm."""
    sys.path.append(str(peers / "site"))
    return [_exported(arch, reader) for arch in ("resnet18", "resnet50") for reader in ("torchvision", "timm")]


def _exported(arch: str, reader: str) -> dict[str, Any]:
    line = _line(reader, OURS) | {"what wrote the file": EXPORTED, "arch": arch}
    try:
        line["version"] = installed(reader)
    except Missing as missing:
        return line | {"note": str(missing)}
    encoder = shaken(Encoder(arch, seed=0))
    encoder(torch.rand(8, 3, 64, 64))
    images = torch.rand(2, 3, 96, 80)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / EXPORTED
        save_encoder(file, encoder.eval(), {})
        exported = load_file(file)
        if reader == "timm":
            from timm import create_model

            model, parts = create_model(arch, num_classes=0, checkpoint_path=str(file)), TIMM
        else:
            model, parts = torchvision.models.get_model(arch, weights=None), NAMED
            model.fc = torch.nn.Identity()
            model.load_state_dict(exported)
        wanted = encoder(images)
    value = difference(features(model, parts, images), [*wanted.stages, wanted.embedding])
    read = len(model.state_dict().keys() & exported.keys())
    return line | {"keys read": f"{read} of {len(exported)}", "difference": value, "holds": value <= LIMIT}


def _line(reader: str, peer: str) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS) | {"read by": reader, "peer": peer, "limit": LIMIT, "device": "cpu"}


def main(args: ForeignArgs) -> int:
    """Make, compare, print and write the table; 1 where a difference is above the limit or a file is not read."""
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in args.only:
        rows += theirs_here(name, args.peers)
    rows += ours_there(args.peers)
    for line in rows:
        said = line["note"] if line["difference"] is None else f"{line['difference']:.1e}"
        what = f"{line['peer']}, {line['what wrote the file']}, {line['arch']}, read by {line['read by']}"
        print(f"{what}: {said}{'' if line['holds'] is not False else '  DIFFERS'}")
    save(
        rows,
        args.out,
        title="Checkpoints written by other libraries' own code, read here, and ours read there",
        command="python -m bench.foreign --peers FOLDER",
        columns=COLUMNS,
        note="difference: the largest of the four stages and the pooled feature, each as a share of its largest "
        "number, in evaluation mode on random images, after training steps on random pictures and noise on the "
        f"weights; limit {LIMIT:g}. key encoder: the same difference to the momentum network in the same file, which "
        "must not be the one that is read. A dash: none, or not here.",
    )
    return int(any(line["holds"] is False for line in rows))


if __name__ == "__main__":
    start(main, ForeignArgs, "foreign")
