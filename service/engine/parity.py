"""The proof, at load, that an engine computes what the trained model computed (architecture.md, section 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from models.artifact import Array, Arrays, Artifact, ArtifactError, PrecisionSpec, parity_error
from service.engine.base import Engine

FLOAT32_TOLERANCE = 1e-4
"""On |a − b| / max(1, |b|), for every element of every output."""
ROW_TOLERANCE = 1e-5
"""The same between a row in a batch and the row alone."""
ERRORS = 3
"""Standard errors of the mean over the reference rows that a further precision may cost beyond what its card says."""


class PrecisionRefused(ArtifactError):
    """The artifact cannot be served in this precision here; in float32 it may."""


def reduced_programs(engine: Engine) -> Mapping[str, Mapping[str, str]]:
    """The programs that the engine's precision replaces, and their files; none in float32.

    Raises:
        PrecisionRefused: the card does not offer it.
    """
    spec = _offered(engine)
    return {} if spec is None else spec.programs


def _offered(engine: Engine) -> PrecisionSpec | None:
    card = engine.card
    if engine.precision == "float32":
        return None
    spec = next((spec for name, spec in card.precisions.items() if name == engine.precision), None)
    if spec is None:
        raise PrecisionRefused(f"{card.name}/{card.version}: its card does not offer {engine.precision}")
    return spec


def verify_parity(engine: Engine, artifact: Artifact, tolerance: float = FLOAT32_TOLERANCE) -> dict[str, float]:
    """Runs every program on the artifact's reference inputs and compares with the float64 outputs stored beside them.

    Programs that a further precision replaces are not among them: they are held to `verify_precision`.

    Returns:
        The largest error of each program.

    Raises:
        ArtifactError: an output is off by more than `tolerance`, is missing, or a program has no reference.
    """
    reference = artifact.reference()
    errors: dict[str, float] = {}
    others = reduced_programs(engine)
    for program, spec in artifact.card.programs.items():
        if program in others:
            continue
        if program not in reference:
            raise ArtifactError(f"{artifact.path}: no reference outputs for program {program!r}: its parity cannot be checked")
        inputs, expected = reference[program]
        missing = [tensor.name for tensor in spec.inputs if tensor.name not in inputs]
        if missing:
            raise ArtifactError(f"{artifact.path}: the reference of program {program!r} lacks the input {missing[0]!r}")
        given = {tensor.name: inputs[tensor.name].astype(tensor.dtype, copy=False) for tensor in spec.inputs}
        measured = engine.run(program, given)
        worst = 0.0
        for tensor in spec.outputs:
            if tensor.name not in measured or tensor.name not in expected:
                raise ArtifactError(f"{artifact.path}: program {program!r}: no output {tensor.name!r} to compare")
            error = parity_error(measured[tensor.name], expected[tensor.name])
            if not error <= tolerance:
                raise ArtifactError(
                    f"{artifact.path}: engine {engine.name!r}, program {program!r}, output {tensor.name!r}: "
                    f"differs from the reference by {error:.2e}, more than {tolerance:.0e}"
                )
            worst = max(worst, error)
        errors[program] = worst
    return errors


def verify_precision(engine: Engine, artifact: Artifact) -> tuple[float, float]:
    """Refines the artifact's ELBO rows by the trained number of steps, and measures what that gives beside float64's ELBO.

    Returns:
        The nats lost, mean over the rows, and how many may be: the card's cost and ERRORS standard errors of so few rows.

    Raises:
        PrecisionRefused: more is lost, or a row in a batch differs from the row alone.
    """
    spec, what = _offered(engine), f"{artifact.path}: {engine.precision} on engine {engine.name!r}"
    assert spec is not None, "only a further precision has a cost"
    arrays, expected = artifact.elbo_reference()
    found, given = _elbo(engine, arrays)
    for program in spec.programs:
        together = engine.run(program, given)
        for row in range(len(expected)):
            alone = engine.run(program, {name: value[row : row + 1] for name, value in given.items()})
            worst = max(parity_error(alone[name], value[row : row + 1]) for name, value in together.items())
            if not worst <= ROW_TOLERANCE:
                raise PrecisionRefused(f"{what}: {program!r} of a row differs by {worst:.1e} when it shares a batch")
    lost, allowed = float(np.mean(expected - found)), spec.cost_nats + ERRORS * spec.cost_std / math.sqrt(len(expected))
    if not lost <= allowed:
        raise PrecisionRefused(f"{what}: loses {lost:.3f} nats on {len(expected)} reference rows, may lose {allowed:.3f}")
    return lost, allowed


def _elbo(engine: Engine, arrays: Arrays) -> tuple[Array, Arrays]:
    """Each row's ELBO after the trained steps, (R,); and the arrays that every program takes at that point."""
    levels = range(len(engine.card.levels))
    given = {"x": arrays["x"], "mask": np.ones_like(arrays["x"])}
    given |= engine.run("init", given)
    for step in range(engine.card.trained_steps):
        given |= {f"noise{level}": arrays[f"refine{level}"][step] for level in levels}
        given |= engine.run("step", given)
    scores = engine.run("score", given | {f"noise{level}": arrays[f"measure{level}"] for level in levels})
    log_likelihood, kl = (scores[name].astype(np.float64) for name in ("log_likelihood", "kl"))
    return log_likelihood.mean(axis=1) - kl.sum(axis=1), given
