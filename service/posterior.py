"""The posterior as clients see it, in both directions: columns of a JobResult to JSON, JSON back to carry arrays.

    {"step": 5, "levels": [{"mu": […], "log_sigma": […], "kl": 25.7}], "carry": "…"}

`mu` and `log_sigma` are float32 printed so that reading them back gives the same bits. `carry` is there whenever the
model keeps more than λ between steps, so that `refine` takes any reply's posterior as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays, Card, TensorSpec
from service.arrays import check_batch, read_vectors
from service.body import describe, whole
from service.carry import CarryError, pack, unpack
from service.errors import InvalidInput
from service.noise import MAX_STEP


def beyond_lambda(card: Card) -> tuple[TensorSpec, ...]:
    """The carry arrays that are not λ: what `carry` strings hold."""
    shown = {array for level in card.levels for array in level.parameters.values()}
    return tuple(tensor for tensor in card.carry if tensor.name not in shown)


def last_step(card: Card) -> int:
    """The largest step at which a posterior may stand, so that noise is left for as many steps as the model takes at once."""
    return MAX_STEP - card.max_steps


def write_posterior(card: Card, step: int, kl: NDArray[Any], carry: Arrays, sha256: str) -> dict[str, Any]:
    """The JSON object of one row.

    Args:
        kl: (levels,) nats.
        carry: name -> (...), without the row axis.
        sha256: of the artifact, to which the `carry` string is bound.
    """
    posterior: dict[str, Any] = {
        "step": step,
        "levels": [
            {**{shown: carry[array] for shown, array in level.parameters.items()}, "kl": nats}
            for level, nats in zip(card.levels, kl.tolist(), strict=True)
        ],
    }
    if kept := beyond_lambda(card):
        posterior["carry"] = pack({tensor.name: carry[tensor.name] for tensor in kept}, sha256)
    return posterior


def read_posteriors(
    value: Any, field: str, card: Card, sha256: str, max_rows: int, *, needs_carry: bool
) -> tuple[Arrays, NDArray[np.int64]]:
    """Carry arrays (R, ...) and the step (R,) at which each posterior stood.

    Args:
        needs_carry: the rows will be refined on, so a model that keeps more than λ needs its `carry` back. Otherwise those
            arrays are zero where no string came.

    Raises:
        InvalidInput: naming the entry and what is wrong with it.
    """
    check_batch(value, field, max_rows)
    paths = [f"{field}[{index}]" for index in range(len(value))]
    steps = np.asarray([_step(entry, path, card) for entry, path in zip(value, paths, strict=True)], np.int64)
    carry: Arrays = {}
    for number, level in enumerate(card.levels):
        for shown, array in level.parameters.items():
            carry[array] = read_vectors(
                [entry["levels"][number][shown] for entry in value],
                [f"{path}.levels[{number}].{shown}" for path in paths],
                level.size,
                f"{shown} of this model",
            )
    if kept := beyond_lambda(card):
        rows = [_carry(entry, path, kept, sha256, needs_carry) for entry, path in zip(value, paths, strict=True)]
        carry |= {tensor.name: np.stack([row[tensor.name] for row in rows]) for tensor in kept}
    return carry, steps


def _step(entry: Any, path: str, card: Card) -> int:
    """Checks the skeleton of one entry and returns its step."""
    _check_keys(entry, path, required={"step", "levels"}, optional={"carry"})
    step, levels, carry = whole(entry["step"]), entry["levels"], entry.get("carry")
    last = last_step(card)
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= last:
        raise InvalidInput.at(f"{path}.step", f"must be a whole number from 0 to {last}, not {describe(step)}")
    if carry is not None and not isinstance(carry, str):
        raise InvalidInput.at(f"{path}.carry", f"must be a string as a reply returned it, not {describe(carry)}")
    if not isinstance(levels, list) or len(levels) != len(card.levels):
        given = f"{len(levels)} entries" if isinstance(levels, list) else describe(levels)
        raise InvalidInput.at(f"{path}.levels", f"must be a list of {len(card.levels)}, one entry per level of this model, not {given}")
    for number, (level, spec) in enumerate(zip(levels, card.levels, strict=True)):
        _check_keys(level, f"{path}.levels[{number}]", required=set(spec.parameters), optional={"kl"})
        if not isinstance(kl := level.get("kl"), int | float | None) or isinstance(kl, bool):
            raise InvalidInput.at(f"{path}.levels[{number}].kl", f"must be a number or null, not {describe(kl)}")
    return step


def _check_keys(value: Any, path: str, required: set[str], optional: set[str]) -> None:
    if not isinstance(value, dict):
        raise InvalidInput.at(path, f"must be an object as a reply returned it, not {describe(value)}")
    for name in sorted(required - value.keys()):
        raise InvalidInput.at(f"{path}.{name}", "is required")
    for name in sorted(value.keys() - required - optional):
        raise InvalidInput.at(f"{path}.{name}", f"is not part of a posterior, which has {', '.join(sorted(required | optional))}")


def _carry(entry: dict[str, Any], path: str, kept: tuple[TensorSpec, ...], sha256: str, needed: bool) -> Arrays:
    text = entry.get("carry")
    if text is None:
        if needed:
            names = ", ".join(tensor.name for tensor in kept)
            message = f"is required: this model keeps {names} between steps; send back the whole posterior of a reply"
            raise InvalidInput.at(f"{path}.carry", message)
        return {tensor.name: np.zeros([int(size) for size in tensor.shape[1:]], tensor.dtype) for tensor in kept}
    try:
        return unpack(text, kept, sha256)
    except CarryError as exc:
        raise InvalidInput.at(f"{path}.carry", str(exc)) from exc
