"""One contract for every way to infer λ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.architecture import DirectArchitecture, InferenceArchitecture, IterativeArchitecture, OptimiserArchitecture
from models.catalogue import INFERENCE, LatentModel
from models.gaussian import LOG_SIGMA_LIMIT, DiagonalGaussian
from models.inference.base import State
from models.inference.encodings import ENCODINGS, encode, log_sign
from models.objective import Evidence, evidence
from models.refinement import begin

Draw = Callable[..., Tensor]
MakeModel = Callable[..., LatentModel]
B, S, X, D = 4, 3, 12, 3

SMALL = (16, 16)
ARCHITECTURES: dict[str, InferenceArchitecture] = {
    "direct": DirectArchitecture(SMALL),
    "direct-highway": DirectArchitecture(SMALL, highway=True),
    "direct-mask": DirectArchitecture(SMALL, encode_mask=True),
    "iterative": IterativeArchitecture(hidden=SMALL),
    "iterative-highway": IterativeArchitecture(hidden=SMALL, highway=True),
    "iterative-recurrent": IterativeArchitecture(hidden=SMALL, recurrent=True),
    "iterative-mask": IterativeArchitecture(hidden=SMALL, encode_mask=True),
    **{f"iterative-{name}": IterativeArchitecture((name,), SMALL) for name in ENCODINGS},
    "iterative-all": IterativeArchitecture(("x", *ENCODINGS), SMALL, highway=True, recurrent=True, encode_mask=True),
    **{kind: OptimiserArchitecture(kind) for kind in ("sgd", "momentum", "rmsprop", "adam")},
}
EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)


def seen_at(model: LatentModel, state: State, x: Tensor, mask: Tensor, noise: Tensor) -> Evidence:
    return evidence(model.generative, state.q, x, mask, (noise,), errors=model.inference.reads_errors)


def run(model: LatentModel, x: Tensor, mask: Tensor, noise: Tensor, count: int) -> State:
    """`count` steps with the same noise at each."""
    state, context = begin(model.generative, model.inference, x, mask)
    for _ in range(count):
        state = model.inference.step(state, context, seen_at(model, state, x, mask, noise))
    return state


def as_dict(state: State) -> dict[str, Tensor]:
    return {f"{name}{i}": getattr(q, name) for i, q in enumerate(state.q) for name in ("mu", "log_sigma")} | dict(state.memory)


def test_every_kind_of_the_catalogue_is_tested_here() -> None:
    assert {architecture.kind for architecture in ARCHITECTURES.values()} == set(INFERENCE)


@EVERY
def test_states_and_context_have_one_row_each(architecture: InferenceArchitecture, make: MakeModel, binary: Draw, normal: Draw) -> None:
    model, x = make(architecture), binary(B, X)
    state, context = begin(model.generative, model.inference, x, torch.ones_like(x))
    after = run(model, x, torch.ones_like(x), normal(B, S, D), 2)
    assert state.q[0].mu.shape == state.q[0].log_sigma.shape == (B, D)
    assert all(value.ndim == 2 and len(value) == B and value.dtype == x.dtype for value in (*context.values(), *as_dict(state).values()))
    assert {name: value.shape for name, value in as_dict(after).items()} == {name: value.shape for name, value in as_dict(state).items()}
    assert float(after.q[0].log_sigma.detach().abs().max()) <= LOG_SIGMA_LIMIT


@EVERY
def test_init_and_step_are_pure(architecture: InferenceArchitecture, make: MakeModel, binary: Draw, normal: Draw) -> None:
    """No module holds the current posterior: the same arguments give the same answer, whatever was asked in between."""
    model, x, noise = make(architecture), binary(B, X), normal(B, S, D)
    mask = torch.ones_like(x)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state, context = begin(model.generative, model.inference, x, mask)
    state = run(model, x, mask, noise, 1)
    before = {name: value.clone() for name, value in as_dict(state).items()}
    seen = seen_at(model, state, x, mask, noise)
    first = model.inference.step(state, context, seen)
    run(model, 1 - x, mask, normal(B, S, D), 3)
    second = model.inference.step(state, context, seen)
    assert all(torch.equal(a, b) for a, b in zip(as_dict(first).values(), as_dict(second).values(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in as_dict(state).items())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@EVERY
def test_gradients_reach_every_parameter(architecture: InferenceArchitecture, make: MakeModel, binary: Draw, normal: Draw) -> None:
    model, x = make(architecture), binary(B, X)
    mask = (normal(B, X) > -0.5).to(x.dtype)
    # a few steps: the recurrent weights and the previous gradient have nothing to say at the first
    state = run(model, x, mask, normal(B, S, D), 3)
    loss = sum((part * normal(B, D)).sum() for level in state.q for part in (level.mu, level.log_sigma))
    parameters = dict(model.inference.named_parameters())
    if not parameters:
        return
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    without = [name for name, g in zip(parameters, gradients, strict=True) if g is None or not bool((g != 0).any())]
    assert not without


@EVERY
def test_a_row_alone_equals_the_row_in_a_batch(architecture: InferenceArchitecture, make: MakeModel, binary: Draw, normal: Draw) -> None:
    model, x, noise = make(architecture), binary(B, X), normal(B, S, D)
    mask = (normal(B, X) > -0.5).to(x.dtype)
    together = as_dict(run(model, x, mask, noise, 3))
    for i in range(B):
        row = slice(i, i + 1)
        alone = as_dict(run(model, x[row], mask[row], noise[row], 3))
        for name, value in alone.items():
            assert_close(value, together[name][row], atol=1e-5, rtol=1e-5)


@EVERY
def test_weights_are_saved_and_loaded(architecture: InferenceArchitecture, make: MakeModel, binary: Draw, normal: Draw) -> None:
    model, x, noise = make(architecture), binary(B, X), normal(B, S, D)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    again = make(architecture)
    again.load_state_dict(model.state_dict(), strict=True)
    a, b = (run(m, x, torch.ones_like(x), noise, 2) for m in (model, again))
    assert all(torch.equal(u, v) for u, v in zip(as_dict(a).values(), as_dict(b).values(), strict=True))


@EVERY
def test_hidden_pixels_do_not_matter(architecture: InferenceArchitecture, make: MakeModel, binary: Draw, normal: Draw) -> None:
    model, x, noise = make(architecture), binary(B, X), normal(B, S, D)
    mask = (normal(B, X) > 0).to(x.dtype)
    changed = torch.where(mask == 1, x, 1 - x)
    a, b = (run(model, rows, mask, noise, 2) for rows in (x, changed))
    assert all(torch.equal(u, v) for u, v in zip(as_dict(a).values(), as_dict(b).values(), strict=True))


@EVERY
def test_it_says_what_it_is(architecture: InferenceArchitecture, make: MakeModel) -> None:
    inference = make(architecture).inference
    assert type(inference).__name__ in repr(inference)
    assert inference.refines == (architecture.kind != "direct")
    if isinstance(architecture, IterativeArchitecture):
        assert inference.encodings == architecture.encodings
        assert inference.reads_errors == any(name.startswith("error") for name in architecture.encodings)


@pytest.mark.parametrize("name", ["direct", "iterative"])
def test_an_encoder_of_the_mask_tells_hidden_from_grey(name: str, make: MakeModel, normal: Draw) -> None:
    x = torch.full_like(normal(B, X), 0.5)  # reads as zero, like a hidden entry
    whole, half = torch.ones_like(x), torch.ones_like(x)
    half[:, ::2] = 0
    plain, reading = make(ARCHITECTURES[name]), make(ARCHITECTURES[f"{name}-mask"])
    context = [model.inference.context(x, mask) for model in (plain, reading) for mask in (whole, half)]
    (key,) = context[0]
    assert torch.equal(context[0][key], context[1][key])
    assert not torch.allclose(context[2][key], context[3][key])


def test_the_untrained_refiner_leaves_the_prior_where_it_is(make: MakeModel, binary: Draw, normal: Draw) -> None:
    model, x = make(), binary(B, X)
    heads = model.inference.heads
    assert isinstance(heads, torch.nn.Linear)
    torch.nn.init.zeros_(heads.weight)
    torch.nn.init.zeros_(heads.bias)
    state = run(model, x, torch.ones_like(x), normal(B, S, D), 3)
    assert torch.equal(state.q[0].mu, torch.zeros(B, D, dtype=x.dtype))
    assert torch.equal(state.q[0].log_sigma, torch.zeros(B, D, dtype=x.dtype))


def test_step_index_and_previous_gradient_are_kept_between_steps(make: MakeModel, binary: Draw, normal: Draw) -> None:
    model, x, noise = make(ARCHITECTURES["iterative-all"]), binary(B, X), normal(B, S, D)
    mask = torch.ones_like(x)
    state, context = begin(model.generative, model.inference, x, mask)
    assert float(state.memory["previous_grad"].abs().max()) == 0
    seen = seen_at(model, state, x, mask, noise)
    state = model.inference.step(state, context, seen)
    assert torch.equal(state.memory["step"], torch.ones(B, 1, dtype=x.dtype))
    assert torch.equal(state.memory["previous_grad"], log_sign(torch.cat([seen.grad[0].mu, seen.grad[0].log_sigma], -1)))
    assert bool((state.memory["hidden"] != 0).any())


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings_are_continuous_at_a_zero_gradient(name: str, normal: Draw) -> None:
    """A row alone and a row in a batch differ by rounding; near zero that must not flip a feature."""
    zero = torch.zeros_like(normal(B, D))
    state = State((DiagonalGaussian(zero, zero),), {"step": zero[:, :1], "previous_grad": torch.cat([zero, zero], -1)})

    def features(size: float) -> Tensor:
        level, error = DiagonalGaussian(size * normal(B, D), size * normal(B, D)), size * normal(B, X)
        seen = Evidence((level,), error, (size * normal(B, D),), terms=None)  # type: ignore[arg-type]
        return encode((name,), state, seen)

    assert float((features(1e-9) - features(0.0)).abs().max()) < 1e-5


def test_log_sign_is_odd_and_monotone_and_compresses(dtype: torch.dtype) -> None:
    g = torch.linspace(-1e4, 1e4, 10_001, dtype=dtype)
    assert_close(log_sign(-g), -log_sign(g))
    assert bool((log_sign(g).diff() > 0).all())
    assert float(log_sign(g).max()) < 12
