"""The compiled chain is the eager one, with the weights of the moment, at every shape and precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.catalogue import FilterModel
from tests.models.small_filters import frames, small_filter
from training.sequence_step import Chunk, ChunkSeen, accumulate_sequence
from training.sequence_update import SIGHTINGS, SequenceGradients

B, T = 3, 4


def chunk_of(model: FilterModel, rows: int, generator: torch.Generator, steps: int = 1, complete: bool = False) -> Chunk:
    x, mask = frames(model.generative, rows, T, generator)
    mask = torch.ones_like(mask) if complete else mask
    noise = torch.randn(T, steps + 1, rows, 1, model.generative.latent_sizes[0], generator=generator, dtype=x.dtype)
    return Chunk(x, mask, torch.ones(rows, T, dtype=x.dtype), noise)


def gradients(model: FilterModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def both(model: FilterModel, update: SequenceGradients, chunk: Chunk) -> tuple[ChunkSeen, ChunkSeen, dict[str, Tensor], dict[str, Tensor]]:
    expected = accumulate_sequence(model, chunk, 0.5)
    eager = gradients(model)
    measured = update(chunk, 0.5)
    return measured, expected, gradients(model), eager


@pytest.mark.parametrize("how", ["traced", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("generative", "complete"), [("vrnn", False), ("srnn", True)], ids=["vrnn with missing entries", "srnn foreseen"])
def test_a_compiled_chain_gives_the_eager_gradients_with_the_weights_of_the_moment(
    how: str, generative: str, complete: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "traced":
        # the graph itself, run as it stands: the compiler takes half a minute
        monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    model = small_filter(generative, "avf with x" if complete else "avf")
    update = SequenceGradients(model)
    chunk = chunk_of(model, B, generator, complete=complete)
    for _ in range(SIGHTINGS + 1):
        measured, expected, compiled, eager = both(model, update, chunk)
        assert_close(compiled, eager)
        assert_close(measured.elbo, expected.elbo)
        assert_close(measured.state, expected.state)
        # an optimiser moves the weights between two updates
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.01 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    assert len(update._frames) == 1
    # from the state of the last chunk, and with a number of rows that comes only once
    carried = Chunk(chunk.x, chunk.mask, chunk.weights, chunk.noise, measured.state)
    for other in (carried, chunk_of(model, B - 1, generator, complete=complete)):
        _, _, compiled, eager = both(model, update, other)
        assert_close(compiled, eager)
    assert len(update._frames) == 1


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "with missing entries"])
def test_a_chain_in_reduced_precision_stays_near_the_full_one(
    complete: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    model = small_filter("srnn", "avf", torch.float32)
    update = SequenceGradients(model, torch.bfloat16)
    for _ in range(SIGHTINGS + 1):
        measured, expected, reduced, full = both(model, update, chunk_of(model, B, generator, complete=complete))
        assert_close(measured.elbo, expected.elbo, rtol=0.05, atol=0.1)
        assert measured.elbo.dtype == torch.float32
        for name, value in full.items():
            assert float((reduced[name] - value).norm()) <= 0.1 * float(value.norm()) + 1e-3, name


def test_an_own_filter_is_never_compiled(generator: torch.Generator) -> None:
    model = small_filter("srnn", "own")
    update = SequenceGradients(model)
    for _ in range(SIGHTINGS):
        _, _, measured, eager = both(model, update, chunk_of(model, B, generator, steps=0))
        assert_close(measured, eager)
