"""One update of φ and θ on a chunk of frames, for filters.

Amortized variational filtering (Marino, Cvitkovic & Yue 2018, Algorithm 1; digest: papers.md, section 3.2):

    φ descends  −Σ_t (1/K) Σ_k L_t(λ_k),  each term through its own call of f only, the state held fixed;
    θ descends  −Σ_t L_t(λ_K),            z_t drawn from sg[λ_K], back through the state over the chunk.

Nothing that θ or φ is differentiated by depends on a gradient path through the chain of z. So the chain runs once,
frame by frame, without autograd; with every z and λ then known, both gradients are taken over all frames at once: θ
from one pass of the model over (T · B) rows, φ from one call of f on (K · T · B) rows, whose matrix products the chain has made
already (training/kept_products.py). Where x alone decides the core's states (SRNN), these and all that is read of them are made
first, once, and the chain is left with p(z_t|·) and the steps. An option, not published: λ_K also descends what later frames of the
chunk make of its z (`later_frames`); the chain stays as it is, and each z is a draw of λ_K in that one pass.
Same gradients as the published loop (tests/training/test_sequence_step.py has it), in a fraction of its operations;
docs/log.md has the times.

A custom-designed filter is trained as in its own papers: full back-propagation of −Σ_t L_t through time, reparameterised
through the chain of z. Sums over rows and frames. Shapes: B rows, T frames, S samples, D latent size, X size of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from models.catalogue import FilterModel
from models.filtering import init, observed, predict, read
from models.gaussian import DiagonalGaussian
from models.generative.filter import FilterState, Frame, Prediction
from models.inference.base import Context, State
from models.objective import ElboTerms, Evidence, elbo
from models.refinement import refine_seen
from training.kept_products import Give, Keep

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


Learn = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor, Flow, Tensor], ElboTerms]
"""`learn_foreseen` of one model, or a compiled form of it."""


class Faster(Protocol):
    """Gives faster forms of an update's parts, or the parts themselves."""

    def frame(self, frame: ChainFrame) -> ChainFrame: ...

    def learn(self, learn: Learn) -> Learn: ...


@dataclass(frozen=True)
class Foreseen:
    """What x alone decides, made for all frames at once, as part of the graph that θ and φ learn from.

    Attributes:
        known: (B · T, n) each: `before.…`, what is read of the states before each frame; `context.…`; and `reading.…`, what inference
            reads of the frames themselves (θ learns nothing through it).
        z: that before the first frame, (B, D). after: the state after the last frame, without z.
    """

    known: dict[str, Tensor]
    z: Tensor
    after: FilterState

    def leaves(self) -> dict[str, Tensor]:
        """`known` and `z` as the leaves of another graph."""
        return {name: value.detach().requires_grad_() for name, value in self._ends().items()}

    def backward(self, leaves: dict[str, Tensor]) -> None:
        """Sends what arrived at the leaves on."""
        ends = [(value, leaves[name].grad) for name, value in self._ends().items() if value.requires_grad and leaves[name].grad is not None]
        if ends:
            torch.autograd.backward([value for value, _ in ends], [grad for _, grad in ends])

    def _ends(self) -> dict[str, Tensor]:
        return {**self.known, "z": self.z}


def accumulate_sequence(
    model: FilterModel, chunk: Chunk, kl_weight: float | Tensor = 1.0, faster: Faster | None = None, *, later_frames: bool = False
) -> ChunkSeen:
    """Adds the gradients of one update to φ and θ.

    Args:
        later_frames: λ_K of a frame also descends what the chunk's later frames make of its z (of a refining model; a custom-designed
            filter always does).
    """
    if not model.inference.refines:
        return _back_through_time(model, chunk, kl_weight)
    weight = torch.as_tensor(kl_weight, dtype=chunk.x.dtype, device=chunk.x.device)
    rows, state = _Rows(chunk), _start(model, chunk)
    foreseen = _foresee(model, chunk, rows, state)
    with torch.no_grad():
        if foreseen is None:
            known, frame = None, partial(chain_frame, model, fill=chunk.needs_filling)
        else:
            known, frame = rows.by_frame({name: value.detach() for name, value in foreseen.known.items()}), partial(foreseen_frame, model)
        flow = run_chain(faster.frame(frame) if faster else frame, chunk, state if known is None else {"z": state["z"]}, weight, known)
    if foreseen is None:
        terms, after = _learn_unrolled(model, chunk, rows, state, flow, weight, later_frames)
    else:
        learn, leaves = partial(learn_foreseen, model, later_frames=later_frames), foreseen.leaves()
        terms = (faster.learn(learn) if faster else learn)(leaves, chunk.x, chunk.mask, chunk.weights, chunk.noise, flow, weight)
        foreseen.backward(leaves)
        after = {**foreseen.after, "z": flow["z"][:, -1]}
    trace = torch.cat([flow["step.elbo"], rows.shaped(terms.elbo.detach()).unsqueeze(-1)], -1)
    return _seen(trace, rows, terms, after)


