"""Random masks for training with missing data: what is hidden is a half-plane, a rectangle or scattered pixels.

B rows, (H, W) shape of an image, X = H · W. 1 = observed, 0 = hidden, as everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_masks(rows: int, shape: tuple[int, int], generator: torch.Generator, *, keep: float = 0.5) -> Tensor:
    """Draws one mask per row, all at once, on the generator's device.

    Args:
        rows: B.
        shape: (H, W).
        generator: source of all randomness.
        keep: probability that a row is observed whole; the others hide one of the three patterns, equally likely.

    Returns:
        (B, H · W) float32 of 0 and 1.

    Raises:
        ValueError: `keep` is no probability.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be a probability, not {keep}")
    device = generator.device
    patterns = torch.stack([_half_plane(rows, shape, generator), _rectangle(rows, shape, generator), _pixels(rows, shape, generator)])
    chosen = torch.randint(len(patterns), (rows,), generator=generator, device=device)
    hidden = patterns[chosen, torch.arange(rows, device=device)]
    whole = torch.rand(rows, generator=generator, device=device) < keep
    return (~hidden | whole[:, None]).float()


def half_mask(shape: tuple[int, int], hidden: str, device: torch.device | str = "cpu") -> Tensor:
    """(H · W,) float32: one half of the image hidden, "top", "bottom", "left" or "right"; for tests and figures."""
    mask = torch.ones(shape, device=device)
    height, width = shape
    halves = {
        "top": (slice(0, height // 2), slice(None)),
        "bottom": (slice(height // 2, None), slice(None)),
        "left": (slice(None), slice(0, width // 2)),
        "right": (slice(None), slice(width // 2, None)),
    }
    if hidden not in halves:
        raise ValueError(f"hidden must be one of {', '.join(halves)}, not {hidden!r}")
    mask[halves[hidden]] = 0
    return mask.reshape(-1)


def _half_plane(rows: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(B, X) bool: the pixels with n·p > c, for a random direction n and c in ±½ of the half-width of the image."""
    y, x = _coordinates(shape, generator.device)
    angle = 2 * math.pi * _uniform((rows, 1), generator)
    offset = _uniform((rows, 1), generator) - 0.5
    return torch.cos(angle) * x + torch.sin(angle) * y > offset


def _rectangle(rows: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(B, X) bool: a rectangle whose sides are a quarter to three quarters of the image's, anywhere inside it."""
    y, x = _coordinates(shape, generator.device)
    half = 0.25 + 0.5 * _uniform((rows, 2, 1), generator)
    centre = (1 - half) * (2 * _uniform((rows, 2, 1), generator) - 1)
    return ((y - centre[:, 0]).abs() <= half[:, 0]) & ((x - centre[:, 1]).abs() <= half[:, 1])


def _pixels(rows: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(B, X) bool: each pixel by itself, with a probability between 0.1 and 0.9 drawn per row."""
    share = 0.1 + 0.8 * _uniform((rows, 1), generator)
    return _uniform((rows, shape[0] * shape[1]), generator) < share


def _coordinates(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """y and x of every pixel centre, (X,) each, on a scale where the image spans −1 to 1."""
    y, x = ((torch.arange(size, device=device) + 0.5) / size * 2 - 1 for size in shape)
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return grid_y.reshape(-1), grid_x.reshape(-1)


def _uniform(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(size, generator=generator, device=generator.device)
