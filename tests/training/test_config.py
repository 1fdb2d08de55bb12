"""Run configurations go through JSON and come back; rates and weights follow their schedules."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest

from training.config import OptimiserConfig, RunConfig
from training.runs import RUNS


@pytest.mark.parametrize("name", RUNS)
def test_every_run_survives_json_and_is_called_what_it_is(name: str) -> None:
    run = RUNS[name]()
    assert type(run).from_dict(json.loads(json.dumps(run.to_dict()))) == run
    assert run.name == name


def test_an_unknown_field_is_refused() -> None:
    values = RUNS["digits-tiny"]().to_dict()
    with pytest.raises(TypeError, match="learning_rat"):
        RunConfig.from_dict({**values, "optimiser": {"learning_rat": 1e-3}})


@pytest.mark.parametrize("pair", [("mnist-direct", "mnist-iterative"), ("mnist-direct-short", "mnist-iterative-short")])
def test_the_rivals_of_a_pair_differ_in_their_inference_model_only(pair: tuple[str, str]) -> None:
    direct, iterative = (RUNS[name]() for name in pair)
    assert direct.architecture.inference.kind == "direct"
    same = replace(direct, name=iterative.name, architecture=replace(direct.architecture, inference=iterative.architecture.inference))
    assert same == iterative


def test_the_exponential_rate_is_the_published_one() -> None:
    optimiser = OptimiserConfig()
    assert optimiser.rate(0, 1500) == 2e-4
    assert optimiser.rate(10, 1500) == pytest.approx(2e-4 * 0.999**10)


def test_the_cosine_rate_falls_from_its_start_to_zero_at_the_end() -> None:
    optimiser = OptimiserConfig(learning_rate=1e-3, decay="cosine")
    rates = [optimiser.rate(epoch, 100) for epoch in range(101)]
    assert rates[0] == 1e-3
    assert rates[50] == pytest.approx(5e-4)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in pairwise(rates))


def test_the_kl_weight_rises_linearly_to_one() -> None:
    run = replace(RUNS["digits-tiny"](), kl_warmup_epochs=4)
    assert [run.kl_weight(epoch) for epoch in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert replace(run, kl_warmup_epochs=0).kl_weight(0) == 1.0
    assert not math.isnan(run.kl_weight(0))


def test_a_run_saved_before_its_data_had_sizes_is_read_with_those_it_had() -> None:
    for name, fields in (("digits-tiny", ["shape"]), ("speech-own", ["frame_size", "steps_per_beat"])):
        run = RUNS[name]()
        values = json.loads(json.dumps(run.to_dict()))
        for field in fields:
            del values["data"][field]
        assert type(run).from_dict(values) == run
