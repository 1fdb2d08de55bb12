"""The two training updates as one would write them by hand in eager PyTorch: what `training/` has to beat.

A loop over steps (and frames) with `torch.autograd.grad` for each ∇λ L, torch's own fused functions (elu, layer norm,
cross-entropy, no masks, no guards), and no compiler. Written with care: each ∇λ L and the loss at the same λ share one
decoder pass, φ's and θ's gradients are taken once at the end of the update, and only for the parameters asked for.

Shapes: B rows, S samples, T frames, D latent size, X size of x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from models.catalogue import FilterModel, LatentModel
from models.generative.cells import LSTMCell
from models.generative.srnn import SRNN
from models.generative.vae import VAE
from models.inference.iterative import IterativeInference
from models.layers import MLP

LIMIT = 8.0


def plain_static_update(model: LatentModel, x: Tensor, noise: Sequence[Tensor]) -> Tensor:
    """Puts the gradients of one iterative update on the parameters; the ELBO after 0 … K steps, (B, K + 1).

    Args:
        x: (B, X), complete. noise: K + 1 times (B, S, D).
    """
    generative, refiner = model.generative, model.inference
    assert isinstance(generative, VAE)
    assert isinstance(refiner, IterativeInference)
    assert refiner.embed_x is not None
    logits_head = generative.heads["logits"]

    def elbo(mu: Tensor, log_sigma: Tensor, epsilon: Tensor) -> Tensor:
        rows, samples, size = epsilon.shape
        z = (mu.unsqueeze(1) + log_sigma.exp().unsqueeze(1) * epsilon).reshape(rows * samples, size)
        logits = logits_head(_mlp(generative.decoder, z)).to(mu.dtype).reshape(rows, samples, -1)
        return _log_likelihood(logits, x) - (0.5 * torch.expm1(2 * log_sigma) - log_sigma + 0.5 * mu.square()).sum(-1)

    embedding = refiner.embed_x(x - 0.5)
    mu, log_sigma = (x.new_zeros(len(x), generative.latent_sizes[0]).requires_grad_() for _ in range(2))
    value = elbo(mu, log_sigma, noise[0])
    trace = [value]
    for epsilon in noise[1:]:
        gradient = torch.autograd.grad(value.sum(), (mu, log_sigma), retain_graph=True)
        mu, log_sigma = _refine(refiner, embedding, mu.detach(), log_sigma.detach(), gradient)
        value = elbo(mu, log_sigma, epsilon)
        trace.append(value)
    _gradients(model, -torch.stack(trace[1:]).sum() / (len(noise) - 1), -value.sum())
    return torch.stack(trace, -1).detach()


def plain_sequence_update(model: FilterModel, x: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
    """The same for a chunk of frames of an SRNN from its learned beginning; (B, T, K + 1).

    Args:
        x: (B, T, X), complete. weights: (B, T). noise: (T, K + 1, B, S, D).
    """
    generative, refiner = model.generative, model.inference
    assert isinstance(generative, SRNN)
    assert isinstance(generative.cell, LSTMCell)
    assert isinstance(refiner, IterativeInference)
    assert refiner.embed_x is not None
    output, logits_head = generative.output, generative.output.heads["logits"]

    def elbo(q: tuple[Tensor, Tensor], prior: tuple[Tensor, Tensor], past: Tensor, x: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        rows, samples, size = epsilon.shape
        z = q[0].unsqueeze(1) + q[1].exp().unsqueeze(1) * epsilon
        a = output.embed_z(z.reshape(rows * samples, size)).reshape(rows, samples, -1) + past.unsqueeze(1)
        logits = logits_head(_mlp(output.body, functional.elu(a).reshape(rows * samples, -1)))
        logits = logits.to(z.dtype).reshape(rows, samples, -1)
        d = q[1] - prior[1]
        kl = (0.5 * torch.expm1(2 * d) - d + 0.5 * ((q[0] - prior[0]) * torch.exp(-prior[1])).square()).sum(-1)
        return _log_likelihood(logits, x) - kl, z[:, 0]

    h, c, z = (value.expand(len(x), -1) for value in (generative.first["h"], generative.first["c"], generative.first_z))
    refined, last, traces = [], [], []
    for t in range(x.shape[1]):
        mean, raw = generative.prior_head(_mlp(generative.prior_body, torch.cat([h, z], -1))).to(z.dtype).chunk(2, -1)
        prior, past = (mean, _bounded(raw)), output.embed_past(h)
        seen = x[:, t] - generative.x_mean
        embedding = refiner.embed_x(seen - 0.5)
        held, held_past = (prior[0].detach(), prior[1].detach()), past.detach()
        mu, log_sigma = (part.clone().requires_grad_() for part in held)
        value, _ = elbo((mu, log_sigma), held, held_past, x[:, t], noise[t, 0])
        trace = [value]
        for k, epsilon in enumerate(noise[t, 1:]):
            gradient = torch.autograd.grad(value.sum(), (mu, log_sigma), retain_graph=True)
            mu, log_sigma = _refine(refiner, embedding, mu.detach(), log_sigma.detach(), gradient)
            # the last one teaches θ too
            theta = k == len(noise[t]) - 2
            value, drawn = elbo((mu, log_sigma), prior if theta else held, past if theta else held_past, x[:, t], epsilon)
            trace.append(value)
        refined.append((weights[:, t] * torch.stack(trace[1:])).sum())
        last.append((weights[:, t] * value).sum())
        traces.append(torch.stack(trace, -1).detach())
        z = drawn.detach()
        gates = generative.cell.input(seen) + generative.cell.recurrent(h)
        i, f, o, g = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    _gradients(model, -torch.stack(refined).sum() / (noise.shape[1] - 1), -torch.stack(last).sum())
    return torch.stack(traces, 1)


def _gradients(model: LatentModel | FilterModel, phi_loss: Tensor, theta_loss: Tensor) -> None:
    for part, loss, keep in ((model.inference, phi_loss, True), (model.generative, theta_loss, False)):
        parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True), strict=True
        ):
            parameter.grad = gradient


def _refine(
    refiner: IterativeInference, embedding: Tensor, mu: Tensor, log_sigma: Tensor, gradient: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    encodings = {
        "q": lambda: [mu, log_sigma],
        "q_layer_norm": lambda: [_normed(mu), _normed(log_sigma)],
        "grad_layer_norm": lambda: [_normed(part) for part in gradient],
        "grad_log_sign": lambda: [torch.sign(part) * torch.log1p(part.abs() / 0.1) for part in gradient],
    }
    features = torch.cat([part for name in refiner.encodings if name != "x" for part in encodings[name]()], -1)
    h = _mlp(refiner.body, functional.elu(refiner.embed(features) + embedding))
    f_mu, f_log_sigma, a_mu, a_log_sigma = refiner.heads(h).to(mu.dtype).chunk(4, -1)
    return torch.lerp(f_mu, mu, torch.sigmoid(a_mu)), torch.lerp(_bounded(f_log_sigma), log_sigma, torch.sigmoid(a_log_sigma))


def _mlp(mlp: MLP, h: Tensor) -> Tensor:
    for i, layer in enumerate(mlp.layers):
        new = functional.elu(layer(h))
        h = torch.lerp(h, new, torch.sigmoid(mlp.gates[str(i)](h))) if str(i) in mlp.gates else new
    return h


def _log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    target = x.unsqueeze(1).expand_as(logits)
    return -functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1).mean(-1)


def _bounded(raw: Tensor) -> Tensor:
    return LIMIT * torch.tanh(raw / LIMIT)


def _normed(a: Tensor) -> Tensor:
    return functional.layer_norm(a, a.shape[-1:])
