"""The proof, at load, that an engine computes what the trained model computed (architecture.md, section 7)."""

from __future__ import annotations

from models.artifact import Artifact, ArtifactError, parity_error
from service.engine.base import Engine

FLOAT32_TOLERANCE = 1e-4
"""On |a − b| / max(1, |b|), for every element of every output."""


def verify_parity(engine: Engine, artifact: Artifact, tolerance: float = FLOAT32_TOLERANCE) -> dict[str, float]:
    """Runs every program on the artifact's reference inputs and compares with the float64 outputs stored beside them.

    Returns:
        The largest error of each program.

    Raises:
        ArtifactError: an output is off by more than `tolerance`, is missing, or a program has no reference.
    """
    reference = artifact.reference()
    errors: dict[str, float] = {}
    for program, spec in artifact.card.programs.items():
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
