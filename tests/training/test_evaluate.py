"""The figures of a checkpoint: against the exact log p(x) of a linear-Gaussian model, and from end to end on real digits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.architecture import Architecture, DirectArchitecture, IterativeArchitecture, OptimiserArchitecture, VAEArchitecture
from models.catalogue import LatentModel, build, infer_with
from models.generative.vae import VAE
from models.objective import elbo
from training import evaluate as evaluation_module
from training.config import RefinementConfig, RunConfig
from training.data.errors import DataError
from training.evaluate import CURVE_STEPS, Effort, Evaluation, Evaluator, evaluate, optimum, save, table

SIGMA, ROWS = 0.7, 40


@pytest.fixture(scope="module", autouse=True)
def little_patience() -> Iterator[None]:
    """One learning rate and no second look: the optimum in a second instead of a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_module, "ADAM_RATES", (0.05,))
        patch.setattr(evaluation_module, "optimum", partial(optimum, patience=1))
        yield


@pytest.fixture(scope="module")
def linear() -> tuple[LatentModel, Tensor, Tensor]:
    """p(x|z) = N(Wz + b, σ²I) refined by Adam; rows drawn from it, and their exact log p(x)."""
    model = build(Architecture(VAEArchitecture(6, 1, (), "gaussian"), OptimiserArchitecture("adam", 0.1)), seed=3).requires_grad_(False)
    assert isinstance(model.generative, VAE)
    heads = model.generative.heads
    heads["log_sigma"].weight.zero_()
    heads["log_sigma"].bias.fill_(8 * math.atanh(math.log(SIGMA) / 8))
    w, b = heads["mu"].weight, heads["mu"].bias
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 1, generator=generator) @ w.T + b + SIGMA * torch.randn(ROWS, 6, generator=generator)
    exact = torch.distributions.MultivariateNormal(b, w @ w.T + SIGMA**2 * torch.eye(6)).log_prob(x)
    return model, x, exact


@pytest.fixture(scope="module")
def measure(linear: tuple[LatentModel, Tensor, Tensor]) -> Evaluator:
    model, x, _ = linear
    run = RunConfig("linear", refinement=RefinementConfig(steps=40, samples=4, antithetic=True))
    return Evaluator(model, run, x, rows_at_once=15, quiet=True)


def test_log_px_is_exact_for_a_linear_gaussian_model(linear: tuple[LatentModel, Tensor, Tensor], measure: Evaluator) -> None:
    estimate = measure.log_px(ROWS, 600)
    assert estimate.shape == (ROWS,)
    assert float((estimate - linear[2]).abs().max()) < 0.1
    assert abs(float((estimate - linear[2]).mean())) < 0.01


def test_log_px_uses_as_many_samples_as_asked(linear: tuple[LatentModel, Tensor, Tensor], measure: Evaluator) -> None:
    """It drew whole chunks of 250: one sample was 250."""
    one = measure.log_px(ROWS, 1)
    many = measure.log_px(ROWS, 251)
    exact = linear[2]
    assert float((one - exact).abs().mean()) > 2 * float((many - exact).abs().mean())


def test_the_curve_rises_to_log_px_and_never_exceeds_it(linear: tuple[LatentModel, Tensor, Tensor], measure: Evaluator) -> None:
    """With one latent variable the exact posterior is reached, so the bound becomes tight."""
    values = measure.curve(ROWS, 100, (0, 5, 40))
    assert values.shape == (ROWS, 3)
    mean, exact = values.mean(0), float(linear[2].mean())
    assert float(mean[0]) < float(mean[1]) < float(mean[2])
    assert float(mean[2]) < exact + 0.05
    assert float(mean[2]) > exact - 0.1


def test_a_row_alone_and_in_chunks_gets_its_own_curve(measure: Evaluator) -> None:
    whole = measure.curve(ROWS, 4, (0, 2))
    again = measure.curve(ROWS, 4, (0, 2))
    assert torch.equal(whole, again)


def test_the_optimum_is_the_exact_posterior_and_the_gap_to_it_is_small_and_positive(
    linear: tuple[LatentModel, Tensor, Tensor], measure: Evaluator
) -> None:
    model, x, exact = linear
    x, exact = x[:10], exact[:10]
    best = optimum(model.generative, model.generative.prior_parameters(x), x, torch.Generator().manual_seed(0), patience=1)
    noise = (torch.randn(10, 1000, 1, generator=torch.Generator().manual_seed(1)),)
    reached = elbo(model.generative, best, x, torch.ones_like(x), noise).elbo
    assert abs(float((reached - exact).mean())) < 0.05
    # the trained K is 40 here: it once had to be at most 16
    mean, gaps = measure.amortization_gap(10, 200)
    assert set(gaps) == {"16", "40"}
    assert gaps["16"] > gaps["40"] > -0.1
    assert abs(mean - float(exact.mean())) < 0.15


def test_the_spread_over_seeds_is_that_of_the_refining_noise_alone(linear: tuple[LatentModel, Tensor, Tensor], measure: Evaluator) -> None:
    assert 0 < measure.seed_spread(10, 3) < 0.5
    exact_answer = Evaluator(measure.model, replace(measure.run, refinement=RefinementConfig(steps=0)), measure.x, quiet=True)
    assert exact_answer.seed_spread(10, 3) < 1e-6


