"""The race: what it measures, and that no method gets an advantage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.data.catalogue import load
from training.report.make import Effort
from training.report.race import LEARNED, OPTIMISERS, Refiner, optimiser, race, search_rate, wanted_steps
from training.report.subject import Subject, validation_rows


@pytest.fixture
def subject(trained: Callable[[str], Path]) -> Subject:
    return Subject.load(trained("iterative"))


@pytest.fixture
def x(subject: Subject) -> Tensor:
    return validation_rows(load(subject.run.data.name), 24, "bernoulli", torch.device("cpu"))


def test_the_learned_trace_rises_from_the_prior(subject: Subject, x: Tensor, small_effort: Effort) -> None:
    data = race(subject.model, subject.run.refinement, x, small_effort.race, quiet=True)
    learned = data.traces[LEARNED]
    assert learned.elbo[data.trained_steps] > learned.elbo[1] > learned.elbo[0] + 20
    assert learned.rate is None


def test_every_method_is_measured_at_the_same_start_by_the_same_samples(subject: Subject, x: Tensor, small_effort: Effort) -> None:
    data = race(subject.model, subject.run.refinement, x, small_effort.race, quiet=True)
    assert set(data.traces) == {LEARNED, *OPTIMISERS}
    assert {trace.elbo[0] for trace in data.traces.values()} == {data.traces[LEARNED].elbo[0]}
    assert all(len(trace.elbo) == len(trace.error) == len(data.steps) for trace in data.traces.values())
    assert all(trace.step_ms > 0 and trace.init_ms >= 0 for trace in data.traces.values())
    assert (data.rows, data.tuning_rows) == (16, 8)


def test_each_optimiser_runs_at_the_best_of_the_candidate_rates(subject: Subject, x: Tensor, small_effort: Effort) -> None:
    data = race(subject.model, subject.run.refinement, x, small_effort.race, quiet=True)
    for name in OPTIMISERS:
        trace = data.traces[name]
        assert trace.candidates is not None
        assert trace.rate in small_effort.race.rates
        assert set(trace.candidates) == {"0.1", "0.01"}
        assert trace.candidates[f"{trace.rate:g}"] == max(trace.candidates.values())


def test_the_rows_that_choose_the_rate_are_not_those_plotted(subject: Subject, x: Tensor, small_effort: Effort) -> None:
    other = x.clone()
    other[small_effort.race.rows :] = 1 - other[small_effort.race.rows :]
    a, b = (race(subject.model, subject.run.refinement, rows, small_effort.race, quiet=True) for rows in (x, other))
    assert a.traces[LEARNED].elbo == b.traces[LEARNED].elbo
    assert a.traces["adam"].candidates != b.traces["adam"].candidates


def test_a_rate_that_diverges_is_never_chosen(subject: Subject, x: Tensor) -> None:
    best, reached = search_rate(subject.model, "sgd", subject.run.refinement, x[:4], 10, 4, (1e30, 1e-3), quiet=True)
    assert best == 1e-3
    assert reached["0.001"] > reached["1e+30"]


def test_methods_get_the_same_fresh_noise_at_every_step(subject: Subject, x: Tensor) -> None:
    drawn: dict[str, list[Tensor]] = {}
    for refiner in (
        Refiner(subject.model, subject.model.inference, subject.run.refinement),
        optimiser(subject.model, "adam", 0.1, subject.run.refinement),
    ):
        draws: list[Tensor] = []
        original = refiner.noise

        def recorded(x: Tensor, generator: torch.Generator, original=original, draws=draws) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
            draws.append(original(x, generator)[0])
            return (draws[-1],)

        refiner.noise = recorded  # type: ignore[method-assign]
        list(refiner.states(x, 3))
        drawn[type(refiner.inference).__name__] = draws
    learned, adam = drawn["IterativeInference"], drawn["Adam"]
    assert all(torch.equal(a, b) for a, b in zip(learned, adam, strict=True))
    assert not torch.equal(learned[0], learned[1])
    torch.testing.assert_close(learned[0][:, 0], -learned[0][:, 1])  # one antithetic pair, as the run was trained


def test_a_direct_model_is_a_line_and_the_optimum_lies_above_the_learned_start(
    subject: Subject, x: Tensor, small_effort: Effort, trained: Callable[[str], Path]
) -> None:
    direct = Subject.load(trained("direct")).model
    data = race(subject.model, subject.run.refinement, x, replace(small_effort.race, with_optimum=True), direct, quiet=True)
    assert data.direct is not None
    assert data.optimum is not None
    assert data.optimum > data.traces[LEARNED].elbo[0]
    assert data.direct > data.traces[LEARNED].elbo[0]


def test_without_rows_left_to_choose_rates_on_the_race_refuses(subject: Subject, x: Tensor, small_effort: Effort) -> None:
    with pytest.raises(ValueError, match="16 of 16 validation rows leave none"):
        race(subject.model, subject.run.refinement, x[:16], small_effort.race, quiet=True)


@pytest.mark.parametrize("last", [1, 5, 12, 300])
def test_measured_steps_begin_at_zero_and_end_at_the_last(last: int) -> None:
    steps = wanted_steps(last)
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, last)
    assert set(range(min(10, last) + 1)) <= set(steps)
