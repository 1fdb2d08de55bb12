"""One update of φ and θ on a chunk of frames, for filters.

Amortized variational filtering (Marino, Cvitkovic & Yue 2018, Algorithm 1; digest: papers.md, section 3.2):

    φ descends  −Σ_t (1/K) Σ_k L_t(λ_k),  each term through its own call of f only, the state held fixed;
    θ descends  −Σ_t L_t(λ_K),            z_t drawn from sg[λ_K], back through the state over the chunk.

Nothing that θ or φ is differentiated by depends on a gradient path through the chain of z. So the chain runs once,
frame by frame, without autograd; with every z and λ then known, both gradients are taken over all frames at once: θ
from one pass of the model over (T · B) rows, φ from one call of f on (K · T · B) rows. Where x alone decides the core's
states (SRNN), these and all that is read of them are made first, once, and the chain is left with p(z_t|·) and the steps.
Same gradients as the published loop (tests/training/test_sequence_step.py has it), in a fraction of its operations;
docs/log.md has the times.

A custom-designed filter is trained as in its own papers: full back-propagation of −Σ_t L_t through time, reparameterised
through the chain of z. Sums over rows and frames. Shapes: B rows, T frames, S samples, D latent size, X size of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from models.catalogue import FilterModel
from models.filtering import init, observed, predict, read
from models.gaussian import DiagonalGaussian
from models.generative.filter import FilterState, Frame, Prediction
from models.inference.base import Context, State
from models.objective import ElboTerms, Evidence, elbo
from models.refinement import refine_seen

Flow = dict[str, Tensor]
"""What one frame of the chain leaves behind, by name, one row per sequence; stacked over frames, (B, T, …)."""


@dataclass(frozen=True)
class Chunk:
    """Frames to learn from.

    Attributes:
        x, mask: (B, T, X).
        weights: (B, T), what each frame counts for: 0 for padding after a sequence's end, and where a frame only initialises;
            1 for a missing frame in the midst.
        noise: (T, K + 1, B, S, D), standard normal. The first K drive the steps, the last draws z. An own filter has K = 0.
        state: where the sequences stand before the chunk; None at their beginning.
        restart: (B,) bool, rows that begin all the same; None = none of them.
    """

    x: Tensor
    mask: Tensor
    weights: Tensor
    noise: Tensor
    state: FilterState | None = None
    restart: Tensor | None = None

    @property
    def needs_filling(self) -> bool:
        """Whether some unobserved entry is fed on: in a frame that counts, or before one. Padding does neither: it comes last."""
        onwards = self.weights.flip(1).cumsum(1).flip(1)
        return bool(((self.mask == 0).any(-1) & (onwards > 0)).any())


@dataclass(frozen=True)
class ChunkSeen:
    """What an update saw, detached, in nats: the ELBO after 0 … K steps, (B, T, K + 1), its parts after the last, (B, T).

    `state` is where the sequences stand after the chunk.
    """

    elbo: Tensor
    log_likelihood: Tensor
    kl: Tensor
    state: FilterState


ChainFrame = Callable[[FilterState, Tensor, Tensor, Tensor, Tensor], tuple[FilterState, Flow]]
"""`chain_frame` or `foreseen_frame` of one model, or a compiled form of it."""


@dataclass(frozen=True)
class Foreseen:
    """What x alone decides, made for all frames at once, as part of the graph that θ and φ learn from.

    Attributes:
        core: the states before each frame and after the last, without z. context: of all frames, (B · T, n) each.
        reading: what inference reads of the frames themselves, (B · T, n) each; θ learns nothing through it.
    """

    core: list[FilterState]
    context: dict[str, Tensor]
    reading: dict[str, Tensor]

    @property
    def before(self) -> FilterState:
        """`core` before each frame, (B · T, n)."""
        return _by_row(self.core[:-1])

    def by_frame(self, rows: _Rows) -> list[FilterState]:
        """What `foreseen_frame` takes beside z, T times (B, …)."""
        named = {f"context.{name}": value for name, value in self.context.items()}
        named |= {f"reading.{name}": value for name, value in self.reading.items()}
        split = rows.by_frame({name: value.detach() for name, value in named.items()})
        return [{**core, **parts} for core, parts in zip(self.core[:-1], split, strict=True)]


def accumulate_sequence(
    model: FilterModel, chunk: Chunk, kl_weight: float | Tensor = 1.0, faster: Callable[[ChainFrame], ChainFrame] | None = None
) -> ChunkSeen:
    """Adds the gradients of one update to φ and θ. `faster`: gives a faster form of the chain's frame, or the frame itself."""
    if not model.inference.refines:
        return _back_through_time(model, chunk, kl_weight)
    weight = torch.as_tensor(kl_weight, dtype=chunk.x.dtype, device=chunk.x.device)
    rows, state = _Rows(chunk), _start(model, chunk)
    foreseen = _foresee(model, chunk, rows, state)
    with torch.no_grad():
        if foreseen is None:
            known, frame = None, partial(chain_frame, model, fill=chunk.needs_filling)
        else:
            known, frame = foreseen.by_frame(rows), partial(foreseen_frame, model)
        flow = run_chain(faster(frame) if faster else frame, chunk, state if known is None else {"z": state["z"]}, weight, known)
    return _learn(model, chunk, rows, state, foreseen, flow, weight)


