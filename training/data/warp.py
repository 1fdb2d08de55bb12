"""Small random affine warps of images: views of the training digits that the decoder has not learned by heart.

A decoder fits its own training images better than new ones, so a refiner trained on them alone meets smaller gradients than
at serving time. Warped rows are new images to both (docs/log.md has what that is worth in nats).

B rows, (H, W) shape of an image, X = H · W.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

TURN = math.radians(12)
SCALE, SHEAR = 0.1, 0.1
SHIFT = 2.0
"""Pixels."""


def random_warps(images: Tensor, shape: tuple[int, int], generator: torch.Generator, *, share: float) -> Tensor:
    """Turns, scales, shears and shifts some rows, each in its own way.

    Args:
        images: (B, X) uint8, or floating point in [0, 1].
        shape: (H, W).
        generator: on the device of `images`.
        share: probability that a row is warped; the others stay as they are.

    Returns:
        (B, X) float32 in [0, 1], bilinear between pixels, 0 outside the image.

    Raises:
        ValueError: `share` is no probability.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be a probability, not {share}")
    x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    rows = len(x)
    draws = 2 * torch.rand(rows, 7, generator=generator, device=x.device) - 1
    angle, scale_x, scale_y, shear = TURN * draws[:, 0], 1 + SCALE * draws[:, 1], 1 + SCALE * draws[:, 2], SHEAR * draws[:, 3]
    shift = SHIFT * draws[:, 4:6] * 2 / torch.tensor([shape[1], shape[0]], device=x.device)
    cos, sin = torch.cos(angle), torch.sin(angle)
    top = torch.stack([scale_x * cos, scale_y * (shear * cos - sin), shift[:, 0]], -1)
    bottom = torch.stack([scale_x * sin, scale_y * (shear * sin + cos), shift[:, 1]], -1)
    grid = affine_grid(torch.stack([top, bottom], 1), [rows, 1, *shape], align_corners=False)
    warped = grid_sample(x.reshape(rows, 1, *shape), grid, align_corners=False).reshape(rows, -1)
    chosen = draws[:, 6] < 2 * share - 1
    return torch.where(chosen[:, None], warped.clamp(0, 1), x)
