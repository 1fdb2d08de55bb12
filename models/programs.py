"""The served functions of the static family: an artifact can do exactly this, and nothing here holds state or draws noise.

    init              x, mask                              -> λ₀, memory, context
    step              x, mask, context, λ, memory, noise   -> λ′, memory′, norm of ∇λ L
    score             x, mask, λ, noise                    -> log_likelihood, kl, log_weight
    decode            z                                    -> parameters of p(x|z), mean
    posterior_sample  λ, noise -> z        prior_sample  noise -> z        sample_x  parameters, noise -> x

Shapes: B rows ("rows"), S samples ("samples"), D latent size of a level, X size of x, L levels. Noise is standard normal.
A direct model has no `step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.artifact import TensorSpec
from models.catalogue import LatentModel
from models.gaussian import DiagonalGaussian, Posterior
from models.inference.base import State
from models.objective import log_weights
from models.refinement import begin, refine_once

ROWS, SAMPLES = "rows", "samples"


@dataclass(frozen=True)
class Program:
    """A pure function of tensors, in the order of `inputs`; gives tensors in the order of `outputs`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    function: Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class StaticPrograms:
    """The programs of a model, and the names of what a row carries between them."""

    programs: dict[str, Program]
    carry: tuple[TensorSpec, ...]
    context: tuple[TensorSpec, ...]


def level_names(level: int) -> dict[str, str]:
    """What clients call a Gaussian level's parameters -> the arrays that hold them."""
    return {"mu": f"q{level}.mu", "log_sigma": f"q{level}.log_sigma"}


def static_programs(model: LatentModel) -> StaticPrograms:
    """Programs of a trained model with one observation per row."""
    names = _Names(model)
    programs = {
        "init": _init(model, names),
        "score": _score(model, names),
        "decode": _decode(model, names),
        "posterior_sample": _posterior_sample(names),
        "prior_sample": _prior_sample(model, names),
        "sample_x": _sample_x(model, names),
    }
    if model.inference.refines:
        programs["step"] = _step(model, names)
    return StaticPrograms(programs, (*names.q, *names.memory), names.context)


class _Names:
    """The specs that several programs share, read off the model by running it on one blank row."""

    def __init__(self, model: LatentModel):
        size, latent = model.generative.x_size, model.generative.latent_sizes
        parameter = next(model.parameters())
        blank = torch.zeros(1, size, dtype=parameter.dtype, device=parameter.device)
        with torch.no_grad():
            state, context = begin(model.generative, model.inference, blank, torch.ones_like(blank))
        self.x = TensorSpec(name="x", shape=(ROWS, size))
        self.mask = TensorSpec(name="mask", shape=(ROWS, size))
        self.q = tuple(TensorSpec(name=name, shape=(ROWS, d)) for i, d in enumerate(latent) for name in level_names(i).values())
        self.memory = tuple(TensorSpec(name=f"memory.{name}", shape=(ROWS, value.shape[-1])) for name, value in state.memory.items())
        # a direct model's context is its answer: nothing later reads it
        self.context = tuple(
            TensorSpec(name=f"context.{name}", shape=(ROWS, value.shape[-1])) for name, value in context.items() if model.inference.refines
        )
        self.noise = tuple(TensorSpec(name=f"noise{i}", shape=(ROWS, SAMPLES, d)) for i, d in enumerate(latent))
        self.z = tuple(TensorSpec(name=f"z{i}", shape=(ROWS, SAMPLES, d)) for i, d in enumerate(latent))
        with torch.no_grad():
            likelihood = model.generative(tuple(torch.zeros(1, 1, d, dtype=blank.dtype, device=blank.device) for d in latent))
        self.likelihood = type(likelihood)
        self.parameters = tuple(TensorSpec(name=name, shape=(ROWS, SAMPLES, size)) for name in likelihood.parameters)

    def state(self, arrays: Sequence[Tensor]) -> State:
        """λ and memory from tensors in the order of (*q, *memory)."""
        q = as_posterior(arrays[: len(self.q)])
        return State(q, {spec.name.removeprefix("memory."): a for spec, a in zip(self.memory, arrays[len(self.q) :], strict=True)})

    def flat(self, state: State) -> tuple[Tensor, ...]:
        return (*flat_posterior(state.q), *(state.memory[spec.name.removeprefix("memory.")] for spec in self.memory))


