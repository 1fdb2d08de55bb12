"""The figures of a sequence model: conventions by hand, bounds against the exact Kalman filter, the whole on real notes and speech."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.architecture import (
    FilterArchitecture,
    IterativeArchitecture,
    LinearGaussianArchitecture,
    OptimiserArchitecture,
    OwnFilterArchitecture,
    SRNNArchitecture,
    VRNNArchitecture,
)
from models.catalogue import FilterModel, build_filter, infer_with
from models.generative.linear_gaussian import LinearGaussian
from models.kalman import LinearSystem, kalman_filter
from tests.models.small_filters import linear_system, small_filter
from training import evaluate_filter as module
from training.__main__ import main
from training.checkpoint import save_weights
from training.config import RefinementConfig
from training.data.errors import DataError
from training.data.ragged import Ragged
from training.data.sequence_batches import ResidentSequences
from training.evaluate_filter import FilterEffort, FilterEvaluation, FilterEvaluator, Nats, by_mass, evaluate_filter, save, table
from training.filter_bounds import amortization_gap, fivo_bound
from training.sequence_config import SequenceDataConfig, SequenceRunConfig

DATA = Path(__file__).parents[1] / "data"
ROLLS, SPEECH = f"rolls:{DATA / 'chorales_sample.npz'}", f"audio:{DATA / 'digits'}"
NET = IterativeArchitecture(encodings=("q_layer_norm", "grad_layer_norm"), hidden=(16,))
SRNN = FilterArchitecture(SRNNArchitecture(latent=4, hidden=8, prior_hidden=(8,), decoder_hidden=(8,)), NET)
VRNN = FilterArchitecture(VRNNArchitecture(200, 4, 8, "gru", (8,), (8,), (8,), (8,)), NET)
LITTLE = FilterEffort(steps=(0, 3), seeds=2, sequences=3, particles=4, particle_sequences=2, gap_sequences=2, gap_frames=2, gap_span=5)


def run_on(data: str, architecture: FilterArchitecture, steps: int = 2) -> SequenceRunConfig:
    return SequenceRunConfig("tiny", architecture, SequenceDataConfig(data, frames=8), RefinementConfig(steps=steps))


def exact_filter(system: LinearSystem) -> FilterModel:
    """The system itself; Adam finds each frame's posterior (its objective has no noise)."""
    generative = LinearGaussian.of(system)
    return FilterModel(generative, infer_with(generative, OptimiserArchitecture("adam", 0.1))).double().requires_grad_(False)


def simulated(system: LinearSystem, rows: int, frames: int) -> tuple[Tensor, Tensor]:
    _, x = system.simulate(rows, frames, torch.Generator().manual_seed(3))
    return x, kalman_filter(system, x, torch.ones_like(x)).log_likelihood


