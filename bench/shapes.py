"""The sizes that the operations meet in training: ResNet-50's parameters and stage maps."""

from __future__ import annotations

Shape = tuple[int, ...]

# Channels, side at 224 px, and the grid that the paper pools to (chest X-rays).
STAGES = ((256, 56, 16), (512, 28, 16), (1024, 14, 4), (2048, 7, 4))


def resnet50_shapes(outputs: int) -> list[Shape]:
    """ResNet-50's parameters (He et al. 2016, table 1) in torchvision's order, with `outputs` outputs of `fc`."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    features = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            for weight in ((width, features, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [weight, weight[:1], weight[:1]]
            if block == 0:
                shapes += [(4 * width, features, 1, 1), (4 * width,), (4 * width,)]
            features = 4 * width
    return [*shapes, (outputs, features), (outputs,)]
