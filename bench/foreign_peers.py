"""Checkpoints made by other libraries' own code: their classes trained on random pictures and saved as they save.

Each function of `PEERS` runs in a process and a folder of its own, since the libraries have modules of the same names.
`bench.foreign` says where their sources are looked for.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import runpy
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision

from bench.foreign_parts import (
    NUMBERED,
    TIMM,
    Made,
    commit,
    features,
    installed,
    pictures,
    shaken,
    trained,
    without_gpu,
)
from bench.harness import Missing

CPU = "on the CPU, one process over gloo, without SyncBatchNorm"


def of_torchvision(peers: Path) -> Iterator[Made]:
    for arch in ("resnet18", "resnet50"):
        model = torchvision.models.get_model(arch, weights=None)
        trained(model)
        torch.save(model.state_dict(), f"{arch}.pth")
        yield Made(Path(f"{arch}.pth"), installed("torchvision"), "torch.save of the state dict", model)


def of_timm(peers: Path) -> Iterator[Made]:
    number = installed("timm")
    from timm import create_model
    from timm.models import save_for_hf
    from timm.utils import CheckpointSaver

    for arch in ("resnet18", "resnet50"):
        model = create_model(arch)
        optimizer = trained(model)
        Path(arch).mkdir()
        args = argparse.Namespace(model=arch)
        saver = CheckpointSaver(model, optimizer, args, checkpoint_dir=arch, recovery_dir=arch)
        saver.save_checkpoint(0, metric=1.0)
        yield Made(Path(arch) / "last.pth.tar", number, "CheckpointSaver", model, parts=TIMM)
        save_for_hf(model, f"{arch}-hub", safe_serialization=True)
        yield Made(Path(f"{arch}-hub/model.safetensors"), number, "save_for_hf", model, parts=TIMM)


def of_lightly(peers: Path) -> Iterator[Made]:
    number = f"{installed('lightly')}, scripts of {commit(peers / 'lightly')}"
    lightning: Any = importlib.import_module("pytorch_lightning")

    class Short(lightning.Trainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False})

    lightning.Trainer = Short
    torchvision.datasets.CIFAR10 = lambda *args, transform, **options: torchvision.datasets.FakeData(
        512, (3, 32, 32), transform=transform
    )
    ran = runpy.run_path(str(peers / "lightly/examples/pytorch_lightning/moco.py"))
    (file,) = Path("lightning_logs").rglob("*.ckpt")
    model: Any = ran["model"]
    note = "random pictures for CIFAR-10, 1 epoch for 10"
    wrote = "examples/pytorch_lightning/moco.py"
    yield Made(file, number, wrote, model.backbone, model.backbone_momentum, NUMBERED, note)

    ran = runpy.run_path(str(peers / "lightly/benchmarks/imagenet/resnet50/mocov2.py"))
    model = shaken(ran["MoCoV2"](batch_size_per_device=4, num_classes=10))
    batches: Any = [([torch.rand(4, 3, 64, 64), torch.rand(4, 3, 64, 64)], torch.arange(4), ["x"] * 4)] * 2
    trainer = Short(default_root_dir="benchmark", devices=1, log_every_n_steps=1)
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    (file,) = Path("benchmark").rglob("*.ckpt")
    wrote = "benchmarks/imagenet/resnet50/mocov2.py, class MoCoV2"
    yield Made(file, number, wrote, model.backbone, model.key_backbone, note="trained by this script's Trainer")


def of_moco(peers: Path, folder: str = "moco", options: str = "--mlp --moco-k 16") -> Iterator[Made]:
    number = commit(peers / folder)
    sys.path.insert(0, str(peers / folder))
    wrapped = without_gpu()
    script: Any = importlib.import_module("main_moco")
    note = CPU
    if folder == "moco":
        # It takes a view of what is not contiguous, which torch of 2020 let pass.
        script.accuracy = lambda output, target, topk: [torch.zeros(1)] * len(topk)
        note += "; its accuracy, which is only printed, left out"
    else:
        note += "; its vision transformers, which want an old timm, left out"
    for arch in ("resnet18", "resnet50"):
        args = script.parser.parse_args(
            [str(pictures(Path("images"))), *f"-a {arch} -b 4 -j 0 --epochs 1 {options}".split()]
        )
        args.distributed, args.world_size, args.rank = True, 1, 0
        script.main_worker(None, 1, args)
        torch.distributed.destroy_process_group()
        Path("group").unlink(missing_ok=True)
        file = Path("checkpoint_0000.pth.tar").rename(f"{arch}.pth.tar")
        model: Any = wrapped.pop()
        query, key = ("encoder_q", "encoder_k") if folder == "moco" else ("base_encoder", "momentum_encoder")
        yield Made(file, number, "main_moco.py", getattr(model, query), getattr(model, key), note=note)


def of_moco_v3(peers: Path) -> Iterator[Made]:
    # Vision transformers, on a timm of 2021; not what is trained here.
    sys.modules["vits"] = types.ModuleType("vits")
    yield from of_moco(peers, "moco-v3", "--moco-mlp-dim 64 --moco-dim 16")


def of_barlowtwins(peers: Path) -> Iterator[Made]:
    number = commit(peers / "barlowtwins")
    sys.path.insert(0, str(peers / "barlowtwins"))
    wrapped = without_gpu()
    script = importlib.import_module("main")
    options = "--workers 0 --epochs 1 --batch-size 4 --projector 64-64-64"
    args = script.parser.parse_args([str(pictures(Path("images"))), *options.split()])
    args.rank, args.world_size, args.dist_url = 0, 1, ""
    script.main_worker(0, args)
    model: Any = wrapped.pop()
    for name in ("checkpoint.pth", "resnet50.pth"):
        yield Made(args.checkpoint_dir / name, number, f"main.py, {name}", model.backbone, note=CPU)


def of_solo_learn(peers: Path) -> Iterator[Made]:
    folder = peers / "solo-learn"
    number = commit(folder)
    installed("lightning"), installed("timm")
    sys.path.insert(0, str(folder))
    # Its loaders for DALI need one of 2023; they are not used here, and without them its scripts go on.
    sys.modules["solo.data.dali_dataloader"] = None  # type: ignore[assignment]
    script = importlib.import_module("main_pretrain")
    methods = script.METHODS
    images = pictures(Path("images")).resolve()
    for method in ("mocov2plus", "barlow_twins"):
        made: list[Any] = []
        kind = methods[method]
        methods[method] = lambda cfg, kind=kind, made=made: made.append(shaken(kind(cfg))) or made[-1]
        sys.argv = [
            "main_pretrain.py", "--config-path", str(folder / "scripts/pretrain/imagenet-100"),
            "--config-name", f"{method.split('_')[0]}.yaml", "data.dataset=custom", "data.format=image_folder",
            f"data.train_path={images / 'train'}", f"data.val_path={images / 'val'}", "data.num_workers=0",
            "optimizer.batch_size=4", "max_epochs=1", "devices='1'", "accelerator=cpu", "strategy=auto",
            "sync_batchnorm=False", "precision=32", "wandb.enabled=False", "auto_resume.enabled=False",
        ]  # fmt: skip
        script.main()
        (file,) = Path("trained_models", method).rglob("*.ckpt")
        model = made[0]
        yield Made(
            file, number, f"main_pretrain.py, {method}", model.backbone, getattr(model, "momentum_backbone", None),
            note="options for the CPU; without its loaders for DALI",
        )  # fmt: skip


def of_paper(peers: Path) -> Iterator[Made]:
    folder = peers / "intermdiate_layer_matter_ssl"
    number = commit(folder)
    installed("pandas")
    lightning_version = installed("pytorch-lightning")
    sys.path.insert(0, str(folder / "breast_cancer_histopathology"))
    lightning: Any = importlib.import_module("pytorch_lightning")
    # Names that its modules import from Lightning 1.1 and lightning-bolts; of them one is called.
    names: dict[str, list[str]] = {
        "pl_bolts.models.self_supervised": ["MocoV2"],
        "pl_bolts.models.self_supervised.moco": ["Moco2TrainCIFAR10Transforms", "Moco2EvalCIFAR10Transforms"],
        "pl_bolts.transforms.self_supervised": ["RandomTranslateWithReflect", "Patchify"],
        "pl_bolts.datamodules": ["CIFAR10DataModule"], "pl_bolts.metrics": ["mean", "precision_at_k"],
        "pytorch_lightning.metrics": ["FBeta"],
    }  # fmt: skip
    for module, wanted in names.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        for name in wanted:
            setattr(sys.modules[module], name, lambda *args, **options: (torch.zeros(()), torch.zeros(())))
    files = sorted(pictures(Path("images")).rglob("*.png"))
    for split in ("train", "val", "test"):
        Path(f"{split}_split.csv").write_text("name,label\n" + "".join(f"{file},0\n" for file in files))
    for kind in ("mse", "bt"):
        script = importlib.import_module(f"ssl_mocov2_{kind}")
        data = script.Breast_Cancer_DM(".", num_workers=0, batch_size=4)
        data.train_transforms = script.Moco2TrainTransformsBreastCancer(64)
        # Lightning 2 refuses modules that have it.
        del script.Moco_v2.validation_epoch_end
        # Of a batch of 4 the correlations are so steep that its own rate of learning ends in infinities.
        model: Any = shaken(script.Moco_v2(datamodule=data, learning_rate=1e-4))
        saving = lightning.callbacks.ModelCheckpoint(dirpath=kind)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", limit_val_batches=0, callbacks=[saving], enable_progress_bar=False
        )
        trainer.use_ddp = trainer.use_ddp2 = False
        trainer.fit(model, data)
        note = f"Lightning {lightning_version} for 1.1; lightning-bolts, which only scores there, left out; "
        note += "no validation; learning rate 1e-4"
        yield Made(
            Path(saving.best_model_path), number, f"ssl_mocov2_{kind}.py", model.encoder_q, model.encoder_k, note=note
        )


PEERS: dict[str, Callable[[Path], Iterator[Made]]] = {
    "torchvision": of_torchvision,
    "timm": of_timm,
    "lightly": of_lightly,
    "solo-learn": of_solo_learn,
    "facebookresearch/moco": of_moco,
    "facebookresearch/moco-v3": of_moco_v3,
    "facebookresearch/barlowtwins": of_barlowtwins,
    "the intermediate-layer paper": of_paper,
}


def main(name: str, peers: Path) -> None:
    """Make the files of the library `name` in the current folder; what they are, with features of the query and the key
    network for random images, goes to `made.pt`, or to `missing.json` why there are none."""
    sys.path.append(str(peers / "site"))
    torch.manual_seed(0)
    images = torch.rand(2, 3, 96, 80)
    found: list[dict[str, Any]] = []
    try:
        for made in PEERS[name](peers):
            networks = [copy.deepcopy(network) for network in (made.query, made.key) if network is not None]
            found.append(
                {"file": str(made.file), "version": made.version, "wrote": made.wrote, "note": made.note}
                | {"images": images, "features": [features(network, made.parts, images) for network in networks]}
            )
    except Missing as missing:
        Path("missing.json").write_text(json.dumps(str(missing)))
        return
    torch.save(found, "made.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
