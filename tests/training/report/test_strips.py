"""Reconstruction strips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from training.data.catalogue import load
from training.report.race import Refiner
from training.report.strips import strips
from training.report.subject import Subject, one_row_per_class, validation_rows


def test_columns_are_decoded_posterior_means_and_the_reconstruction_gets_closer(trained: Callable[[str], Path]) -> None:
    subject = Subject.load(trained("iterative"))
    x = validation_rows(load(subject.run.data.name), 5, "bernoulli", torch.device("cpu"))
    refiner = Refiner(subject.model, subject.model.inference, subject.run.refinement)
    data = strips(refiner, x, range(5), (28, 28), wanted=(0, 1, 3))
    assert data.means.shape == (5, 3, 784)
    assert (data.means >= 0).all()
    assert (data.means <= 1).all()
    np.testing.assert_allclose(data.means[:, 0], data.means[:1, 0].repeat(5, 0), rtol=1e-5)  # all start at the prior's mean
    elbo = np.asarray(data.elbo).mean(0)
    assert elbo[2] > elbo[0]


def test_one_digit_of_each_class_is_shown_in_the_order_of_the_classes(trained: Callable[[str], Path]) -> None:
    images = load(Subject.load(trained("iterative")).run.data.name)
    rows = one_row_per_class(images, 10)
    assert images.valid_labels is not None
    assert [int(images.valid_labels[row]) for row in rows] == list(range(10))
