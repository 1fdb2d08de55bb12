"""Dynamic binarisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.likelihood import LIKELIHOODS, QuantisedGaussian
from training.data import load
from training.data.binarise import binarise, observe

SAMPLE = Path(__file__).resolve().parents[2] / "data/mnist_sample.npz"


def test_each_pixel_is_one_as_often_as_its_value_says(device: torch.device, generator: torch.Generator) -> None:
    values = torch.arange(256, dtype=torch.uint8, device=device)
    draws = binarise(values.expand(20_000, 256), generator)
    assert draws.dtype == torch.float32
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    # the standard error of a share of 20,000 draws is at most 0.0035: five of them
    torch.testing.assert_close(draws.mean(0), values.float() / 255, atol=0.018, rtol=0)


def test_black_and_white_are_certain(device: torch.device, generator: torch.Generator) -> None:
    certain = torch.tensor([0, 255], dtype=torch.uint8, device=device).expand(100_000, 2)
    torch.testing.assert_close(binarise(certain, generator), certain.float() / 255, atol=0, rtol=0)


def test_two_uses_of_a_real_digit_differ_and_the_same_seed_does_not(device: torch.device) -> None:
    digits = torch.from_numpy(load(f"npz:{SAMPLE}").train).to(device)
    first, second = (binarise(digits, torch.Generator(device).manual_seed(seed)) for seed in (0, 1))
    assert (first != second).any(1).all()
    assert torch.equal(first, binarise(digits, torch.Generator(device).manual_seed(0)))


def test_probabilities_are_taken_as_they_are(device: torch.device, generator: torch.Generator) -> None:
    share = binarise(torch.full((100_000,), 0.3, dtype=torch.float64, device=device), generator).mean()
    assert abs(share.item() - 0.3) < 0.008


def test_integers_that_are_not_bytes_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="int64"):
        binarise(torch.zeros(3, dtype=torch.int64), generator)


def test_binary_images_are_observed_as_they_are(device: torch.device, generator: torch.Generator) -> None:
    images = torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8, device=device)
    for likelihood in LIKELIHOODS:
        assert torch.equal(observe(images, "binary", likelihood, generator), images.float())


def test_grey_images_are_drawn_for_a_bernoulli_and_intensities_for_the_others(device: torch.device, generator: torch.Generator) -> None:
    levels = torch.arange(256, dtype=torch.uint8, device=device)
    assert set(observe(levels, "grey", "bernoulli", generator).unique().tolist()) == {0.0, 1.0}
    before = generator.get_state()
    for likelihood in ("gaussian", "quantised_gaussian"):
        assert torch.equal(observe(levels, "grey", likelihood, generator), levels.float() / 255)
    assert torch.equal(generator.get_state(), before), "nothing is drawn"


def test_the_levels_of_grey_lie_one_interval_of_the_quantised_gaussian_apart(generator: torch.Generator) -> None:
    """So the masses of all 256 levels add up to 1, where hardly any lies below 0 or above 1."""
    levels = observe(torch.arange(256, dtype=torch.uint8), "grey", "quantised_gaussian", generator)[:, None]
    likelihood = QuantisedGaussian(torch.full((256, 1, 1), 0.5), torch.full((256, 1, 1), -3.0))
    mass = likelihood.log_prob(levels, torch.ones_like(levels)).double().exp().sum()
    assert abs(float(mass) - 1) < 1e-5
