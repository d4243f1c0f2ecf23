"""The model of facebookresearch/moco over fused operations: `from fastmoco.adapters.moco import MoCo`.

Arguments, defaults, returned values and the keys of state dicts are those of its moco/builder.py; docs/adapters.md has
what differs and why.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastmoco.adapters.between import gather_rows, shuffle_rows, take_rows
from fastmoco.adapters.parts import move_average, start_average
from fastmoco.errors import UserError
from fastmoco.ops.infonce import infonce
from fastmoco.ops.queue_push import queue_push_

__all__ = ["MoCo"]


class MoCo(nn.Module):
    """A query and a key encoder, and a queue of keys (He et al. 2020; `mlp`: Chen et al. 2020).

    base_encoder: torchvision's way to make a network: called with `num_classes`, it has its last layer as `fc`.
    dim: width of the embedding. K: negatives kept; batches need not divide it. m: momentum of the key encoder.
    T: temperature. mlp: whether a hidden layer goes before the last.
    symmetric: whether, with `fused_loss`, each view is query and key once. Both directions are against the queue as it
        was; then both views' keys enter it.
    fused_loss: whether `forward` returns the loss, a 0-d tensor, rather than logits and labels: nothing of size
        N x (1 + K) is made then.
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
        *,
        fused_loss: bool = False,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if symmetric and not fused_loss:
            raise UserError("MoCo: symmetric=True has two sets of logits, so that it takes fused_loss=True")
        self.symmetric = symmetric
        self.K, self.m, self.T, self.fused_loss = K, m, T, fused_loss
        self.encoder_q, self.encoder_k = base_encoder(num_classes=dim), base_encoder(num_classes=dim)
        if mlp:
            for encoder in (self.encoder_q, self.encoder_k):
                last = encoder.fc
                assert isinstance(last, nn.Linear)
                encoder.fc = nn.Sequential(nn.Linear(last.in_features, last.in_features), nn.ReLU(), last)
        start_average(self.encoder_k, self.encoder_q)
        # (dim, K), but a key's numbers lie side by side.
        self.register_buffer("queue", normalize(torch.randn(dim, K), dim=0).T.contiguous().T)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        """Of two views (N, 3, H, W): logits (N, 1 + K), the first column the key's, and labels (N,) int64, all 0; or
        the loss. The key encoder moves before, the keys are queued after."""
        move_average(self.encoder_k, self.encoder_q, self.m)
        pairs = [(im_q, im_k), (im_k, im_q)] if self.symmetric else [(im_q, im_k)]
        queries = [normalize(self.encoder_q(image), dim=1) for image, _ in pairs]
        keys = [self._keys(image) for _, image in pairs]
        found: tuple[Tensor, Tensor] | Tensor
        if self.fused_loss:
            losses = [infonce(q, k, self.queue.T, temperature=self.T) for q, k in zip(queries, keys, strict=True)]
            found = torch.stack(losses).mean()
        else:
            ((query,), (key,)) = queries, keys
            logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ self.queue.clone()], dim=1) / self.T
            found = logits, logits.new_zeros(len(logits), dtype=torch.long)
        queue_push_(self.queue.T, self.queue_ptr.view(()), gather_rows(torch.cat(keys)))
        return found

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Keys (N, dim) of `images`, which went through the key encoder with other processes'."""
        shuffled, restore = shuffle_rows(images)
        return take_rows(normalize(self.encoder_k(shuffled), dim=1), restore)