def _foresee(model: FilterModel, chunk: Chunk, rows: _Rows, state: FilterState) -> Foreseen | None:
    """None where the past of z enters, be it only through what fills a gap."""
    generative = model.generative
    core = None if chunk.needs_filling else generative.foresee(state, chunk.x)
    if core is None:
        return None
    context = generative.context(_by_row(core[:-1]))
    return Foreseen(core, context, _reading(model, rows, context))


def _reading(model: FilterModel, rows: _Rows, context: dict[str, Tensor]) -> Context:
    """What a refiner reads of the frames themselves, all of them at once."""
    generative = model.generative
    return model.inference.context(generative.standardise(rows.x), rows.mask, generative.summary(context).detach())


def _start(model: FilterModel, chunk: Chunk) -> FilterState:
    """The state before the chunk. The beginning is learned, so it stays part of the graph."""
    begin = model.generative.start(len(chunk.x))
    if chunk.state is None or chunk.restart is None:
        return begin if chunk.state is None else chunk.state
    restart = chunk.restart.unsqueeze(-1)
    return {name: torch.where(restart, begin[name], value) for name, value in chunk.state.items()}


def run_chain(chain: ChainFrame, chunk: Chunk, state: FilterState, kl_weight: Tensor, known: Sequence[FilterState] | None = None) -> Flow:
    """Every z, λ and ∇λ L of the chunk, (B, T, …). Runs without autograd. `known`: of each frame, what was foreseen."""
    flows = []
    frames = zip(chunk.x.unbind(1), chunk.mask.unbind(1), chunk.noise.unbind(0), strict=True)
    for t, (x, mask, noise) in enumerate(frames):
        state, flow = chain(state if known is None else {**known[t], **state}, x, mask, noise, kl_weight)
        flows.append(flow)
    return {name: torch.stack([flow[name] for flow in flows], 1) for name in flows[0]}


def chain_frame(
    model: FilterModel, state: FilterState, x: Tensor, mask: Tensor, noise: Tensor, kl_weight: Tensor, *, fill: bool
) -> tuple[FilterState, Flow]:
    """One frame of the chain: the state after it, and of each step (B, K, …) what f read.

    Args:
        noise: (K + 1, B, S, D).
        fill: unobserved entries are fed on as p(x_t|z_t)'s mean; without it x is fed on as it is, and a decoder pass saved.
    """
    frame = predict(model.generative, state)
    q, samples, flow = _refined(model, frame, read(frame, model.inference, x, mask), x, mask, noise, kl_weight)
    if fill:
        x = torch.where(mask > 0, x, frame((samples,)).mean[:, 0])
    return frame.transition(x, mask, (q,), (samples,)), {**flow, "x": x}


def foreseen_frame(
    model: FilterModel, known: FilterState, x: Tensor, mask: Tensor, noise: Tensor, kl_weight: Tensor
) -> tuple[FilterState, Flow]:
    """The same where only prior and z are left to go frame by frame. `known`: a frame's part of `Foreseen`, and the last z."""
    context, reading = (
        {name.removeprefix(kind): value for name, value in known.items() if name.startswith(kind)} for kind in ("context.", "reading.")
    )
    frame = Frame(model.generative, Prediction(model.generative.prior(known, context), context))
    _, samples, flow = _refined(model, frame, reading, x, mask, noise, kl_weight)
    return {"z": samples[:, 0]}, flow


def _refined(
    model: FilterModel, frame: Frame, context: Context, x: Tensor, mask: Tensor, noise: Tensor, kl_weight: Tensor
) -> tuple[DiagonalGaussian, Tensor, Flow]:
    """λ_K, samples of it and what the steps read."""
    belief = init(frame, model.inference, context, mask)
    steps: list[Flow] = []
    for k in range(len(noise) - 1):
        new, _, seen = refine_seen(frame, model.inference, x, mask, context, belief, (noise[k],), kl_weight)
        steps.append(_step_flow(belief, seen))
        belief = new
    q = belief.q[0]
    samples = q.rsample(noise[-1])
    flow = {"z": samples[:, 0], "mu": q.mu, "log_sigma": q.log_sigma}
    flow |= {f"step.{name}": torch.stack([step[name] for step in steps], 1) for name in steps[0]}
    return q, samples, flow


