"""Everything a pretraining run can be told, as dataclasses; the command line is made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from fastmoco.data.pairs import PairKind
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError
from fastmoco.train.loss_config import LossConfig

__all__ = ["Arch", "Config", "DataConfig", "LossConfig", "ModelConfig", "OptimConfig", "RunConfig"]

Arch = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Images and their labels."""

    data: Path
    """Folder of images, sub-folders included; folder of tar shards, or one; or .npz file as MedMNIST's."""
    labels: Path | None = None
    """CSV file, manifest file or list of findings that lists the images (paths relative to the data folder) with
    labels, patient and split; without one, every image is used, with what its folders, the shards or the .npz file
    say."""
    label: tuple[str, ...] = ()
    """Label columns; of a CSV file none if not given, otherwise all. The kNN monitor uses the first, and so does
    --objective supcon; no other training sees them."""
    split: str | None = None
    """Pretrain only on the rows whose split column holds this; all rows if not given."""
    file_column: str = "file"
    """Name of the CSV column with the path of the image."""
    patient_column: str = "patient"
    """Name of the CSV column with the patient, if the file has one."""
    split_column: str = "split"
    """Name of the CSV column with the split, if the file has one."""
    pairs: PairKind = "image"
    """What the two views of a pair are cut from: one image; or patient, two images of one patient, the second drawn
    anew each epoch (one image where the patient has no other, or is not known). With --patient-column study, two of
    one study."""
    loader: Literal["auto", "dali", "pillow", "torchvision"] = "auto"
    """What decodes: dali, pillow, or auto, which takes DALI where it is installed. torchvision decodes with Pillow and
    makes the views with torchvision's transforms too, the definition of what the others do, slowly."""
    workers: int | None = None
    """Threads that decode, and as many that make the views; they do not change what is loaded. If not given, two with a
    GPU, and where it is the processor that trains one for every four threads of this process (OMP_NUM_THREADS), at
    least one: with more they are in its way."""
    stage: Path | None = None
    """Folder on a disk of this machine to which the images are copied first, once for all its processes and runs."""
    max_bad: int = 100
    """Images that may turn out to be unreadable during the run, or to have changed since they were checked: each is set
    aside and another takes its place. With one more the run stops and lists them."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers must be 0 or more, not {self.workers}")
        if self.max_bad < 0:
            raise UserError(f"--max-bad must be 0 or more, not {self.max_bad}")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The encoder."""

    arch: Arch = "resnet50"
    """Torchvision ResNet."""
    head: Literal["linear", "mlp", "projector"] = "linear"
    """Projection head of the objective: one linear layer, MoCo v2's MLP, or Barlow Twins' projector, three linear
    layers with BatchNorm that are all --dim wide."""
    dim: int = 128
    """Width of the embedding."""
    zero_init_residual: bool = True
    """Start the last BatchNorm of each residual block at zero."""
    init: str | None = None
    """Starting weights of the backbone: "torchvision" (ImageNet), or a run folder, checkpoint, .safetensors or .pth
    file; random if not given."""
    norm: Literal["batch", "sync", "frozen"] = "batch"
    """Statistics that the BatchNorms of both encoders and of the projectors use in training: batch, those of each
    process's images; sync, those of all processes' together, so that their number makes no difference; frozen, the
    running ones of --init's weights, which then stay as they are (without --init, and in the projectors, mean 0 and
    variance 1: no normalisation)."""
    norm_groups: int = 1
    """Groups of consecutive images that --norm batch normalises each on its own, on every process."""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise UserError(f"--dim must be at least 1, not {self.dim}")
        if self.norm_groups < 1:
            raise UserError(f"--norm-groups must be at least 1, not {self.norm_groups}")
        if self.norm_groups > 1 and self.norm != "batch":
            raise UserError(
                f"--norm-groups {self.norm_groups} splits the statistics that --norm batch takes; with --norm "
                f"{self.norm} leave it at 1"
            )


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimiser and its schedule."""

    optimizer: Literal["sgd", "lars"] = "sgd"
    """SGD, or LARS for batches of thousands: it gives each weight tensor a step in proportion to its length, and leaves
    biases and BatchNorm without that and without weight decay. Its learning rate is a different one: 0.2 times the
    batch over 256 is Barlow Twins'."""
    lars_trust: float = 0.001
    """Of LARS: a tensor's step as a share of its length, before the learning rate."""
    lr: float = 0.03
    """Learning rate at its highest."""
    sgd_momentum: float = 0.9
    """Momentum of SGD or LARS."""
    weight_decay: float = 1e-4
    """Weight decay: with SGD on every parameter, with LARS on weights alone."""
    update: Literal["fused", "torch"] = "fused"
    """What steps the weights under SGD: SGD and the key encoder's average in one pass over memory, or torch.optim.SGD
    and then the average, which agree to rounding, so that a run may go on with the other. Fused is the default as the
    faster: measured on two CPU cores, it takes half the time for a ResNet-50's."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or half a cosine falling towards 0 at the end."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises linearly from 0."""
    epochs: int = 200
    """Passes over the images."""
    steps: int | None = None
    """Stop after this many optimiser steps; overrides epochs."""
    batch_size: int = 256
    """Images in a micro-batch, of all processes together."""
    accumulate: int = 1
    """Micro-batches whose gradients are averaged for one optimiser step; each is pushed to the queue."""
    drop_last: bool = True
    """Leave out each epoch's incomplete last micro-batch; else other views of the epoch's first images fill it."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps must be at least 1, not {self.steps}")
        for name in ("lr", "lars_trust", "sgd_momentum", "weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where and how the run goes; none of these fields changes the method."""

    out: Path
    """Run folder: config, metrics, curves, checkpoints and the exported encoder."""
    resume: bool = False
    """Continue from the run folder's last checkpoint (from the start if it has none)."""
    seed: int = 0
    """Seed of the weights, the queue, the order of the images and every augmentation."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    """Arithmetic of the encoders: autocast to bfloat16, or to float16 with a loss scale, float32 or float64; auto takes
    bf16 where the processor has it. Losses are always at least float32."""
    channels_last: bool = True
    """Keep images and weights channels-last (NHWC) in memory."""
    device: str = "auto"
    """Device to train on, such as cpu or cuda:0; auto takes a GPU where there is one."""
    engine: Literal["auto", "single", "ddp", "deepspeed"] = "auto"
    """What runs the steps: auto takes one process alone where it was started alone, and otherwise DDP. The number of
    processes is that of torchrun or srun; a checkpoint of one engine goes on with another."""
    zero: Literal[0, 1, 2, 3] | None = None
    """With --engine deepspeed, what processes share out instead of keeping whole: 1 SGD's momentum, as where it is not
    given, 2 gradients too, 3 weights too, 0 nothing."""
    cuda_graph: bool = False
    """On a GPU, capture a micro-batch (forwards, losses, backward, queue) as a CUDA graph and replay it, which spares
    the host from launching its kernels one by one: for small batches and fast GPUs."""
    log_every: int = 20
    """Steps between reads of the metrics from the device, or a minute where steps are slow; every step's losses are
    written all the same."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    checkpoint_minutes: float = 15.0
    """Minutes between checkpoints where so many steps take longer than that; 0: only after so many steps."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; older ones are removed once a newer one is complete."""
    max_failed_saves: int = 3
    """Checkpoints missed in a row that end the run: a folder that is full or read-only, or so slow that the one before
    is still being written, is only warned of until then. A slow folder then makes training wait instead."""
    watchdog: float = 300.0
    """Seconds that a micro-batch may take, to be loaded or to be computed, before the run is ended as hung and each
    process says where it stands."""
    knn_every: int = 10
    """Epochs between kNN scores of the training images, where they have labels; 0 for never."""

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "max_failed_saves"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise UserError(f"--checkpoint-minutes must be 0 (never) or more, not {self.checkpoint_minutes}")
        if self.knn_every < 0:
            raise UserError(f"--knn-every must be 0 (never) or more, not {self.knn_every}")
        if not 0 < self.watchdog < math.inf:
            raise UserError(f"--watchdog must be more than 0 seconds, not {self.watchdog}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be from 0 to 2^63 - 1, not {self.seed}")