def as_posterior(arrays: Sequence[Tensor]) -> Posterior:
    """(μ₀, log σ₀, μ₁, …) -> λ."""
    return tuple(DiagonalGaussian(mu, log_sigma) for mu, log_sigma in zip(arrays[::2], arrays[1::2], strict=True))


def flat_posterior(q: Posterior) -> tuple[Tensor, ...]:
    return tuple(part for level in q for part in (level.mu, level.log_sigma))


def _row(name: str, *sizes: int | str) -> TensorSpec:
    return TensorSpec(name=name, shape=(ROWS, *sizes))


def _init(model: LatentModel, names: _Names) -> Program:
    def init(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        state, context = begin(model.generative, model.inference, x, mask)
        return (*names.flat(state), *(context[spec.name.removeprefix("context.")] for spec in names.context))

    return Program((names.x, names.mask), (*names.q, *names.memory, *names.context), init)


def _step(model: LatentModel, names: _Names) -> Program:
    contexts, carried = len(names.context), len(names.q) + len(names.memory)

    def step(x: Tensor, mask: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        context = {spec.name.removeprefix("context."): array for spec, array in zip(names.context, rest[:contexts], strict=True)}
        state = names.state(rest[contexts : contexts + carried])
        new, norm = refine_once(model.generative, model.inference, x, mask, context, state, tuple(rest[contexts + carried :]))
        return (*names.flat(new), norm)

    carry = (*names.q, *names.memory)
    return Program((names.x, names.mask, *names.context, *carry, *names.noise), (*carry, _row("grad_norm")), step)


def _score(model: LatentModel, names: _Names) -> Program:
    def score(x: Tensor, mask: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        q, noise = as_posterior(rest[: len(names.q)]), tuple(rest[len(names.q) :])
        z = tuple(level.rsample(noise[i]) for i, level in enumerate(q))
        log_likelihood, log_weight = log_weights(model.generative, q, x, mask, noise)
        return log_likelihood, model.generative.kl(q, z), log_weight

    outputs = (_row("log_likelihood", SAMPLES), _row("kl", len(names.noise)), _row("log_weight", SAMPLES))
    return Program((names.x, names.mask, *names.q, *names.noise), outputs, score)


def _decode(model: LatentModel, names: _Names) -> Program:
    def decode(*z: Tensor) -> tuple[Tensor, ...]:
        likelihood = model.generative(z)
        return (*likelihood.parameters.values(), likelihood.mean)

    return Program(names.z, (*names.parameters, _row("mean", SAMPLES, model.generative.x_size)), decode)


def _posterior_sample(names: _Names) -> Program:
    def posterior_sample(*rest: Tensor) -> tuple[Tensor, ...]:
        q, noise = as_posterior(rest[: len(names.q)]), rest[len(names.q) :]
        return tuple(level.rsample(noise[i]) for i, level in enumerate(q))

    return Program((*names.q, *names.noise), names.z, posterior_sample)


def _prior_sample(model: LatentModel, names: _Names) -> Program:
    def prior_sample(*noise: Tensor) -> tuple[Tensor, ...]:
        # + 0: a program's output is its own array, never an alias of an input
        return tuple(z + 0 for z in model.generative.prior_sample(noise))

    return Program(names.noise, names.z, prior_sample)


def _sample_x(model: LatentModel, names: _Names) -> Program:
    def sample_x(*rest: Tensor) -> tuple[Tensor, ...]:
        parameters = {spec.name: array for spec, array in zip(names.parameters, rest[:-1], strict=True)}
        return (names.likelihood(**parameters).sample(rest[-1]),)

    size = model.generative.x_size
    return Program((*names.parameters, _row("noise_x", SAMPLES, size)), (_row("x", SAMPLES, size),), sample_x)
