"""Random masks for training with missing data."""

from __future__ import annotations

import pytest
import torch

from training.data.masks import half_mask, random_masks

SHAPE = (28, 28)


def test_masks_are_rows_of_zeros_and_ones(device: torch.device, generator: torch.Generator) -> None:
    masks = random_masks(500, SHAPE, generator)
    assert masks.shape == (500, 784)
    assert masks.dtype == torch.float32
    assert masks.device.type == device.type
    assert set(masks.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_rows_are_left_whole_as_often_as_asked(keep: float, generator: torch.Generator) -> None:
    whole = (random_masks(10_000, SHAPE, generator, keep=keep) == 1).all(1).float().mean().item()
    assert abs(whole - keep) < 0.03  # six standard errors


def test_every_row_keeps_and_hides_a_good_part(generator: torch.Generator) -> None:
    observed = random_masks(10_000, SHAPE, generator, keep=0.0).mean(1)
    assert observed.min() > 0.02
    assert observed.max() < 0.98


def test_every_part_of_the_image_is_hidden_sometimes(generator: torch.Generator) -> None:
    hidden = 1 - random_masks(10_000, SHAPE, generator, keep=0.0).mean(0)
    assert hidden.min() > 0.2
    assert hidden.max() < 0.8


def test_the_same_seed_gives_the_same_masks(device: torch.device) -> None:
    first, second = (random_masks(50, SHAPE, torch.Generator(device).manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_images_need_not_be_square(generator: torch.Generator) -> None:
    assert random_masks(7, (5, 9), generator).shape == (7, 45)


def test_keep_must_be_a_probability(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        random_masks(1, SHAPE, generator, keep=1.5)


@pytest.mark.parametrize("side", ["top", "bottom", "left", "right"])
def test_half_masks_hide_the_half_they_name(side: str) -> None:
    image = half_mask(SHAPE, side).reshape(SHAPE)
    hidden = {"top": image[:14], "bottom": image[14:], "left": image[:, :14], "right": image[:, 14:]}[side]
    assert hidden.sum() == 0
    assert image.sum() == 14 * 28


def test_an_unknown_half_is_refused() -> None:
    with pytest.raises(ValueError, match="'middle'"):
        half_mask(SHAPE, "middle")
