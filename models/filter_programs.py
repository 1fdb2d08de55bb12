"""The served functions of the filter family, one frame per row and call; nothing here holds state or draws noise.

    predict   state, noise                          -> context, λ₀ and memory, parameters of the predicted frame, its mean
    init      x, mask, context                      -> λ, memory                     (a custom-designed filter)
    step      x, mask, context, λ, memory, noise    -> λ′, memory′, norm of ∇λ L, ELBO at λ   (a refining one)
    advance   x, mask, context, λ, noise            -> state′, log_likelihood, kl, parameters of p(x|z), mean
    frame_K   x, mask, state, noise of every step, noise_advance -> state′, λ, log_likelihood, kl, trace, parameters, mean
    sample_x  parameters, noise_x                   -> x

`begin` is no program, since it has no rows: the state before the first frame is the constant row `begin_arrays`, which an
artifact keeps beside its weights as `begin.<name>`.

Shapes: B rows ("rows"), S samples ("samples"), D latent size, X size of x, K steps trained for. Noise is standard normal.
The context is what a prediction says (`prior.*`) and what emission and transition read of the past (`context.*`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.artifact import TensorSpec
from models.catalogue import FilterModel
from models.filtering import advance, filter_frame, init, predict, read
from models.gaussian import DiagonalGaussian
from models.generative.filter import FilterState, Frame, Prediction
from models.inference.base import State
from models.likelihood import Likelihood
from models.programs import ROWS, SAMPLES, Program, as_posterior, flat_posterior, level_names
from models.refinement import refine_seen

FRAME = "frame_K"


@dataclass(frozen=True)
class FilterPrograms:
    """The programs of a model, the names of what a stream carries between frames and a frame between steps, and its beginning.

    `begin` maps the name of each state array to its one row, (1, n).
    """

    programs: dict[str, Program]
    state: tuple[TensorSpec, ...]
    carry: tuple[TensorSpec, ...]
    context: tuple[TensorSpec, ...]
    begin: dict[str, Tensor]

    def begin_arrays(self) -> dict[str, Tensor]:
        """What an artifact keeps beside its weights: `begin.<name>` for the state array `state.<name>`."""
        return {name.replace("state.", "begin.", 1): value for name, value in self.begin.items()}


def filter_programs(model: FilterModel, trained_steps: int) -> FilterPrograms:
    """Programs of a trained sequence model; `trained_steps` is the K of `frame_K` (0 for a custom-designed filter)."""
    names = _Names(model)
    programs = {"predict": _predict(model, names), "advance": _advance(model, names), "sample_x": _sample_x(names)}
    if model.inference.refines:
        programs["step"] = _step(model, names)
    else:
        programs["init"] = _init(model, names)
    programs[FRAME] = _frame(model, names, trained_steps if model.inference.refines else 0)
    begin = {f"state.{name}": value.detach().contiguous() for name, value in model.generative.begin().items()}
    return FilterPrograms(programs, names.state, (*names.q, *names.memory), names.context, begin)


class _Names:
    """The specs that several programs share, read off the model by running it on one blank row."""

    def __init__(self, model: FilterModel):
        generative, inference = model.generative, model.inference
        size, latent = generative.x_size, generative.latent_sizes
        blank = torch.zeros(1, size, dtype=generative.x_mean.dtype, device=generative.x_mean.device)
        with torch.no_grad():
            state = generative.begin()
            frame = predict(generative, state)
            memory = init(frame, inference, read(frame, inference, blank, blank), blank).memory
            likelihood: Any = frame(tuple(blank.new_zeros(1, 1, d) for d in latent))
        self.generative = generative
        self.x, self.mask = _row("x", size), _row("mask", size)
        self.state = tuple(_row(f"state.{name}", value.shape[-1]) for name, value in state.items())
        self.context = (
            *(_row(f"prior.{name}", latent[0]) for name in ("mu", "log_sigma")),
            *(_row(f"context.{name}", value.shape[-1]) for name, value in frame.prediction.context.items()),
        )
        self.q = tuple(_row(name, d) for i, d in enumerate(latent) for name in level_names(i).values())
        self.memory = tuple(_row(f"memory.{name}", value.shape[-1]) for name, value in memory.items())
        self.noise = tuple(_row(f"noise{i}", SAMPLES, d) for i, d in enumerate(latent))
        self.likelihood = likelihood
        self.parameters = tuple(_row(name, SAMPLES, size) for name in likelihood.parameters)
        self.mean = _row("mean", SAMPLES, size)
        self.measured = (_row("log_likelihood"), _row("kl", len(latent)))

    def as_state(self, arrays: Sequence[Tensor]) -> FilterState:
        return {spec.name.removeprefix("state."): array for spec, array in zip(self.state, arrays, strict=True)}

    def flat_state(self, state: FilterState) -> tuple[Tensor, ...]:
        # + 0: a program's output is its own array, never an alias of an input or of another output
        return tuple(state[spec.name.removeprefix("state.")] + 0 for spec in self.state)

    def as_frame(self, arrays: Sequence[Tensor]) -> Frame:
        prior = DiagonalGaussian(arrays[0], arrays[1])
        context = {spec.name.removeprefix("context."): array for spec, array in zip(self.context[2:], arrays[2:], strict=True)}
        return Frame(self.generative, Prediction(prior, context))

    def flat_frame(self, frame: Frame) -> tuple[Tensor, ...]:
        prior, context = frame.prediction.prior, frame.prediction.context
        return (prior.mu + 0, prior.log_sigma + 0, *(context[spec.name.removeprefix("context.")] + 0 for spec in self.context[2:]))

    def as_carry(self, arrays: Sequence[Tensor]) -> State:
        """λ and memory from tensors in the order of (*q, *memory)."""
        memory = {spec.name.removeprefix("memory."): a for spec, a in zip(self.memory, arrays[len(self.q) :], strict=True)}
        return State(as_posterior(arrays[: len(self.q)]), memory)

    def flat_carry(self, state: State) -> tuple[Tensor, ...]:
        return (*flat_posterior(state.q), *(state.memory[spec.name.removeprefix("memory.")] for spec in self.memory))


def _row(name: str, *sizes: int | str) -> TensorSpec:
    return TensorSpec(name=name, shape=(ROWS, *sizes))


def _shown(likelihood: Likelihood) -> tuple[Tensor, ...]:
    """Its parameters and its mean (+ 0: for a Gaussian the mean is one of the parameters)."""
    return (*likelihood.parameters.values(), likelihood.mean + 0)


def _predict(model: FilterModel, names: _Names) -> Program:
    def run(*arrays: Tensor) -> tuple[Tensor, ...]:
        frame = predict(model.generative, names.as_state(arrays[:-1]))
        # the memory's first values depend on no frame: any x gives them
        blank = frame.prediction.prior.mu.new_zeros(arrays[-1].shape[0], model.generative.x_size)
        memory = init(frame, model.inference, read(frame, model.inference, blank, blank), blank).memory
        belief = State(tuple(DiagonalGaussian(q.mu + 0, q.log_sigma + 0) for q in frame.prior_parameters(blank)), memory)
        likelihood = frame((frame.prediction.prior.rsample(arrays[-1]),))
        return (*names.flat_frame(frame), *names.flat_carry(belief), *_shown(likelihood))

    outputs = (*names.context, *names.q, *names.memory, *names.parameters, names.mean)
    return Program((*names.state, *names.noise), outputs, run)


def _init(model: FilterModel, names: _Names) -> Program:
    def run(x: Tensor, mask: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
        frame = names.as_frame(arrays)
        return names.flat_carry(init(frame, model.inference, read(frame, model.inference, x, mask), mask))

    return Program((names.x, names.mask, *names.context), (*names.q, *names.memory), run)


def _step(model: FilterModel, names: _Names) -> Program:
    contexts, carried = len(names.context), len(names.q) + len(names.memory)

    def run(x: Tensor, mask: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
        frame = names.as_frame(arrays[:contexts])
        belief, noise = names.as_carry(arrays[contexts : contexts + carried]), tuple(arrays[contexts + carried :])
        context = read(frame, model.inference, x, mask)
        new, norm, seen = refine_seen(frame, model.inference, x, mask, context, belief, noise)
        return (*names.flat_carry(new), norm, seen.terms.elbo)

    carry = (*names.q, *names.memory)
    return Program((names.x, names.mask, *names.context, *carry, *names.noise), (*carry, _row("grad_norm"), _row("elbo")), run)


def _advance(model: FilterModel, names: _Names) -> Program:
    contexts = len(names.context)

    def run(x: Tensor, mask: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
        frame = names.as_frame(arrays[:contexts])
        end = advance(frame, as_posterior(arrays[contexts:-1]), x, mask, (arrays[-1],))
        return (*names.flat_state(end.state), end.terms.log_likelihood, end.terms.kl, *_shown(end.likelihood))

    outputs = (*names.state, *names.measured, *names.parameters, names.mean)
    return Program((names.x, names.mask, *names.context, *names.q, *names.noise), outputs, run)


def _frame(model: FilterModel, names: _Names, steps: int) -> Program:
    states, latent = len(names.state), model.generative.latent_sizes[0]
    # the steps' noise and that of advance are two streams, so they come as two arrays
    step_noise = (_row("noise0", steps, SAMPLES, latent),) if steps else ()

    def run(x: Tensor, mask: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
        noise = [(arrays[states][:, k],) for k in range(steps)]
        result = filter_frame(model.generative, model.inference, names.as_state(arrays[:states]), x, mask, noise, (arrays[-1],))
        end = result.advance
        q = tuple(part + 0 for part in flat_posterior(result.q))
        return (*names.flat_state(end.state), *q, end.terms.log_likelihood, end.terms.kl, result.trace, *_shown(end.likelihood))

    outputs = (*names.state, *names.q, *names.measured, _row("trace", steps + 1), *names.parameters, names.mean)
    return Program((names.x, names.mask, *names.state, *step_noise, _row("noise_advance", SAMPLES, latent)), outputs, run)


def _sample_x(names: _Names) -> Program:
    def run(*arrays: Tensor) -> tuple[Tensor, ...]:
        parameters = {spec.name: array for spec, array in zip(names.parameters, arrays[:-1], strict=True)}
        return (replace(names.likelihood, **parameters).sample(arrays[-1]),)

    size = names.generative.x_size
    return Program((*names.parameters, _row("noise_x", SAMPLES, size)), (_row("x", SAMPLES, size),), run)