def _step_flow(belief: State, seen: Evidence) -> Flow:
    flow = {"mu": belief.q[0].mu, "log_sigma": belief.q[0].log_sigma, "elbo": seen.terms.elbo}
    flow |= {"grad_mu": seen.grad[0].mu, "grad_log_sigma": seen.grad[0].log_sigma}
    if seen.error_x is not None and seen.error_z is not None:
        flow |= {"error_x": seen.error_x, "error_z": seen.error_z[0]}
    return flow | {f"memory.{name}": value for name, value in belief.memory.items()}


def _learn(
    model: FilterModel, chunk: Chunk, rows: _Rows, state: FilterState, foreseen: Foreseen | None, flow: Flow, kl_weight: Tensor
) -> ChunkSeen:
    """θ's gradient from all frames at once, then φ's."""
    generative = model.generative
    q = DiagonalGaussian(rows.flat(flow["mu"]).requires_grad_(), rows.flat(flow["log_sigma"]).requires_grad_())
    if foreseen is None:
        fixed = DiagonalGaussian(flow["mu"], flow["log_sigma"])
        states = generative.unroll(state, flow["x"], chunk.mask, fixed, flow["z"])
        frame, after = predict(generative, _by_row(states[:-1])), states[-1]
    else:
        z = {"z": torch.cat([state["z"].unsqueeze(1), flow["z"][:, :-1]], 1).flatten(0, 1)}
        prior = generative.prior({**foreseen.before, **z}, foreseen.context)
        frame, after = Frame(generative, Prediction(prior, foreseen.context)), {**foreseen.core[-1], "z": flow["z"][:, -1]}
    terms = elbo(frame, (q,), rows.x, rows.mask, (rows.noise,))
    (-(rows.weights * terms.annealed(kl_weight)).sum()).backward()
    assert q.mu.grad is not None
    assert q.log_sigma.grad is not None
    if any(parameter.requires_grad for parameter in model.inference.parameters()):
        reading = _reading(model, rows, frame.prediction.context) if foreseen is None else foreseen.reading
        _learn_inference(model, rows, flow, reading, (q.mu.grad, q.log_sigma.grad), terms)
    trace = torch.cat([flow["step.elbo"], rows.shaped(terms.elbo.detach()).unsqueeze(-1)], -1)
    return _seen(trace, rows, terms, after)


def _learn_inference(model: FilterModel, rows: _Rows, flow: Flow, reading: Context, last: tuple[Tensor, Tensor], terms: ElboTerms) -> None:
    """φ's gradient from one call of f on every step of every frame. `reading`: what it reads of the frames themselves.

    What f read is fixed, and what the loss sends back into its answer λ_k is −∇λ L(λ_k)/K: known for k < K, since it is
    what the next call read; `last` is that of λ_K, already a descent direction and weighed.
    """
    steps = {name.removeprefix("step."): value.flatten(0, 1) for name, value in flow.items() if name.startswith("step.")}
    count = steps["mu"].shape[1]
    each = {name: value.flatten(0, 1) for name, value in steps.items()}
    memory = {name.removeprefix("memory."): value for name, value in each.items() if name.startswith("memory.")}
    error_x, error_z = (each["error_x"], (each["error_z"],)) if "error_x" in each else (None, None)
    belief = State((DiagonalGaussian(each["mu"], each["log_sigma"]),), memory)
    seen = Evidence((DiagonalGaussian(each["grad_mu"], each["grad_log_sigma"]),), error_x, error_z, terms)
    context = {name: value.repeat_interleave(count, 0) for name, value in reading.items()}
    answer = model.inference.step(belief, context, seen).q[0]
    # a frame of which nothing was observed took no step: f's answer was not used
    used = observed(rows.mask).unsqueeze(1)
    weight = -rows.weights.reshape(-1, 1, 1)
    signals = [
        (torch.cat([weight * steps[name][:, 1:], final.unsqueeze(1)], 1) * used / count).flatten(0, 1)
        for name, final in zip(("grad_mu", "grad_log_sigma"), last, strict=True)
    ]
    torch.autograd.backward([answer.mu, answer.log_sigma], signals)


