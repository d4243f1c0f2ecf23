"""What is fine-tuned: an encoder with a linear classifier, its loss and its probabilities."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fastmoco.evaluate.features import evaluating
from fastmoco.evaluate.images import Images
from fastmoco.evaluate.targets import Kind
from fastmoco.models.encoder import Encoder
from fastmoco.precision import Precision


class Classifier(nn.Module):
    """A copy of an encoder without its head, and a linear layer on its pooled stage-4 feature, drawn from `seed`.

    A `frozen` encoder has no gradients and stays in evaluation mode; its features are shifted and scaled before the
    layer, by `standardise`, so that a learning rate means the same whatever their size.
    """

    def __init__(self, encoder: Encoder, outputs: int, *, frozen: bool, precision: Precision, seed: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).float()
        self.encoder.head = nn.Identity()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.classifier = nn.Linear(self.encoder.width, outputs)
        self.register_buffer("shift", torch.zeros(self.encoder.width))
        self.register_buffer("scale", torch.ones(()))
        self.shift: Tensor
        self.scale: Tensor
        self.frozen = frozen
        self.encoder.requires_grad_(not frozen)
        self.precision = precision

    def train(self, mode: bool = True) -> Classifier:
        """As every module's, but for a frozen encoder: its BatchNorms must not learn either."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """`images` (N, 3, H, W) in [0, 1] -> logits (N, C) float32."""
        return self._logits(self._features(images))

    @torch.no_grad()
    def standardise(self, images: Images) -> None:
        """Shift the features by their mean over `images`, and divide all by their deviations' root mean square.

        One scale for all: of a few images, a feature's own deviation is no more than a guess.
        """
        features = self.features(images)
        self.shift.copy_(features.mean(0))
        spread = float((features - self.shift).square().mean().sqrt())
        self.scale.fill_(1 / spread if spread > 0 else 1.0)

    @torch.no_grad()
    def linear(self) -> nn.Linear:
        """The layer that gives the same logits of features as the encoder makes them."""
        found = copy.deepcopy(self.classifier)
        found.weight.mul_(self.scale)
        found.bias.sub_(found.weight @ self.shift)
        return found

    @torch.no_grad()
    def features(self, images: Images) -> Tensor:
        """The feature (n, width) float32 of every one of the images, in evaluation mode, on their device."""
        with evaluating(self):
            return torch.cat([self._features(batch) for batch in images.batches()])

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Logits (n, C) float32 of `features`, on the CPU."""
        return self._logits(features).cpu()

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.classifier((features - self.shift) * self.scale)
        return logits

    def _features(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            feature: Tensor = self.encoder(images).embedding.float()
        return feature


def loss_of(logits: Tensor, values: Tensor, kind: Kind) -> Tensor:
    """Mean cross-entropy of logits (N, C) and (N,) class numbers, or of several labels the binary one, (N, C) each."""
    if kind == "multilabel":
        return binary_cross_entropy_with_logits(logits, values.float())
    return cross_entropy(logits, values)


def probabilities_of(logits: Tensor, kind: Kind) -> np.ndarray:
    """(n, C) float64 of logits (n, C)."""
    wide = logits.double()
    made: np.ndarray = (wide.sigmoid() if kind == "multilabel" else wide.softmax(dim=1)).numpy()
    return made
