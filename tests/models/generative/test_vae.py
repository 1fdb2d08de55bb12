"""The contract of every generative model in the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.testing import assert_close

from models.architecture import Architecture, IterativeArchitecture, VAEArchitecture
from models.catalogue import GENERATIVE, build
from models.generative.base import Generative
from models.likelihood import LIKELIHOODS

Draw = Callable[..., Tensor]
B, S, X, D = 4, 5, 12, 3

ARCHITECTURES = {"vae": VAEArchitecture(X, D, (16,))}
EVERY = pytest.mark.parametrize(("kind", "likelihood"), [(kind, name) for kind in ARCHITECTURES for name in LIKELIHOODS])


def generative(kind: str, likelihood: str, dtype: torch.dtype) -> Generative:
    architecture = Architecture(replace(ARCHITECTURES[kind], likelihood=likelihood), IterativeArchitecture(hidden=(8,)))
    return build(architecture, seed=0).generative.to(dtype)


def test_every_kind_of_the_catalogue_is_tested_here() -> None:
    assert set(ARCHITECTURES) == set(GENERATIVE)


@EVERY
def test_shapes_are_those_of_the_contract(kind: str, likelihood: str, normal: Draw, dtype: torch.dtype) -> None:
    model = generative(kind, likelihood, dtype)
    noise = tuple(normal(B, S, size) for size in model.latent_sizes)
    z = model.prior_sample(noise)
    q = model.prior_parameters(normal(B, X))
    assert [level.shape for level in z] == [(B, S, size) for size in model.latent_sizes]
    assert [level.mu.shape for level in q] == [(B, size) for size in model.latent_sizes]
    assert model(z).mean.shape == (B, S, X)
    assert model.kl(q, z).shape == (B, len(model.latent_sizes))
    assert model.log_prior(z).shape == (B, S)
    assert [error.shape for error in model.prior_errors(z)] == [(B, size) for size in model.latent_sizes]


@EVERY
def test_the_prior_as_a_posterior_has_no_kl(kind: str, likelihood: str, normal: Draw, dtype: torch.dtype) -> None:
    model = generative(kind, likelihood, dtype)
    q = model.prior_parameters(normal(B, X))
    z = tuple(level.rsample(normal(B, S, level.mu.shape[-1])) for level in q)
    assert torch.equal(model.kl(q, z), torch.zeros(B, len(q), dtype=dtype))


@EVERY
def test_prior_errors_are_minus_the_gradient_of_the_log_prior(kind: str, likelihood: str, normal: Draw, dtype: torch.dtype) -> None:
    model = generative(kind, likelihood, dtype)
    z = tuple(normal(B, S, size).requires_grad_() for size in model.latent_sizes)
    gradients = torch.autograd.grad(model.log_prior(z).sum(), z)
    assert_close(model.prior_errors(z), tuple(-g.mean(1) for g in gradients))


@EVERY
def test_gradients_reach_every_parameter(kind: str, likelihood: str, normal: Draw, binary: Draw, dtype: torch.dtype) -> None:
    model, x = generative(kind, likelihood, dtype), binary(B, X)
    model(tuple(normal(B, S, size) for size in model.latent_sizes)).log_prob(x, torch.ones_like(x)).sum().backward()
    assert all(bool((parameter.grad != 0).any()) for parameter in model.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_prior_of_the_vae_is_standard_normal(normal: Draw, dtype: torch.dtype) -> None:
    model, z = generative("vae", "bernoulli", dtype), normal(B, S, D)
    assert_close(model.log_prior((z,)), Normal(0.0, 1.0).log_prob(z).sum(-1))
    assert torch.equal(model.prior_sample((z,))[0], z)