def _back_through_time(model: FilterModel, chunk: Chunk, kl_weight: float | Tensor) -> ChunkSeen:
    """An own filter's update: the chain of z with autograd, then the objective of all frames at once."""
    rows, state = _Rows(chunk), _start(model, chunk)
    core = None if chunk.needs_filling else model.generative.foresee(state, chunk.x)
    whole, q, state = _chain_of_z(model, chunk, state) if core is None else _foreseen_chain(model, chunk, rows, core, state["z"])
    terms = elbo(Frame(model.generative, whole), (q,), rows.x, rows.mask, (rows.noise,))
    (-(rows.weights * terms.annealed(kl_weight)).sum()).backward()
    return _seen(rows.shaped(terms.elbo.detach()).unsqueeze(-1), rows, terms, state)


Chained = tuple[Prediction, DiagonalGaussian, FilterState]
"""The predictions and answers of a chunk's frames, (B · T, …), and the state after it."""


def _chain_of_z(model: FilterModel, chunk: Chunk, state: FilterState) -> Chained:
    generative, fill = model.generative, chunk.needs_filling
    predictions: list[Prediction] = []
    answers: list[DiagonalGaussian] = []
    for x, mask, noise in zip(chunk.x.unbind(1), chunk.mask.unbind(1), chunk.noise[:, -1].unbind(0), strict=True):
        frame = predict(generative, state)
        q = init(frame, model.inference, read(frame, model.inference, x, mask), mask).q
        samples = (q[0].rsample(noise),)
        fed = torch.where(mask > 0, x, frame(samples).mean[:, 0].detach()) if fill else x
        state = frame.transition(fed, mask, q, samples)
        predictions.append(frame.prediction)
        answers.append(q[0])
    context = {name: torch.stack([p.context[name] for p in predictions], 1).flatten(0, 1) for name in predictions[0].context}
    return Prediction(_gathered([p.prior for p in predictions]), context), _gathered(answers), state


def _foreseen_chain(model: FilterModel, chunk: Chunk, rows: _Rows, core: list[FilterState], z: Tensor) -> Chained:
    """The same where x alone decides what the filter reads of the past: only prior and z are left to go frame by frame."""
    generative, inference = model.generative, model.inference
    context = generative.context(_by_row(core[:-1]))
    reading = inference.context(generative.standardise(rows.x), rows.mask, generative.summary(context))
    contexts, readings = rows.by_frame(context), rows.by_frame(reading)
    priors: list[DiagonalGaussian] = []
    answers: list[DiagonalGaussian] = []
    for t, (mask, noise) in enumerate(zip(chunk.mask.unbind(1), chunk.noise[:, -1].unbind(0), strict=True)):
        prior = generative.prior({**core[t], "z": z}, contexts[t])
        q = init(Frame(generative, Prediction(prior, contexts[t])), inference, readings[t], mask).q[0]
        z = q.rsample(noise)[:, 0]
        priors.append(prior)
        answers.append(q)
    return Prediction(_gathered(priors), context), _gathered(answers), {**core[-1], "z": z}


def _gathered(gaussians: Sequence[DiagonalGaussian]) -> DiagonalGaussian:
    """T Gaussians of (B, D) -> one of (B · T, D)."""
    return DiagonalGaussian(
        torch.stack([g.mu for g in gaussians], 1).flatten(0, 1), torch.stack([g.log_sigma for g in gaussians], 1).flatten(0, 1)
    )


def _by_row(states: Sequence[FilterState]) -> FilterState:
    """T states of (B, n) -> one of (B · T, n)."""
    return {name: torch.stack([state[name] for state in states], 1).flatten(0, 1) for name in states[0]}


class _Rows:
    """A chunk with every frame of every sequence as a row of its own: (B, T, …) as (B · T, …)."""

    def __init__(self, chunk: Chunk):
        self._shape = chunk.weights.shape
        self.x, self.mask, self.weights = self.flat(chunk.x), self.flat(chunk.mask), self.flat(chunk.weights)
        self.noise = self.flat(chunk.noise[:, -1].transpose(0, 1))

    def flat(self, value: Tensor) -> Tensor:
        return value.flatten(0, 1)

    def by_frame(self, values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """(B · T, n) each -> T times (B, n)."""
        split = {name: value.unflatten(0, self._shape).transpose(0, 1).contiguous().unbind(0) for name, value in values.items()}
        return [{name: parts[t] for name, parts in split.items()} for t in range(self._shape[1])]

    def shaped(self, value: Tensor) -> Tensor:
        return value.reshape(self._shape)


def _seen(trace: Tensor, rows: _Rows, terms: ElboTerms, state: FilterState) -> ChunkSeen:
    return ChunkSeen(
        trace,
        rows.shaped(terms.log_likelihood.detach()),
        rows.shaped(terms.kl.sum(-1).detach()),
        {name: value.detach() for name, value in state.items()},
    )
