"""Fine-tuning: a linear classifier on the pooled stage-4 feature, trained with the encoder or on it as it stands."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from fastmoco.allocator import freed_memory_kept
from fastmoco.data.views import ViewConfig
from fastmoco.errors import UserError
from fastmoco.evaluate.classifier import Classifier, loss_of, probabilities_of
from fastmoco.evaluate.images import Images, views_device
from fastmoco.evaluate.scores import auc
from fastmoco.evaluate.targets import Target
from fastmoco.models.encoder import Encoder
from fastmoco.precision import Precision

Mode = Literal["full", "linear", "scratch"]
# Sets the order of the images apart from other draws with the same seed.
_STREAM = 0xF17E


@dataclass(kw_only=True, slots=True, frozen=True)
class FinetuneConfig:
    """How a classifier is trained. Raises UserError for a value out of range."""

    mode: Mode = "full"
    """What is trained: all weights; the linear classifier alone, the encoder frozen in evaluation mode, on its features
    less their mean over the labelled training images and over their spread; or all weights from random ones."""
    arch: str = "resnet18"
    """Torchvision ResNet of --mode scratch; the others have that of their weights."""
    views: tyro.conf.Suppress[ViewConfig | None] = None
    """How training images are augmented: random crop, rotation and flip of these settings, without change of colour.
    None: not at all."""
    lr: float = 1e-3
    """Learning rate of Adam, constant."""
    encoder_lr: float | None = None
    """Learning rate of the encoder's weights, where it is to be another; that of the classifier if not given."""
    weight_decay: float = 0.0
    """Weight decay of Adam (added to the gradient)."""
    batch_size: int = 64
    """Greatest number of images in a batch: the images of an epoch are shared out evenly to as few batches as hold
    them, so that none is left out and no batch is of one image."""
    epochs: int = 100
    """Passes over the training images."""
    least_steps: int = 200
    """Steps that are done even where --epochs would be fewer: for budgets of a few images."""
    most_steps: int = 10_000
    """Steps that are not exceeded even where --epochs would be more."""
    validate_every: int = 10
    """Least number of steps between looks at the validation images; there is one at the end of an epoch at the most."""
    patience: int | None = None
    """Looks at the validation images without a better score after which training stops; never if not given."""
    precision: Precision = "fp32"
    """Arithmetic of the encoder: float32, or bfloat16 autocast."""

    def batches(self, images: int) -> int:
        """Batches of an epoch of `images`."""
        return math.ceil(images / self.batch_size)

    def steps(self, images: int) -> int:
        """Steps of training on `images`, where --patience does not end it sooner."""
        return min(max(self.epochs * self.batches(images), self.least_steps), self.most_steps)

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "least_steps", "most_steps", "validate_every", "patience"):
            value = getattr(self, name)
            least = 2 if name == "batch_size" else 1
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        for name in ("lr", "encoder_lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {value}")


@dataclass(kw_only=True, slots=True)
class Finetuned:
    """The classifier of the look at the validation images with the best score, and what it says of the test images.

    `probabilities` (n_test, C) float64, in the order of the test indices. `validation_score` is the macro AUC of the
    best look, `best_epoch` the epoch (from 1) and `best_step` the step after which it was. `curve` has a row a look:
    "step", "epoch", "loss" (mean of the training batches since the last), "validation_loss", "validation_auc" (None
    where it was undefined). `encoder` (without a head) and `classifier` hold the weights of that look, in evaluation
    mode, on the device trained on.
    """

    probabilities: np.ndarray
    validation_score: float
    best_epoch: int
    best_step: int
    curve: list[dict[str, Any]] = field(default_factory=list)
    encoder: Encoder
    classifier: nn.Linear


def finetune(
    encoder: Encoder | None,
    images: Images,
    target: Target,
    train: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
    config: FinetuneConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    on_look: Callable[[dict[str, Any]], None] | None = None,
) -> Finetuned:
    """Train on images `train` for `target`, keep the weights that do best on `validation`, and score `test` once.

    `images` and `target` are of the same n images, into which `train`, `validation` and `test` are indices. `encoder`
    is left as it is; None stands for one of `config.arch` with weights drawn from `seed`. The loss is cross-entropy,
    or of several labels the binary one, averaged. After each epoch (and at least `validate_every` steps) the validation
    images are scored by macro AUC; of equal scores the lower loss is the better. The weights of the best look are those
    that are tested and returned. `on_look` is called with each row of the curve as it comes.

    `seed` fixes the classifier's first weights, the order of the images and their augmentation; on a CPU the result is
    the same bit for bit for one number of threads. Raises UserError where `encoder` is wanted and not given, where
    there are fewer than 2 training images, and where no look had a score: the loss diverged, or the validation images
    are all of one class.

    In mode "linear" the features are shifted by their mean over the images `train` and all divided by one spread, the
    root mean square of their deviations from it, before the classifier sees them. The `classifier` that is returned
    has both folded in: it is of the features as the encoder makes them.
    """
    if (encoder is None) != (config.mode == "scratch"):
        raise UserError(f"--mode {config.mode} {'needs' if encoder is None else 'takes no'} pretrained weights")
    if len(train) < 2:
        raise UserError(f"fine-tuning needs at least 2 training images, not {len(train)}: raise --budget")
    device = torch.device(device)
    with _same_convolutions(), freed_memory_kept(device.type):
        start = Encoder(config.arch, seed=seed) if encoder is None else encoder
        frozen = config.mode == "linear"
        model = Classifier(start, len(target.class_names), frozen=frozen, precision=config.precision, seed=seed)
        model = model.to(device).to(memory_format=torch.channels_last)
        images = images.on(device)
        if frozen:
            model.standardise(images.select(train))
        looks = _Looks(images.select(validation), target.values[validation], target, on_look)
        best = _train(model, images, target, train, looks, config, seed)
        model.load_state_dict(best.weights)
        logits = model.classify(model.features(images.select(test)))
    model.eval()
    return Finetuned(
        probabilities=probabilities_of(logits, target.kind),
        validation_score=best.score,
        best_epoch=best.epoch,
        best_step=best.step,
        curve=looks.curve,
        encoder=model.encoder,
        classifier=model.linear(),
    )


