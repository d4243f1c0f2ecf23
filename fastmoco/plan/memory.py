"""What a GPU has to hold."""

from __future__ import annotations

from fastmoco.plan.counts import BYTES, Counts
from fastmoco.train.config import LossConfig, ModelConfig

# DeepSpeed's bucket, in numbers, of each dtype that it sends: it is there whole, however small the gradients.
DEEPSPEED_BUCKET = 500_000_000
# The driver's context, cuDNN's and NCCL's own buffers; a guess.
CONTEXT = 1_500_000_000


def memory(
    counts: Counts,
    model: ModelConfig,
    loss: LossConfig,
    *,
    size: int,
    world: int,
    precision: str,
    momentum: bool,
    through_copies: bool,
    engine: str,
    zero: int,
) -> dict[str, float]:
    """Bytes by part. Activations are those that autograd keeps; "working" is the largest operation's own operands."""
    wide, half = max(BYTES[precision], 4), BYTES[precision] == 2
    zero = zero if engine == "deepspeed" else 0
    share = {stage: 1 / world if zero >= stage else 1.0 for stage in (1, 2, 3)}
    copied = counts.copied_trained if through_copies else 0
    parts = {
        "weights": counts.trained * wide * share[3],
        "key weights": counts.averaged * wide * share[3],
        "gradients": (counts.trained - copied) * wide * share[2] + copied * BYTES[precision],
        "momentum": counts.trained * wide * share[1] if momentum else 0.0,
    }
    if half:
        # Without copies, autocast keeps those of the trained weights until the backward is done.
        parts["copies of weights"] = 2.0 * (counts.copied if through_copies else counts.copied_trained)
    if zero in (1, 2):
        parts["ZeRO's own weights"] = counts.trained * wide * share[1]
    if zero:
        parts["buckets"] = float(DEEPSPEED_BUCKET * (wide + BYTES[precision] if half else wide))
    if zero == 3:
        # Below a billion weights it lets none go between the forward and the backward.
        parts["gathered weights"] = float((counts.trained + counts.averaged) * wide)
    parts["activations"] = float(counts.kept)
    parts["working"] = float(counts.operations.moved.max())
    parts["views"] = 2.0 * counts.rows * 3 * size * size * (2 + BYTES[precision])
    if loss.keys_per_pair:
        parts["queue"] = float(loss.queue_size * model.dim * (2 if loss.queue_dtype == "bf16" else wide))
    if loss.method == "barlow" and loss.barlow_correlation == "global" and world > 1:
        rows, sets = world * counts.rows, 2 * len(loss.stages) * max(loss.keys_per_pair, 1)
        parts["gathered projections"] = float(sets * rows * (loss.projector_width * BYTES[precision] + rows * wide))
    shared = loss.objective in ("simclr", "supcon") or loss.barlow_correlation == "global"
    if not loss.keys_per_pair and shared and world > 1:
        rows, views = world * counts.rows, 3 if loss.mix_weight else 2
        parts["gathered embeddings"] = float(views * rows * (model.dim + rows) * wide)
    parts["context"] = float(CONTEXT)
    return parts
