"""Half of a digit is hidden; a model trained with random masks says what it was better than the average digit does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.architecture import Architecture, IterativeArchitecture, VAEArchitecture
from models.likelihood import Bernoulli
from models.refinement import steps
from training.config import OptimiserConfig, RunConfig
from training.data.binarise import binarise
from training.data.masks import half_mask
from training.loop import Trainer
from training.run_loop import fabric_for
from training.step import fresh_noise

ROWS, SAMPLES = 64, 2


@pytest.fixture(scope="module")
def trained(tiny_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A few seconds on 256 digits."""
    inference = IterativeArchitecture(("x", "grad_layer_norm", "q"), (64,), encode_mask=True)
    run = replace(
        tiny_run,
        architecture=Architecture(VAEArchitecture(784, 8, (64,)), inference),
        optimiser=OptimiserConfig(learning_rate=6e-3, clip_norm=50.0),
        refinement=replace(tiny_run.refinement, steps=3),
        batch_size=64,
        train_rows=None,
    )
    trainer = Trainer(run, tmp_path_factory.mktemp("masks"), fabric_for("cpu"))
    for _ in range(80):
        for index in trainer.batches:
            trainer.update(index)
    return trainer


@pytest.fixture(scope="module")
def digits(trained: Trainer) -> Tensor:
    """Validation digits, which no update saw."""
    return binarise(torch.as_tensor(trained.images.valid[:ROWS]), torch.Generator().manual_seed(0))


def hidden_log_px(trained: Trainer, x: Tensor, mask: Tensor, count: int) -> Tensor:
    """log p of the hidden half under the decoded posterior mean after `count` steps on the visible half, (B,) in nats."""
    model, generator = trained.model, torch.Generator().manual_seed(1)
    *_, state = steps(
        model.generative,
        model.inference,
        x,
        mask,
        count,
        lambda k: fresh_noise(model.generative.latent_sizes, len(x), SAMPLES, True, x.device, generator),
    )
    with torch.no_grad():
        return model.generative((state.q[0].mu[:, None],)).log_prob(x, 1 - mask)[:, 0]


def test_a_hidden_half_is_better_known_than_from_the_average_digit(trained: Trainer, digits: Tensor) -> None:
    """Mean over the four halves: 256 digits are too few to say it of each (a lower half follows least from the upper)."""
    average = torch.as_tensor(trained.images.train).float().mean(0) / 255
    logits = torch.logit(average.clamp(0.005, 0.995)).expand(1, 1, -1)
    over_average, over_prior = [], []
    for hidden in ("top", "bottom", "left", "right"):
        mask = half_mask((28, 28), hidden).expand_as(digits)
        refined = hidden_log_px(trained, digits, mask, 3).mean()
        over_average.append(float(refined - Bernoulli(logits).log_prob(digits, 1 - mask)[:, 0].mean()))
        over_prior.append(float(refined - hidden_log_px(trained, digits, mask, 0).mean()))
    assert sum(over_average) / 4 > 1, over_average
    assert sum(over_prior) / 4 > 1, over_prior


def test_what_is_hidden_is_not_looked_at(trained: Trainer, digits: Tensor) -> None:
    """The answer would be just as good, and worthless, if the hidden half leaked."""
    mask = half_mask((28, 28), "bottom").expand_as(digits)
    model = trained.model
    noise = fresh_noise(model.generative.latent_sizes, ROWS, SAMPLES, True, digits.device, torch.Generator().manual_seed(2))
    blanked, inverted = digits * mask, torch.where(mask == 1, digits, 1 - digits)
    states = [list(steps(model.generative, model.inference, x, mask, 3, lambda k: noise))[-1] for x in (digits, blanked, inverted)]
    assert torch.equal(states[0].q[0].mu, states[1].q[0].mu)
    assert torch.equal(states[0].q[0].mu, states[2].q[0].mu)


def test_seeing_more_of_a_digit_never_hurts_on_average(trained: Trainer, digits: Tensor) -> None:
    """KL from the prior grows with what is observed: nothing, half, all."""
    kls = []
    for mask in (torch.zeros_like(digits), half_mask((28, 28), "top").expand_as(digits), torch.ones_like(digits)):
        generator = torch.Generator().manual_seed(3)
        model = trained.model
        *_, state = steps(
            model.generative,
            model.inference,
            digits,
            mask,
            3,
            lambda k, generator=generator: fresh_noise((8,), ROWS, SAMPLES, True, digits.device, generator),  # type: ignore[misc]
        )
        kls.append(float(state.q[0].kl_to_standard().mean()))
    assert kls[0] == 0
    assert kls[0] < kls[1] < kls[2]
