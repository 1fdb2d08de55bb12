"""Architectures go through JSON and come back, the same seed gives the same weights, and unknown names are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from models.architecture import (
    Architecture,
    DirectArchitecture,
    FilterArchitecture,
    InferenceArchitecture,
    IterativeArchitecture,
    OptimiserArchitecture,
    VAEArchitecture,
    VRNNArchitecture,
)
from models.catalogue import build, build_filter, infer_with

SMALL = Architecture(VAEArchitecture(6, 2, (8,)), IterativeArchitecture(hidden=(8,)))


@pytest.mark.parametrize(
    "inference",
    [
        DirectArchitecture(hidden=(4, 5), encode_mask=True),
        IterativeArchitecture(("q", "x"), recurrent=True),
        OptimiserArchitecture("momentum"),
    ],
)
def test_an_architecture_survives_json(inference: InferenceArchitecture) -> None:
    architecture = Architecture(VAEArchitecture(6, 2, (8, 9)), inference)
    assert Architecture.from_dict(json.loads(json.dumps(architecture.to_dict()))) == architecture


def test_an_unknown_kind_in_a_file_is_refused() -> None:
    values = SMALL.to_dict()
    values["inference"]["kind"] = "oracle"
    with pytest.raises(ValueError, match="'oracle' is unknown: one of vae"):
        Architecture.from_dict(values)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, other = build(SMALL, seed=1), build(SMALL, seed=1), build(SMALL, seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(next(a.parameters()), next(other.parameters()))


def test_an_unknown_likelihood_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="likelihood: 'poisson' is unknown: one of bernoulli"):
        build(replace(SMALL, generative=VAEArchitecture(likelihood="poisson")))


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="kind: 'flow' is unknown: one of vae"):
        build(replace(SMALL, generative=replace(SMALL.generative, kind="flow")))
    with pytest.raises(ValueError, match="kind: 'lbfgs' is unknown: one of direct"):
        infer_with(build(SMALL).generative, OptimiserArchitecture(kind="lbfgs"))  # type: ignore[arg-type]


@pytest.mark.parametrize("encodings", [("x", "hessian"), ("hessian",)])
def test_an_unknown_encoding_is_refused_by_name(encodings: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="encodings: 'hessian' is unknown: one of x, past, grad_raw"):
        build(replace(SMALL, inference=IterativeArchitecture(encodings)))


@pytest.mark.parametrize("encodings", [("x",), ()])
def test_encodings_that_say_nothing_about_lambda_are_refused(encodings: tuple[str, ...]) -> None:
    """The network would be applied again and again to the same input; before, it failed at the first step."""
    with pytest.raises(ValueError, match="say nothing about λ"):
        build(replace(SMALL, inference=IterativeArchitecture(encodings)))


def test_only_a_filter_has_a_past_to_read() -> None:
    with pytest.raises(ValueError, match="encodings: only a filter's refiner can read the past"):
        build(replace(SMALL, inference=IterativeArchitecture(("x", "past", "q"))))


def test_a_refiner_that_reads_the_past_needs_one() -> None:
    model = build_filter(FilterArchitecture(VRNNArchitecture(5, 2, 4), IterativeArchitecture(("past", "q"), (6,))), seed=0)
    x = torch.zeros(2, 5)
    assert model.inference.context(x, x, torch.ones(2, 4))["x_embedding"].shape == (2, 6)
    with pytest.raises(ValueError, match="past: this refiner needs"):
        model.inference.context(x, x)