def test_the_conventions_by_hand() -> None:
    values = torch.tensor([[-8.0, -2.0, -4.0, -6.0], [-10.0, -3.0, 99.0, 99.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    nats = Nats.of(values, mask)
    assert nats.frames == pytest.approx(-33 / 6)
    assert nats.sequences == pytest.approx((-20 / 4 - 13 / 2) / 2)
    assert nats.later_frames == pytest.approx(-15 / 4)
    assert nats.later_sequences == pytest.approx((-12 / 3 - 3) / 2)
    assert nats.published == pytest.approx((-12 / 4 - 3 / 2) / 2)


def test_a_sequence_of_one_frame_has_none_left_when_the_first_only_initialises() -> None:
    nats = Nats.of(torch.tensor([[-8.0, -2.0], [-5.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    assert nats.later_frames == nats.later_sequences == -2
    assert nats.published == pytest.approx((-2 / 2 - 0) / 2)


def test_where_every_sequence_has_one_frame_nothing_is_left_to_score_after_it() -> None:
    nats = Nats.of(torch.tensor([[-8.0], [-5.0]]), torch.ones(2, 1))
    assert (nats.frames, nats.later_frames, nats.later_sequences, nats.published) == (-6.5, None, None, 0)


def test_a_linear_gaussian_model_is_worth_its_log_likelihood() -> None:
    """One dimension: q can be the exact posterior, so the free energy is −log p and every convention is exact too."""
    system = linear_system()
    x, exact = simulated(system, 6, 12)
    lengths = [12, 5, 9, 12, 7, 3]
    sequences = Ragged.of([row[:length].float().numpy() for row, length in zip(x, lengths, strict=True)])
    run = run_on("simulated", FilterArchitecture(LinearGaussianArchitecture(), OptimiserArchitecture("adam", 0.1)), steps=120)
    evaluator = FilterEvaluator(exact_filter(system).float(), run, ResidentSequences.of(sequences), FilterEffort(), quiet=True)
    found = evaluator.filtered()
    mask = torch.tensor([[t < length for t in range(12)] for length in lengths]).double()
    assert torch.equal(found.mask, mask)
    assert float(((found.elbo - exact) * mask).abs().max()) < 0.01
    assert found.nats.published == pytest.approx(Nats.of(exact, mask).published, abs=2e-3)
    assert found.trace[0] < found.trace[-1] == pytest.approx(float((exact * mask).sum() / mask.sum()), abs=2e-3)


def test_many_particles_estimate_log_p_and_one_estimates_the_elbo() -> None:
    """Two dimensions and proposals from the prior's marginals: only the prior's covariance makes the weights right."""
    system = linear_system(2, 2)
    x, exact = simulated(system, 8, 1)
    model, mask = exact_filter(system), torch.ones(8, 1, dtype=torch.float64)
    many = torch.stack([fivo_bound(model, x, mask, 0, 5_000, torch.Generator().manual_seed(seed)) for seed in range(60)])
    ratio = (many - exact[:, 0]).exp()
    # the estimate of p(x) is unbiased: row by row its mean is exact to four of its standard errors
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert bool(((ratio.mean(0) - 1).abs() < 4 * error).all())
    assert float(error.max()) < 0.05
    one = torch.stack([fivo_bound(model, x, mask, 0, 1, torch.Generator().manual_seed(seed)) for seed in range(20)]).mean(0)
    assert float((one - exact[:, 0]).mean()) < -0.1


@pytest.mark.parametrize("kind", ["srnn", "vrnn quantised"])
def test_the_bound_of_many_particles_is_tighter_than_the_elbo(kind: str) -> None:
    model = small_filter(kind, "avf", torch.float32)
    frames = torch.randn(12, 10, 7, generator=torch.Generator().manual_seed(1))
    x = (frames > 0).float() if kind == "srnn" else frames
    mask = torch.ones(12, 10)
    mask[0, 4:] = 0

    def bound(particles: int) -> float:
        return float(fivo_bound(model, x, mask, 2, particles, torch.Generator().manual_seed(0)).sum() / mask.sum())

    run = run_on("drawn", SRNN)
    pieces = [row[: int(m.sum())].numpy() for row, m in zip(x, mask, strict=True)]
    evaluator = FilterEvaluator(model, run, ResidentSequences.of(Ragged.of(pieces)), FilterEffort(), quiet=True)
    elbo = np.mean([evaluator.filtered(seed).nats.frames for seed in range(10)])
    assert bound(1) == pytest.approx(elbo, abs=0.15 * abs(elbo))
    assert elbo + 0.02 < bound(16) < bound(16 * 40) + 0.05


def test_the_gap_is_what_an_optimiser_still_gains() -> None:
    system = linear_system()
    x, exact = simulated(system, 40, 4)
    model, mask = exact_filter(system), torch.ones(40, 4, dtype=torch.float64)

    def gap(steps: int, wanted: set[int]) -> float:
        return amortization_gap(model, x, mask, steps, 1, wanted, torch.Generator().manual_seed(0))

    prior = FilterEvaluator(model, run_on("-", VRNN, 0), ResidentSequences.of(Ragged.of(list(x.numpy()))), FilterEffort(), quiet=True)
    at_prior = prior.model.generative.predict(model.generative.start(40))
    q = at_prior.prior
    value = model.generative.expected_log_likelihood(at_prior, q, q.mu.unsqueeze(1), x[:, 0], torch.ones_like(x[:, 0]))
    assert gap(0, {0}) == pytest.approx(float((exact[:, 0] - value).mean()), rel=0.02)
    assert 0 <= gap(150, {1, 3}) < 1e-3


@pytest.mark.parametrize("piece", [3, 1000])
def test_long_sequences_are_filtered_in_pieces_without_a_difference(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values do not depend on the length of a piece, and come in the order of the sequences."""
    monkeypatch.setattr(module, "PIECE", piece)
    model = small_filter("srnn", "avf", torch.float32)
    rolls = [np.full((length, 7), i % 2, np.float32) for i, length in enumerate((4, 8, 2, 6))]
    evaluator = FilterEvaluator(model, run_on("-", SRNN), ResidentSequences.of(Ragged.of(rolls)), FilterEffort(), quiet=True)
    found = evaluator.filtered()
    assert found.mask.sum(1).tolist() == [4, 8, 2, 6]
    monkeypatch.setattr(module, "PIECE", 5)
    torch.testing.assert_close(evaluator.filtered().elbo, found.elbo)


@pytest.fixture(scope="module")
def speech() -> tuple[FilterModel, SequenceRunConfig]:
    model = build_filter(VRNN, seed=0).eval().requires_grad_(False)
    model.generative.set_statistics(torch.tensor(0.0), torch.tensor(0.1))
    return model, run_on(SPEECH, VRNN)


@pytest.fixture(scope="module")
def evaluations(speech: tuple[FilterModel, SequenceRunConfig]) -> list[FilterEvaluation]:
    """Untrained models, little effort: speech by densities, notes by a refiner and by a filter of their own."""
    found = [evaluate_filter(*speech, {"epoch": 3}, LITTLE, quiet=True)]
    for inference in (NET, OwnFilterArchitecture((), (8,))):
        run = run_on(ROLLS, replace(SRNN, inference=inference))
        model = build_filter(run.architecture, seed=0).eval().requires_grad_(False)
        found.append(evaluate_filter(model, replace(run, name=inference.kind), {}, LITTLE, quiet=True))
    return found


def test_an_evaluation_has_every_figure(evaluations: list[FilterEvaluation]) -> None:
    speech, refiner, own = evaluations
    assert speech.quantised is not None
    assert (speech.epochs, speech.split, speech.steps, len(speech.trace)) == (3, "valid", 2, 3)
    assert (refiner.quantised, own.quantised, own.gap, own.steps) == (None, None, None, 0)
    assert set(refiner.other_steps) == {"0", "3"}
    assert own.other_steps == {}
    assert refiner.gap is not None
    assert refiner.gap >= -0.05
    for evaluation in evaluations:
        assert all(math.isfinite(v) for v in (evaluation.bound, evaluation.kl, evaluation.spread, *evaluation.trace))
        assert evaluation.trace[-1] == pytest.approx(evaluation.elbo.frames, rel=1e-5)


def test_a_mass_is_at_most_one(speech: tuple[FilterModel, SequenceRunConfig], evaluations: list[FilterEvaluation]) -> None:
    """Every frame, silence and clipped samples included; the density of the same frames is not so bounded."""
    model, run = speech
    quantised = by_mass(model, run)
    frames = torch.zeros(1, 3, 200)
    frames[0, 1] = 0.9
    sure = FilterEvaluator(quantised, run, ResidentSequences.of(Ragged.of(list(frames.numpy()))), LITTLE, quiet=True)
    assert float(sure.filtered().elbo.max()) <= 0
    mass = evaluations[0].quantised
    assert mass is not None
    assert mass.frames < 0
    # an interval is 2⁻¹⁵/0.1 standard deviations wide: log of it per sample between density and mass
    assert mass.frames - evaluations[0].elbo.frames == pytest.approx(200 * math.log(2**-15 / 0.1), rel=0.02)


def test_the_table_puts_checkpoints_side_by_side(evaluations: list[FilterEvaluation]) -> None:
    lines = table(evaluations).splitlines()
    assert lines[0].split()[-3:] == ["tiny", "iterative", "own_filter"]
    (published,) = [line for line in lines if line.startswith("as published")]
    assert published.split()[-1] == f"{-evaluations[2].elbo.published:.3f}"
    (other,) = [line for line in lines if line.startswith("3 steps at every frame")]
    assert other.split()[-1] == "—"


def test_an_evaluation_says_what_it_measured(evaluations: list[FilterEvaluation], speech: tuple[FilterModel, SequenceRunConfig]) -> None:
    assert evaluations[0].facts["epoch"] == 3
    assert evaluations[0].facts["data"] == SPEECH
    assert [(e.bound_sequences, e.gap_sequences) for e in evaluations] == [(1, 1), (2, 2), (2, 0)]
    with pytest.raises(DataError, match="tiny was trained on another audio:"):
        evaluate_filter(*speech, {"data_sha256": "0" * 64}, LITTLE, quiet=True)


def test_an_evaluation_is_saved_beside_its_weights(evaluations: list[FilterEvaluation], tmp_path: Path) -> None:
    assert json.loads(save(evaluations[1], tmp_path).read_text())["elbo"]["published"] == evaluations[1].elbo.published
    assert save(replace(evaluations[1], split="test"), tmp_path).name == "evaluation-test.json"


def test_a_split_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_on(ROLLS, SRNN)
    model = build_filter(SRNN, seed=0)
    save_weights(tmp_path / "best", model, run, {"epoch": 1})
    with pytest.raises(DataError, match=r"--split test: .* keeps train, valid"):
        evaluate_filter(model, run, {}, LITTLE, split="test", quiet=True)
    assert main(["evaluate", str(tmp_path), "--split", "test"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