@contextlib.contextmanager
def _same_convolutions() -> Iterator[None]:
    """Keeps cuDNN from choosing by its own timings, and from algorithms that add up in any order."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


@dataclass(kw_only=True, slots=True)
class _Best:
    score: float
    loss: float
    epoch: int
    step: int
    weights: dict[str, Tensor]


class _Looks:
    """Scores the validation images again and again, and keeps the rows."""

    def __init__(
        self, images: Images, values: np.ndarray, target: Target, on_look: Callable[[dict[str, Any]], None] | None
    ) -> None:
        self._images, self._values, self._target, self._on_look = images, values, target, on_look
        self._features: Tensor | None = None
        self.curve: list[dict[str, Any]] = []

    def look(self, model: Classifier, *, step: int, epoch: int, loss: float) -> tuple[float | None, float]:
        """The macro AUC, None where it is undefined, and the loss; both go into a row of the curve."""
        if self._features is None or not model.frozen:
            self._features = model.features(self._images)
        logits = model.classify(self._features)
        own = float(loss_of(logits, torch.from_numpy(self._values), self._target.kind))
        score = _macro_auc(probabilities_of(logits, self._target.kind), self._values, self._target)
        row = {"step": step, "epoch": epoch, "loss": loss, "validation_loss": own, "validation_auc": score}
        # JSON has no NaN, nor infinity.
        self.curve.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
        if self._on_look is not None:
            self._on_look(self.curve[-1])
        return score, own


def _train(
    model: Classifier,
    images: Images,
    target: Target,
    train: np.ndarray,
    looks: _Looks,
    config: FinetuneConfig,
    seed: int,
) -> _Best:
    device = next(model.parameters()).device
    # Where things lie and how large they are may vary; of medical pictures the colour often is the finding.
    views = None if config.views is None else replace(config.views, jitter_p=0.0, gray_p=0.0, blur_p=0.0)
    chosen = images.select(train).on(device if views is None else views_device(device))
    values = torch.from_numpy(target.values[train]).to(device)
    groups = [{"params": list(model.classifier.parameters()), "lr": config.lr}]
    if not model.frozen:
        lr = config.lr if config.encoder_lr is None else config.encoder_lr
        groups.append({"params": list(model.encoder.parameters()), "lr": lr})
    optimizer = torch.optim.Adam(groups, weight_decay=config.weight_decay, fused=True)
    per_epoch, last = config.batches(len(train)), config.steps(len(train))
    best: _Best | None = None
    losses: list[Tensor] = []
    waited = 0
    model.train()
    for step, (epoch, batch) in enumerate(_batches(len(train), per_epoch, seed), start=1):
        inputs = _inputs(chosen, batch, views, seed=seed, epoch=epoch, device=device)
        loss = loss_of(model(inputs), values[torch.from_numpy(batch).to(device)], target.kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        ends_epoch = step % per_epoch == 0
        if step == last or (ends_epoch and len(losses) >= config.validate_every):
            mean = float(torch.stack(losses).mean())
            losses.clear()
            score, own = looks.look(model, step=step, epoch=epoch, loss=mean)
            waited += 1
            if score is not None and (best is None or (score, -own) > (best.score, -best.loss)):
                weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
                best = _Best(score=score, loss=own, epoch=epoch, step=step, weights=weights)
                waited = 0
            if step == last or (config.patience is not None and waited >= config.patience):
                break
    if best is None:
        raise UserError(
            f"fine-tuning for {target.name} has no validation AUC: the loss diverged (lower --lr), or the validation "
            "images are all of one class (give a val split of your own)"
        )
    return best


def _batches(count: int, per_epoch: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Epoch (from 1) and positions (N,) of batch after batch, without end; of even sizes, and none left out."""
    epoch = 0
    while True:
        epoch += 1
        order = np.random.default_rng([seed, _STREAM, epoch]).permutation(count)
        for batch in np.array_split(order, per_epoch):
            yield epoch, batch


def _inputs(
    images: Images, batch: np.ndarray, views: ViewConfig | None, *, seed: int, epoch: int, device: torch.device
) -> Tensor:
    if views is None:
        return next(images.select(batch).batches(batch_size=len(batch)))
    return images.views(batch, views, seed=seed, epoch=epoch).to(device).float()


def _macro_auc(probabilities: np.ndarray, values: np.ndarray, target: Target) -> float | None:
    """`scores.auc`; None also where a loss that diverged left no numbers."""
    if not np.isfinite(probabilities).all():
        return None
    return auc(probabilities, values, class_names=target.class_names)[0]
