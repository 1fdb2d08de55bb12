"""The trained model inside an artifact as eager PyTorch, and the plain way to take a step with it: the baseline to beat."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from models.architecture import Architecture
from models.artifact import WEIGHTS, Artifact
from models.catalogue import LatentModel, build
from models.gaussian import DiagonalGaussian, bound_log_sigma
from models.generative.vae import VAE
from models.inference.base import State
from models.inference.encodings import encode
from models.inference.iterative import IterativeInference
from models.objective import ElboTerms, Evidence


def eager_model(artifact: Artifact) -> LatentModel:
    """The model the artifact was exported from: architecture from the card's provenance, weights from its file."""
    model = build(Architecture.from_dict(artifact.card.provenance["run"]["architecture"]))
    model.load_state_dict(load_file(artifact.file(WEIGHTS)), strict=True)
    return model.eval().requires_grad_(False)


class PlainEager:
    """What one would write by hand for a Bernoulli VAE: `torch.autograd.grad` through the decoder, torch's own fused
    elu and cross-entropy, no `func.grad`, no custom functions, and none of the guards (masked or non-finite rows) that
    the served step has.

    Shapes: B rows, S samples, D latent size, X size of x.

    Raises:
        ValueError: the model is of another kind.
    """

    def __init__(self, model: LatentModel):
        generative = model.generative
        if not isinstance(generative, VAE) or tuple(generative.heads) != ("logits",):
            raise ValueError("generative: the plain baseline is written for the Bernoulli VAE")
        self.inference = model.inference
        self.decoder = [(layer.weight, layer.bias) for layer in (*generative.decoder.layers, generative.heads["logits"])]

    def gradient(self, mu: Tensor, log_sigma: Tensor, x: Tensor, mask: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """∇λ of the sum of the rows' ELBOs, (B, D) twice."""
        mu, log_sigma = mu.detach().requires_grad_(), log_sigma.detach().requires_grad_()
        rows, samples, size = noise.shape
        h = (mu.unsqueeze(1) + log_sigma.exp().unsqueeze(1) * noise).reshape(rows * samples, size)
        *hidden, last = self.decoder
        for weight, bias in hidden:
            h = functional.elu(functional.linear(h, weight, bias))
        logits = functional.linear(h, *last).reshape(rows, samples, -1)
        target, observed = x.unsqueeze(1).expand_as(logits), mask.unsqueeze(1).expand_as(logits)
        error = functional.binary_cross_entropy_with_logits(logits, target, observed, reduction="sum") / samples
        kl = (0.5 * torch.expm1(2 * log_sigma) - log_sigma + 0.5 * mu.square()).sum()
        return torch.autograd.grad(-(error + kl), (mu, log_sigma))

    def step(
        self, x: Tensor, mask: Tensor, embedding: Tensor, mu: Tensor, log_sigma: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One learned refinement: λ′ and the norm of ∇λ, as the served `step` gives them.

        Raises:
            ValueError: the refiner has gates, memory or no context.
        """
        refiner = self.inference
        if not isinstance(refiner, IterativeInference) or refiner.cell is not None or len(refiner.body.gates) or refiner.embed_x is None:
            raise ValueError("inference: the plain baseline is written for a refiner that reads x and keeps no memory")
        grad = self.gradient(mu, log_sigma, x, mask, noise)
        with torch.no_grad():
            none = ElboTerms(grad[0], grad[0])  # no encoding reads the objective's value
            evidence = Evidence((DiagonalGaussian(*grad),), None, None, none)
            features = encode(refiner.encodings, State((DiagonalGaussian(mu, log_sigma),)), evidence)
            h = functional.elu(functional.linear(features, refiner.embed.weight) + embedding)
            for layer in refiner.body.layers:
                h = functional.elu(layer(h))
            f_mu, f_log_sigma, a_mu, a_log_sigma = refiner.heads(h).chunk(4, -1)
            norm = torch.linalg.vector_norm(torch.cat(grad, -1), dim=-1)
            return (
                torch.lerp(f_mu, mu, torch.sigmoid(a_mu)),
                torch.lerp(bound_log_sigma(f_log_sigma), log_sigma, torch.sigmoid(a_log_sigma)),
                norm,
            )
