"""Images as the likelihood wants them: 0.0 or 1.0 for a Bernoulli, grey values in [0, 1] for any other.

Dynamic binarisation (Burda et al. 2016): a pixel of value v is drawn Bernoulli(v / 255) anew at every use, in
training and in evaluation alike. Thresholding at 0.5 and one fixed draw are other protocols, with other likelihoods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.data.images import Kind


def binarise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Draws each pixel.

    Args:
        images: any shape; uint8 (value / 255 is the probability) or floating point (the probability itself).
        generator: on the device of `images`.

    Returns:
        float32 of 0 and 1, same shape and device. Probabilities 0 and 1 are certain: `rand` lies in [0, 1).

    Raises:
        ValueError: another type, for which the probability would be a guess.
    """
    if images.dtype == torch.uint8:
        probability = images.float() / 255
    elif images.is_floating_point():
        probability = images
    else:
        raise ValueError(f"images must be uint8 or floating point, not {images.dtype}")
    uniform = torch.rand(images.shape, generator=generator, device=images.device)
    return (uniform < probability).float()


def observe(images: Tensor, kind: Kind, likelihood: str, generator: torch.Generator) -> Tensor:
    """uint8 rows of an `Images` as observations x, float32.

    Binary ones are 0 and 1 as they are. Grey ones are drawn anew for a "bernoulli"; for the other likelihoods they are value / 255,
    without a draw: then the levels lie 1/255 apart, which is the interval of models/likelihood.py's `QuantisedGaussian`.
    """
    if kind == "binary":
        return images.float()
    return binarise(images, generator) if likelihood == "bernoulli" else images.float() / 255
