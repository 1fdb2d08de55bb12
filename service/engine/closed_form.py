"""An engine that needs no training: a conjugate Gaussian whose posterior, ELBO and log p(x) are exact.

    z ~ N(0, I),   x_d | z ~ N(a z_d, σ²) for d < D,   x_d ~ N(0, σ²) for the other entries of x.

Given an observed x_d the posterior of z_d is N(a x_d / (σ² p), 1 / p) with precision p = 1 + a² / σ²; of an unobserved one
it is the prior. It factorises over d, so a diagonal q reaches it and the ELBO then equals log p(x). `step` moves λ a fixed
fraction of the way to the exact posterior, along which the ELBO, concave in μ and in log σ, never falls.

It stands in for a trained model in tests, demonstrations and load runs, through the same programs and card as any other.

Shapes: R rows, S samples, D latent size, X size of x (D ≤ X). Everything in nats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays, Card, Curve, LevelSpec, LikelihoodSpec, ProgramSpec, Quantiles, TensorSpec, XSpec
from service.engine.base import HostRows

Floats = NDArray[Any]

_LOG_2PI = float(np.log(2 * np.pi))
_PROBABILITIES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class ClosedFormEngine(HostRows):
    """See the module. All arguments are keywords.

    Args:
        name, version: how the card calls it.
        x_size, latent: X and D.
        scale, noise: a and σ.
        rate: fraction of the way to the exact posterior that one step covers.
        jitter: how far the refining noise throws μ about, as the noise of a sampled gradient would; 0 = exact steps.
        trained_steps, max_steps: what the card states.
        direct: no `step`; `init` gives the exact posterior at once.
        delay: seconds that program `name` on so many rows × samples should take, to stand in for a larger model.
        sleep: what spends them.
        fail_on: raise when this says so of a program and its inputs.
    """

    def __init__(
        self,
        *,
        name: str = "closed-form",
        version: str = "1",
        x_size: int = 8,
        latent: int = 4,
        scale: float = 1.0,
        noise: float = 0.5,
        rate: float = 0.5,
        jitter: float = 0.0,
        trained_steps: int = 5,
        max_steps: int = 128,
        direct: bool = False,
        delay: Callable[[str, int], float] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        fail_on: Callable[[str, Mapping[str, NDArray[Any]]], bool] | None = None,
    ):
        if not 0 < latent <= x_size:
            raise ValueError(f"latent: must be between 1 and x_size = {x_size}, got {latent}")
        self.name = "closed_form"
        self._latent, self._scale, self._variance, self._rate, self._jitter = latent, scale, noise**2, rate, jitter
        self._direct, self._delay, self._sleep, self._fail_on = direct, delay, sleep, fail_on
        self._programs: dict[str, Callable[..., Arrays]] = {
            "init": self._init,
            "step": self._step,
            "score": self._score,
            "decode": self._decode,
            "posterior_sample": self._posterior_sample,
            "prior_sample": self._prior_sample,
            "sample_x": self._sample_x,
        }
        if direct:
            del self._programs["step"]
            trained_steps = max_steps = 0
        self.card = self._describe(name, version, x_size, trained_steps, max_steps)

    def run(self, program: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        """Runs `program` in numpy.

        Raises:
            KeyError: no such program.
            RuntimeError: `fail_on` said so.
        """
        if self._fail_on is not None and self._fail_on(program, arrays):
            raise RuntimeError(f"{program} failed, as it was told to")
        inputs = [arrays[tensor.name] for tensor in self.card.programs[program].inputs]
        if self._delay is not None:
            samples = next((value.shape[1] for name, value in arrays.items() if name.startswith(("noise", "z"))), 1)
            self._sleep(self._delay(program, len(inputs[0]) * (1 if program in ("init", "step") else samples)))
        with np.errstate(over="ignore", invalid="ignore"):  # rows that overflow are reported as such, by `step`
            return self._programs[program](*inputs)

    def log_px(self, x: NDArray[Any], mask: NDArray[Any]) -> NDArray[np.float64]:
        """Exact log p of the observed entries of x (R, X): (R,)."""
        variance = np.full(x.shape[1], self._variance)
        variance[: self._latent] += self._scale**2
        terms = -0.5 * (_LOG_2PI + np.log(variance) + np.asarray(x, np.float64) ** 2 / variance)
        return np.sum(terms * mask, axis=1)

    def elbo(self, x: NDArray[Any], mask: NDArray[Any], mu: NDArray[Any], log_sigma: NDArray[Any]) -> NDArray[np.float64]:
        """Exact ELBO of q = N(mu, exp(log_sigma)²), both (R, D): (R,)."""
        latent, x, mu, log_sigma = self._latent, np.asarray(x, np.float64), np.asarray(mu, np.float64), np.asarray(log_sigma, np.float64)
        second_moment = x**2
        second_moment[:, :latent] = (x[:, :latent] - self._scale * mu) ** 2 + self._scale**2 * np.exp(2 * log_sigma)
        log_likelihood = -0.5 * np.sum(mask * (_LOG_2PI + np.log(self._variance) + second_moment / self._variance), axis=1)
        return log_likelihood - _kl(mu, log_sigma)

    def _init(self, x: Floats, mask: Floats) -> Arrays:
        latent = self._latent
        precision = 1 + mask[:, :latent] * np.float32(self._scale**2 / self._variance)
        exact_mu = mask[:, :latent] * x[:, :latent] * np.float32(self._scale / self._variance) / precision
        exact_log_sigma = -0.5 * np.log(precision)
        mu, log_sigma = (exact_mu, exact_log_sigma) if self._direct else (np.zeros_like(exact_mu), np.zeros_like(exact_mu))
        return {"q0.mu": mu, "q0.log_sigma": log_sigma, "exact.mu": exact_mu, "exact.log_sigma": exact_log_sigma}

    def _step(self, exact_mu: Floats, exact_log_sigma: Floats, mu: Floats, log_sigma: Floats, noise0: Floats) -> Arrays:
        rate = np.float32(self._rate)
        # The gradient of the ELBO, with p the exact posterior's precision: p (μ* − μ) and 1 − p σ².
        precision = np.exp(-2 * exact_log_sigma)
        gradient = np.concatenate([precision * (exact_mu - mu), 1 - precision * np.exp(2 * log_sigma)], axis=1)
        thrown = np.float32(self._jitter) * noise0[:, 0]  # one sample of the pair: the mean of (ε, −ε) would cancel
        new_mu, new_log_sigma = mu + rate * (exact_mu - mu) + thrown, log_sigma + rate * (exact_log_sigma - log_sigma)
        norm = np.sqrt(np.sum(gradient**2, axis=1))
        norm = np.where(np.all(np.isfinite(new_mu) & np.isfinite(new_log_sigma), axis=1), norm, np.float32(np.inf))
        finite = np.isfinite(norm)[:, None]
        return {"q0.mu": np.where(finite, new_mu, mu), "q0.log_sigma": np.where(finite, new_log_sigma, log_sigma), "grad_norm": norm}

    def _score(self, x: Floats, mask: Floats, mu: Floats, log_sigma: Floats, noise0: Floats) -> Arrays:
        z = mu[:, None] + np.exp(log_sigma)[:, None] * noise0
        error = x[:, None] - self._mean(z, x.shape[1])
        log_likelihood = -0.5 * np.sum(mask[:, None] * (_LOG_2PI + np.log(self._variance) + error**2 / self._variance), axis=2)
        log_prior = -0.5 * np.sum(_LOG_2PI + z**2, axis=2)
        log_q = -0.5 * np.sum(_LOG_2PI + 2 * log_sigma[:, None] + noise0**2, axis=2)
        return {
            "log_likelihood": log_likelihood.astype(np.float32),
            "kl": _kl(mu, log_sigma)[:, None].astype(np.float32),
            "log_weight": (log_likelihood + log_prior - log_q).astype(np.float32),
        }

    def _decode(self, z0: Floats) -> Arrays:
        mean = self._mean(z0, self.card.x.size)
        return {"mu": mean, "log_sigma": np.full_like(mean, 0.5 * np.log(self._variance)), "mean": mean.copy()}

    def _posterior_sample(self, mu: Floats, log_sigma: Floats, noise0: Floats) -> Arrays:
        return {"z0": mu[:, None] + np.exp(log_sigma)[:, None] * noise0}

    def _prior_sample(self, noise0: Floats) -> Arrays:
        return {"z0": noise0.copy()}

    def _sample_x(self, mu: Floats, log_sigma: Floats, noise_x: Floats) -> Arrays:
        return {"x": mu + np.exp(log_sigma) * noise_x}

    def _mean(self, z: Floats, x_size: int) -> Floats:
        """E[x|z]: (R, S, D) -> (R, S, X)."""
        mean = np.zeros((*z.shape[:2], x_size), z.dtype)
        mean[:, :, : self._latent] = np.float32(self._scale) * z
        return mean

    def _describe(self, name: str, version: str, x_size: int, trained_steps: int, max_steps: int) -> Card:
        latent = self._latent
        x, mask = _tensors(("x", x_size), ("mask", x_size))
        carry = _tensors(("q0.mu", latent), ("q0.log_sigma", latent))
        context = _tensors(("exact.mu", latent), ("exact.log_sigma", latent))
        noise0, z0 = _sampled("noise0", latent), _sampled("z0", latent)
        parameters = (_sampled("mu", x_size), _sampled("log_sigma", x_size))
        scores = (_per_row("log_likelihood", "samples"), _per_row("kl", 1), _per_row("log_weight", "samples"))
        programs = {
            "init": ProgramSpec(inputs=(x, mask), outputs=(*carry, *context)),
            "step": ProgramSpec(inputs=(*context, *carry, noise0), outputs=(*carry, _per_row("grad_norm"))),
            "score": ProgramSpec(inputs=(x, mask, *carry, noise0), outputs=scores),
            "decode": ProgramSpec(inputs=(z0,), outputs=(*parameters, _sampled("mean", x_size))),
            "posterior_sample": ProgramSpec(inputs=(*carry, noise0), outputs=(z0,)),
            "prior_sample": ProgramSpec(inputs=(noise0,), outputs=(z0,)),
            "sample_x": ProgramSpec(inputs=(*parameters, _sampled("noise_x", x_size)), outputs=(_sampled("x", x_size),)),
        }
        curve, quantiles = self._theory(x_size, max_steps)
        return Card(
            name=name,
            version=version,
            family="static",
            description="Conjugate Gaussian with an exact posterior: a stand-in for a trained model.",
            x=XSpec(shape=(x_size,), description="real numbers"),
            likelihood=LikelihoodSpec(name="gaussian", parameters=("mu", "log_sigma")),
            levels=(LevelSpec(name="z0", size=latent, parameters={"mu": "q0.mu", "log_sigma": "q0.log_sigma"}),),
            carry=carry,
            context=context,
            encoding=("exact",),
            trained_steps=trained_steps,
            max_steps=max_steps,
            samples=2,
            antithetic=True,
            programs={program: programs[program] for program in self._programs},
            curve=curve,
            quantiles=quantiles,
        )

    def _theory(self, x_size: int, max_steps: int) -> tuple[Curve, Quantiles]:
        """Curve and quantiles of the ELBO over x drawn from the model itself, by the closed form on 2,000 fixed rows."""
        rows = np.random.default_rng(0).standard_normal((2000, x_size))
        rows *= np.sqrt(self._variance)
        rows[:, : self._latent] += self._scale * np.random.default_rng(1).standard_normal((2000, self._latent))
        mask = np.ones_like(rows)
        start = self._init(rows.astype(np.float32), mask.astype(np.float32))
        steps = tuple(k for k in (0, 1, 2, 3, 4, 5, 8, 16, 32, 64, 128) if k <= max_steps)
        elbos = []
        for k in steps:
            # After k steps a fraction (1 − rate)^k of the way is left.
            left = (1 - self._rate) ** k
            mu, log_sigma = (start[f"exact.{part}"] + left * (start[f"q0.{part}"] - start[f"exact.{part}"]) for part in ("mu", "log_sigma"))
            elbos.append(self.elbo(rows, mask, mu, log_sigma))
        curve = Curve(
            steps=steps,
            elbo=tuple(float(e.mean()) for e in elbos),
            elbo_std=tuple(float(e.std()) for e in elbos),
            rows=len(rows),
            samples=1,
        )
        levels = tuple(tuple(float(value) for value in np.quantile(e, _PROBABILITIES)) for e in elbos)
        return curve, Quantiles(probabilities=_PROBABILITIES, steps=steps, elbo=levels)


def _kl(mu: NDArray[Any], log_sigma: NDArray[Any]) -> NDArray[Any]:
    """KL(N(mu, exp(log_sigma)²) ‖ N(0, I)), summed over D: ½ Σ (μ² + (σ² − 1) − 2 log σ)."""
    return 0.5 * np.sum(mu**2 + np.expm1(2 * log_sigma) - 2 * log_sigma, axis=1)


def _tensors(*named: tuple[str, int]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, shape=("rows", size)) for name, size in named)


def _sampled(name: str, size: int) -> TensorSpec:
    return TensorSpec(name=name, shape=("rows", "samples", size))


def _per_row(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, shape=("rows", *shape))
