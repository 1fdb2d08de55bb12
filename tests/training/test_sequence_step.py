"""One update on a chunk of frames: the same gradients as the published loop written plainly, and what it must not reach."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.catalogue import FilterModel
from models.filtering import advance, filter_sequence, init, observed, predict, read
from models.gaussian import DiagonalGaussian
from models.generative.filter import FilterState, Frame, Prediction
from models.inference.base import State
from models.objective import elbo, evidence
from tests.models.small_filters import GENERATIVE, INFERENCE, frames, small_filter
from training.sequence_step import Chunk, accumulate_sequence

B, T, K, S = 3, 6, 2, 2

RECURRENT = [name for name in GENERATIVE if "linear" not in name]
REFINING = [name for name in INFERENCE if name.startswith("avf")]
OWN = [name for name in INFERENCE if name.startswith("own")]


def chunk_for(model: FilterModel, generator: torch.Generator, steps: int, complete: bool = False) -> Chunk:
    """Ragged: the last row ends two frames early; the first frame of the second only initialises."""
    x, mask = frames(model.generative, B, T, generator)
    if complete:
        mask = torch.ones_like(mask)
    weights = torch.ones(B, T, dtype=x.dtype)
    weights[2, 4:] = 0
    mask[2, 4:] = 0
    weights[1, 0] = 0
    noise = torch.randn(T, steps + 1, B, S, model.generative.latent_sizes[0], generator=generator, dtype=x.dtype)
    return Chunk(x, mask, weights, noise)


def gradients(model: FilterModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def published(model: FilterModel, chunk: Chunk, kl_weight: float, later_frames: bool = False) -> FilterState:
    """papers.md 3.2 line by line: one frame, one step, one backward at a time. Leaves its gradients on the parameters.

    `later_frames`: the last step's loss is that of all frames, through z.
    """
    generative, inference = model.generative, model.inference
    state = generative.start(B) if chunk.state is None else chunk.state
    total = torch.zeros((), dtype=chunk.x.dtype)
    steps = len(chunk.noise[0]) - 1
    parameters = [p for p in inference.parameters() if p.requires_grad]
    answers: list[tuple[DiagonalGaussian, DiagonalGaussian]] = []

    def learn(*parts: Tensor | None) -> None:
        for parameter, part in zip(parameters, parts, strict=True):
            if part is not None:
                parameter.grad = part if parameter.grad is None else parameter.grad + part

    for t in range(T):
        x, mask, weight = chunk.x[:, t], chunk.mask[:, t], chunk.weights[:, t]
        frame = predict(generative, state)
        held = Frame(
            generative,
            Prediction(frame.prediction.prior.detach(), {name: value.detach() for name, value in frame.prediction.context.items()}),
        )
        context = read(held, inference, x, mask)
        belief = init(held, inference, context, mask)
        for k in range(steps):
            with torch.no_grad():
                seen = evidence(held, belief.q, x, mask, (chunk.noise[t, k],), errors=inference.reads_errors, kl_weight=kl_weight)
            fixed = State((belief.q[0].detach(),), {name: value.detach() for name, value in belief.memory.items()})
            new = inference.step(fixed, context, seen)
            q = DiagonalGaussian(
                torch.where(observed(mask), new.q[0].mu, fixed.q[0].mu),
                torch.where(observed(mask), new.q[0].log_sigma, fixed.q[0].log_sigma),
            )
            # φ's own term; θ is kept out by differentiating φ alone
            loss = -(weight * elbo(held, (q,), x, mask, (chunk.noise[t, k + 1],)).annealed(kl_weight)).sum()
            if not later_frames or k < steps - 1:
                learn(*torch.autograd.grad(loss / steps, parameters, retain_graph=True, allow_unused=True))
            belief = State((q,), new.memory)
        leaf = DiagonalGaussian(belief.q[0].mu.detach().requires_grad_(), belief.q[0].log_sigma.detach().requires_grad_())
        answers.append((belief.q[0], leaf))
        end = advance(frame, (leaf,), x, mask, (chunk.noise[t, -1],))
        total = total - (weight * end.terms.annealed(kl_weight)).sum()
        state = {name: value for name, value in end.state.items()}
    for answer, leaf in answers if later_frames else ():
        ends = (leaf.mu, leaf.log_sigma)
        signals = [part / steps for part in torch.autograd.grad(total, ends, retain_graph=True)]
        if answer.mu.requires_grad:
            learn(*torch.autograd.grad([answer.mu, answer.log_sigma], parameters, signals, retain_graph=True, allow_unused=True))
    names = [p for p in generative.parameters() if p.requires_grad]
    for parameter, part in zip(names, torch.autograd.grad(total, names, allow_unused=True), strict=True):
        parameter.grad = part
    return {name: value.detach() for name, value in state.items()}


@pytest.mark.parametrize("generative", GENERATIVE)
@pytest.mark.parametrize("inference", REFINING)
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "with missing entries"])
def test_an_update_has_the_gradients_of_the_published_loop(
    generative: str, inference: str, complete: bool, generator: torch.Generator
) -> None:
    model = small_filter(generative, inference)
    chunk = chunk_for(model, generator, K, complete)
    published(model, chunk, kl_weight=0.7)
    expected = gradients(model)
    seen = accumulate_sequence(model, chunk, kl_weight=0.7)
    measured = gradients(model)
    assert measured.keys() >= expected.keys()
    for name, value in expected.items():
        assert_close(measured[name], value, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert seen.elbo.shape == (B, T, K + 1)


@pytest.mark.parametrize("generative", RECURRENT)
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "with missing entries"])
def test_the_last_step_can_learn_from_later_frames(generative: str, complete: bool, generator: torch.Generator) -> None:
    model = small_filter(generative, "avf with x")
    chunk = chunk_for(model, generator, K, complete)
    published(model, chunk, 0.7)
    without = gradients(model)
    published(model, chunk, 0.7, later_frames=True)
    expected = gradients(model)
    accumulate_sequence(model, chunk, 0.7, later_frames=True)
    measured = gradients(model)
    for name, value in expected.items():
        assert_close(measured[name], value, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    changed = {name for name, value in expected.items() if not torch.allclose(value, without[name])}
    assert changed
    assert all(name.startswith("inference") for name in changed)  # θ learns what it learned


@pytest.mark.parametrize("generative", RECURRENT)
@pytest.mark.parametrize("inference", OWN)
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "with missing entries"])
def test_an_own_filter_is_trained_through_the_whole_chain(
    generative: str, inference: str, complete: bool, generator: torch.Generator
) -> None:
    model = small_filter(generative, inference)
    chunk = chunk_for(model, generator, 0, complete)
    accumulate_sequence(model, chunk, kl_weight=0.7)
    measured = gradients(model)
    state, loss = model.generative.start(B), torch.zeros((), dtype=chunk.x.dtype)
    for t in range(T):
        x, mask = chunk.x[:, t], chunk.mask[:, t]
        frame = predict(model.generative, state)
        q = init(frame, model.inference, read(frame, model.inference, x, mask), mask).q
        end = advance(frame, q, x, mask, (chunk.noise[t, -1],))
        loss = loss - (chunk.weights[:, t] * end.terms.annealed(0.7)).sum()
        state = end.state
    loss.backward()
    expected = gradients(model)
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(measured[name], value, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("inference", ["avf", "avf with x", "own"])
@pytest.mark.parametrize("generative", ["vrnn", "srnn"])
def test_an_update_sees_what_the_filter_sees(generative: str, inference: str, generator: torch.Generator) -> None:
    model = small_filter(generative, inference)
    chunk = chunk_for(model, generator, K if inference != "own" else 0)
    seen = accumulate_sequence(model, chunk)
    noise = [([(part,) for part in draws[:-1]], (draws[-1],)) for draws in chunk.noise]
    out = filter_sequence(model.generative, model.inference, chunk.x, chunk.mask, lambda t: noise[t])
    before_the_end = chunk.weights[:, :, None].bool() | (torch.arange(T) < 4)[None, :, None]
    assert_close(seen.elbo * before_the_end, out.trace * before_the_end)
    assert_close(seen.log_likelihood * before_the_end[..., 0], out.log_likelihood * before_the_end[..., 0])
    assert_close({k: v[:2] for k, v in seen.state.items()}, {k: v[:2] for k, v in out.state.items()})


@pytest.mark.parametrize("inference", ["avf", "own residual"])
def test_two_chunks_with_the_state_carried_see_what_one_sees(inference: str, generator: torch.Generator) -> None:
    model = small_filter("srnn", inference)
    whole = chunk_for(model, generator, K if inference == "avf" else 0, complete=True)
    whole.mask[:, 3, 2] = 0
    seen = accumulate_sequence(model, whole)
    state, parts = None, []
    # an entry that is missing at a chunk's end is fed on into the next
    for part in pieces(whole, 2):
        result = accumulate_sequence(model, Chunk(*part, state))
        assert not any(value.requires_grad for value in result.state.values())
        state = result.state
        parts.append(result.elbo)
    assert_close(torch.cat(parts, 1), seen.elbo)


def pieces(chunk: Chunk, length: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    for first in range(0, T, length):
        part = slice(first, first + length)
        yield chunk.x[:, part], chunk.mask[:, part], chunk.weights[:, part], chunk.noise[part]


@pytest.mark.parametrize("inference", ["avf", "own"])
def test_a_row_that_restarts_begins_like_a_new_sequence_and_teaches_the_beginning(inference: str, generator: torch.Generator) -> None:
    model = small_filter("vrnn", inference)
    chunk = chunk_for(model, generator, K if inference == "avf" else 0)
    fresh = accumulate_sequence(model, chunk)
    gradients(model)
    carried = Chunk(chunk.x, chunk.mask, chunk.weights, chunk.noise, fresh.state, torch.tensor([True, False, True]))
    again = accumulate_sequence(model, carried)
    assert_close(again.elbo[[0, 2]], fresh.elbo[[0, 2]])
    assert not torch.allclose(again.elbo[1], fresh.elbo[1])
    assert gradients(model)["generative.first.h"].any()
    accumulate_sequence(model, Chunk(chunk.x, chunk.mask, chunk.weights, chunk.noise, fresh.state))
    assert "generative.first.h" not in gradients(model)


@pytest.mark.parametrize("inference", ["avf", "own"])
@pytest.mark.parametrize("generative", ["vrnn", "srnn"])
def test_padding_changes_no_gradient(generative: str, inference: str, generator: torch.Generator) -> None:
    model = small_filter(generative, inference)
    chunk = chunk_for(model, generator, K if inference == "avf" else 0)
    accumulate_sequence(model, chunk)
    expected = gradients(model)
    x = chunk.x.clone()
    x[2, 4:] = 9.0
    accumulate_sequence(model, Chunk(x, chunk.mask, chunk.weights, chunk.noise))
    for name, value in gradients(model).items():
        assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_only_a_gap_that_is_fed_on_needs_filling() -> None:
    x, mask, weights = torch.zeros(2, 4, 3), torch.ones(2, 4, 3), torch.ones(2, 4)
    noise = torch.zeros(4, 1, 2, 1, 1)
    assert not Chunk(x, mask, weights, noise).needs_filling
    weights[1, 2:] = 0
    mask[1, 2:] = 0
    assert not Chunk(x, mask, weights, noise).needs_filling
    # the last frame of a chunk goes on into the next one
    mask[0, 3, 1] = 0
    assert Chunk(x, mask, weights, noise).needs_filling
    mask[0, 3, 1] = 1
    # a frame that only initialises is fed on too
    mask[0, 0, 2], weights[0, 0] = 0, 0
    assert Chunk(x, mask, weights, noise).needs_filling


def test_a_conventional_optimiser_trains_the_generative_model_alone(generator: torch.Generator) -> None:
    model = small_filter("srnn", "adam")
    accumulate_sequence(model, chunk_for(model, generator, K))
    assert all(name.startswith("generative.") for name in gradients(model))