@pytest.fixture(scope="module")
def evaluations(tiny_run: RunConfig) -> list[Evaluation]:
    """Untrained models, little effort: every part of `evaluate` runs."""
    effort = Effort(rows=12, samples=2, importance_rows=6, importance_samples=10, gap_rows=4, gap_samples=100, seeds=2, seed_rows=4)
    found = []
    for name, inference in (("direct", DirectArchitecture((16,))), ("iterative", IterativeArchitecture(hidden=(16,)))):
        run = replace(tiny_run, name=name, architecture=replace(tiny_run.architecture, inference=inference))
        model = build(run.architecture, seed=0).requires_grad_(False)
        found.append(evaluate(model, run, {"epoch": 3}, effort, None, quiet=True))
    return found


def test_an_evaluation_has_every_figure(evaluations: list[Evaluation]) -> None:
    direct, iterative = evaluations
    assert direct.steps == [0]
    assert direct.trained_steps == 0
    assert set(direct.gap) == {"0"}
    assert iterative.steps == list(CURVE_STEPS)
    assert len(iterative.elbo) == len(iterative.elbo_std) == len(iterative.elbo_error) == len(CURVE_STEPS)
    assert set(iterative.gap) == {"2", "16"}
    for evaluation in evaluations:
        assert (evaluation.epochs, evaluation.rows, evaluation.importance_rows, evaluation.gap_rows) == (3, 12, 6, 4)
        assert math.isfinite(evaluation.log_px)
        assert all(gap > -1 for gap in evaluation.gap.values())
    assert iterative.step_ms > 0


def test_the_table_puts_checkpoints_side_by_side(evaluations: list[Evaluation]) -> None:
    lines = table(evaluations).splitlines()
    assert lines[0].startswith("12 validation rows, 2 fresh samples a row")
    assert lines[1].split() == ["direct", "iterative"]
    (at_zero,) = [line for line in lines if line.startswith("ELBO, 0 steps")]
    assert f"{evaluations[1].elbo[0]:.2f}" in at_zero
    (at_one,) = [line for line in lines if line.startswith("ELBO, 1 step ")]
    assert at_one.split()[3] == "-"
    assert any(line.startswith("log p(x) (rows)") for line in lines)


def test_an_evaluation_is_saved_beside_its_weights(evaluations: list[Evaluation], tmp_path: Path) -> None:
    file = save(evaluations[1], tmp_path)
    assert Evaluation(**json.loads(file.read_text())) == evaluations[1]
    assert asdict(evaluations[1])["name"] == "iterative"


def test_an_evaluation_says_what_it_measured(evaluations: list[Evaluation], tiny_run: RunConfig) -> None:
    facts = evaluations[0].facts
    assert (facts["epoch"], facts["data"]) == (3, tiny_run.data.name)
    assert len(facts["data_sha256"]) == 64
    assert (evaluations[0].seed_rows, evaluations[1].seed_rows) == (0, 4)


def test_a_single_row_and_parts_left_out_have_null_not_nan(tiny_run: RunConfig, tmp_path: Path) -> None:
    """And torch warns of nothing: a warning is an error here."""
    model = build(tiny_run.architecture, seed=0).requires_grad_(False)
    effort = Effort(rows=1, samples=1, importance_rows=0, gap_rows=0, seeds=2, seed_rows=1)
    found = evaluate(model, tiny_run, {"weights_sha256": "1" * 64}, effort, None, quiet=True)
    kept = json.loads(save(found, tmp_path).read_text(), parse_constant=pytest.fail)
    assert kept["facts"]["weights_sha256"] == "1" * 64
    assert set(kept["elbo_std"] + kept["elbo_error"]) == {None}
    assert [kept[name] for name in ("log_px", "log_px_error", "optimum", "importance_rows", "gap_rows")] == [None, None, None, 0, 0]
    lines = table([found]).splitlines()
    assert {line.split()[-1] for line in lines if line.startswith(("log p(x)", "optimum", "amortization", "ELBO"))} == {"-"}
    one = evaluate(model, tiny_run, {}, replace(effort, importance_rows=1, importance_samples=2), None, quiet=True)
    assert one.log_px is not None
    assert one.log_px_error is None


def test_data_that_changed_are_refused(tiny_run: RunConfig) -> None:
    model = build(tiny_run.architecture, seed=0)
    with pytest.raises(DataError, match=r"tiny was trained on another npz:"):
        evaluate(model, tiny_run, {"data_sha256": "0" * 64}, Effort(rows=1), None, quiet=True)


def test_an_optimiser_can_refine_another_models_decoder(tiny_run: RunConfig) -> None:
    model = build(tiny_run.architecture, seed=0)
    adam = infer_with(model.generative, OptimiserArchitecture("adam", 0.05))
    assert adam.init({}, model.generative.prior_parameters(torch.zeros(2, 784))).q[0].mu.shape == (2, 4)