@dataclass(kw_only=True, slots=True)
class Config:
    """A pretraining run."""

    recipe: tyro.conf.Suppress[str]
    """Name of the recipe it started from."""
    data: DataConfig
    run: RunConfig
    views: ViewConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        loss = self.loss
        keys = loss.keys_per_pair * self.optim.batch_size
        if loss.queue_size < keys:
            raise UserError(
                f"--queue-size {loss.queue_size} is smaller than "
                + (f"the {keys} keys of " if loss.symmetric else "")
                + f"--batch-size {self.optim.batch_size}: a batch of keys would not fit; raise one or lower the other"
            )
        if loss.method == "barlow" and self.optim.batch_size < 2:
            raise UserError("--batch-size 1 has no cross-correlation: give --method barlow at least 2")
        if loss.objective == "supcon" and self.data.pairs != "image":
            raise UserError(
                f"--pairs {self.data.pairs} with --objective supcon: the images of a patient may "
                "be of two classes; leave one of them out"
            )
        if loss.objective != "moco" and self.optim.batch_size < 2:
            raise UserError(f"--batch-size 1 has no other images: give --objective {loss.objective} at least 2")
        groups = self.model.norm_groups
        if self.optim.batch_size % groups:
            raise UserError(
                f"--batch-size {self.optim.batch_size} cannot be shared out evenly to --norm-groups {groups}: choose a "
                "number that divides it"
            )
        if self.loss.key_shuffle == "local" and groups == 1:
            raise UserError(
                "--key-shuffle local makes no difference where a process's images are normalised together: give "
                "--norm-groups 2 or more, or use --key-shuffle global or none"
            )