def _foresee(model: FilterModel, chunk: Chunk, rows: _Rows, state: FilterState) -> Foreseen | None:
    """None where the past of z enters, be it only through what fills a gap."""
    generative = model.generative
    core = None if chunk.needs_filling else generative.foresee(state, chunk.x)
    if core is None:
        return None
    before = {name: rows.flat(value) for name, value in core[0].items()}
    context = generative.context(before)
    parts = {"before": before, "context": context, "reading": _reading(model, rows, context)}
    return Foreseen({f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}, state["z"], core[1])


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
    before, context, reading = (_named(known, part) for part in ("before.", "context.", "reading."))
    with Keep(model.generative) as kept:
        prior = model.generative.prior({**before, "z": known["z"]}, context)
    frame = Frame(model.generative, Prediction(prior, context))
    _, samples, flow = _refined(model, frame, reading, x, mask, noise, kl_weight)
    return {"z": samples[:, 0]}, {**flow, **_numbered("prior.product.", kept.products)}


def _named(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of `values` whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _numbered(prefix: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{i}": value for i, value in enumerate(values)}


def _in_order(values: dict[str, Tensor], prefix: str) -> list[Tensor]:
    """What `_numbered` has named."""
    found = _named(values, prefix)
    return [found[str(i)] for i in range(len(found))]


def _refined(
    model: FilterModel, frame: Frame, context: Context, x: Tensor, mask: Tensor, noise: Tensor, kl_weight: Tensor
) -> tuple[DiagonalGaussian, Tensor, Flow]:
    """λ_K, samples of it and what the steps read."""
    belief = init(frame, model.inference, context, mask)
    steps: list[Flow] = []
    for k in range(len(noise) - 1):
        with Keep(model.inference) as kept:
            new, _, seen = refine_seen(frame, model.inference, x, mask, context, belief, (noise[k],), kl_weight)
        steps.append(_step_flow(belief, seen) | _numbered("product.", kept.products))
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


def _learn_unrolled(
    model: FilterModel, chunk: Chunk, rows: _Rows, state: FilterState, flow: Flow, kl_weight: Tensor, later_frames: bool
) -> tuple[ElboTerms, FilterState]:
    """Adds the gradients of θ and φ, all z and λ being known; the objective, and the state after the chunk."""
    fixed, q = DiagonalGaussian(flow["mu"], flow["log_sigma"]), _answers(rows, flow)
    states = model.generative.unroll(state, flow["x"], chunk.mask, fixed, _z_of(q, rows) if later_frames else flow["z"])
    frame = predict(model.generative, _by_row(states[:-1]))
    return _learn(model, rows, q, frame, _reading(model, rows, frame.prediction.context), flow, kl_weight), states[-1]


def learn_foreseen(
    model: FilterModel,
    known: dict[str, Tensor],
    x: Tensor,
    mask: Tensor,
    weights: Tensor,
    noise: Tensor,
    flow: Flow,
    kl_weight: Tensor,
    *,
    later_frames: bool = False,
) -> ElboTerms:
    """Adds the gradients of θ and φ, and those of the leaves `known` (`Foreseen`), all z and λ being known; the objective, (B · T, …)."""
    rows = _Rows(Chunk(x, mask, weights, noise))
    before, context, reading = (_named(known, part) for part in ("before.", "context.", "reading."))
    q = _answers(rows, flow)
    drawn = _z_of(q, rows) if later_frames else flow["z"]
    z = torch.cat([known["z"].unsqueeze(1), drawn[:, :-1]], 1).flatten(0, 1)
    with Give([rows.flat(product) for product in _in_order(flow, "prior.product.")]):
        prior = model.generative.prior({**before, "z": z}, context)
    return _learn(model, rows, q, Frame(model.generative, Prediction(prior, context)), reading, flow, kl_weight)


def _answers(rows: _Rows, flow: Flow) -> DiagonalGaussian:
    """λ_K of every frame, (B · T, D), as leaves of a new graph: what arrives there is what f's last answer descends by."""
    return DiagonalGaussian(*(rows.flat(flow[name]).detach().requires_grad_() for name in ("mu", "log_sigma")))


def _z_of(q: DiagonalGaussian, rows: _Rows) -> Tensor:
    """The very z of the chain, (B, T, D), as draws of q."""
    return rows.shaped(q.rsample(rows.noise)[:, 0])


def _learn(
    model: FilterModel, rows: _Rows, q: DiagonalGaussian, frame: Frame, reading: Context, flow: Flow, kl_weight: Tensor
) -> ElboTerms:
    """θ's gradient from all frames at once, then φ's. `q`: `_answers`. `reading`: what f reads of the frames themselves."""
    terms = elbo(frame, (q,), rows.x, rows.mask, (rows.noise,))
    (-(rows.weights * terms.annealed(kl_weight)).sum()).backward()
    assert q.mu.grad is not None
    assert q.log_sigma.grad is not None
    if any(parameter.requires_grad for parameter in model.inference.parameters()):
        _learn_inference(model, rows, flow, reading, (q.mu.grad, q.log_sigma.grad), terms)
    return ElboTerms(terms.log_likelihood.detach(), terms.kl.detach())


def _learn_inference(model: FilterModel, rows: _Rows, flow: Flow, reading: Context, last: tuple[Tensor, Tensor], terms: ElboTerms) -> None:
    """φ's gradient from one call of f on every step of every frame, with the matrix products of the chain.

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
    with Give(_in_order(each, "product.")):
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
    if core is None:
        whole, q, state = _chain_of_z(model, chunk, state)
    else:
        before = {name: rows.flat(value) for name, value in core[0].items()}
        whole, q, z = _foreseen_chain(model, chunk, rows, before, state["z"])
        state = {**core[1], "z": z}
    terms = elbo(Frame(model.generative, whole), (q,), rows.x, rows.mask, (rows.noise,))
    (-(rows.weights * terms.annealed(kl_weight)).sum()).backward()
    return _seen(rows.shaped(terms.elbo.detach()).unsqueeze(-1), rows, terms, state)


def _chain_of_z(model: FilterModel, chunk: Chunk, state: FilterState) -> tuple[Prediction, DiagonalGaussian, FilterState]:
    """The predictions and answers of a chunk's frames, (B · T, …), and the state after it."""
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


def _foreseen_chain(
    model: FilterModel, chunk: Chunk, rows: _Rows, before: FilterState, z: Tensor
) -> tuple[Prediction, DiagonalGaussian, Tensor]:
    """The same where x alone decides what the filter reads of the past, and `before`: only prior and z go frame by frame. Gives the
    last z."""
    generative, inference = model.generative, model.inference
    context = generative.context(before)
    reading = inference.context(generative.standardise(rows.x), rows.mask, generative.summary(context))
    states, contexts, readings = (rows.by_frame(values) for values in (before, context, reading))
    priors: list[DiagonalGaussian] = []
    answers: list[DiagonalGaussian] = []
    for t, (mask, noise) in enumerate(zip(chunk.mask.unbind(1), chunk.noise[:, -1].unbind(0), strict=True)):
        prior = generative.prior({**states[t], "z": z}, contexts[t])
        q = init(Frame(generative, Prediction(prior, contexts[t])), inference, readings[t], mask).q[0]
        z = q.rsample(noise)[:, 0]
        priors.append(prior)
        answers.append(q)
    return Prediction(_gathered(priors), context), _gathered(answers), z


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
        return value.unflatten(0, self._shape)


def _seen(trace: Tensor, rows: _Rows, terms: ElboTerms, state: FilterState) -> ChunkSeen:
    return ChunkSeen(
        trace,
        rows.shaped(terms.log_likelihood.detach()),
        rows.shaped(terms.kl.sum(-1).detach()),
        {name: value.detach() for name, value in state.items()},
    )
