"""From the columns of a JobResult to the JSON of a reply, one entry per row. ELBOs and their parts are in nats per row."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.responses import Response

from models.artifact import Quantiles
from service.posterior import write_posterior
from service.repository import ServedModel
from service.scheduler.job import JobResult, StepEvent


def json_response(content: object) -> Response:
    return Response(dump(content), media_type="application/json")


def size(result: JobResult) -> int:
    """Bytes of the arrays that a reply may show: as JSON they are a few times as many."""
    arrays = [*result.carry.values(), *(result.z or {}).values(), *(array for array in (result.mean, result.x) if array is not None)]
    return sum(array.nbytes for array in arrays)


def dump(content: object) -> bytes:
    """JSON, numpy arrays included; a number that is not finite becomes null."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_reply(model: ServedModel, result: JobResult, seed: object, parts: Collection[str]) -> dict[str, Any]:
    results = _progress(result)
    steps = result.step.tolist()
    if "elbo" in parts:
        columns = zip(results, result.elbo.tolist(), result.log_likelihood.tolist(), result.kl.sum(axis=1).tolist(), strict=True)
        for entry, elbo, log_likelihood, kl in columns:
            entry |= {"elbo": elbo, "log_likelihood": log_likelihood, "kl": kl}
    for row, entry in enumerate(results):
        if "posterior" in parts or "carry" in parts:
            carry = {name: column[row] for name, column in result.carry.items()}
            entry["posterior"] = write_posterior(model.card, steps[row], result.kl[row], carry, model.sha256)
        if "trace" in parts and result.trace is not None:
            entry["trace"] = result.trace[row]
        if "reconstruction" in parts and result.mean is not None:
            entry["reconstruction"] = {"mean": _shaped(result.mean[row], model)}
        if "z" in parts and result.z is not None:
            entry["z"] = {level: samples[row] for level, samples in result.z.items()}
    return _reply(model, result, results, seed)


def reconstruct_reply(model: ServedModel, result: JobResult, seed: object) -> dict[str, Any]:
    results = _progress(result)
    for entry, drawn in zip(results, _drawn(model, result), strict=True):
        entry["reconstruction"] = drawn
    return _reply(model, result, results, seed)


def score_reply(model: ServedModel, result: JobResult, seed: object) -> dict[str, Any]:
    results = _progress(result)
    log_px = np.full(len(results), np.nan) if result.log_px is None else result.log_px
    quantiles = model.card.quantiles
    for row, entry in enumerate(results):
        elbo = float(result.elbo[row])
        entry |= {"log_px": float(log_px[row]), "elbo": elbo, "elbo_quantile": elbo_quantile(quantiles, entry["steps_used"], elbo)}
    return _reply(model, result, results, seed)


def generate_reply(model: ServedModel, result: JobResult, seed: object) -> dict[str, Any]:
    return _reply(model, result, _drawn(model, result), seed)


def step_event(model: ServedModel, event: StepEvent, parts: Collection[str]) -> dict[str, Any]:
    """The data of one `event: step`: this step's ELBO, and the best so far."""
    data: dict[str, Any] = {
        "row": event.row,
        "step": event.step,
        "elbo": event.elbo,
        "best_step": event.best_step,
        "best_elbo": event.best_elbo,
    }
    if "posterior" in parts:
        data["posterior"] = write_posterior(model.card, event.best_step, event.kl, event.carry, model.sha256)
    return data


def elbo_quantile(quantiles: Quantiles, steps: int, elbo: float) -> float | None:
    """Where `elbo` lies in the training distribution after the nearest number of steps, linear between the card's quantiles.

    Outside the stored quantiles it is the outermost stored probability; None where the card has none or the ELBO is not finite.
    """
    if not quantiles.steps or not np.isfinite(elbo):
        return None
    nearest = int(np.argmin(np.abs(np.asarray(quantiles.steps) - steps)))
    return float(np.interp(elbo, quantiles.elbo[nearest], quantiles.probabilities))


def _progress(result: JobResult) -> list[dict[str, Any]]:
    return [
        {"steps_used": used, "stop_reason": reason.value}
        for used, reason in zip(result.steps_used.tolist(), result.stop_reason, strict=True)
    ]


def _drawn(model: ServedModel, result: JobResult) -> list[dict[str, Any]]:
    """Per row the mean of p(x|z) and, if asked for, samples of x."""
    assert result.mean is not None, "the job asked for the mean"
    drawn = [{"mean": _shaped(mean, model)} for mean in result.mean]
    if result.x is not None and result.x.size:
        for entry, samples in zip(drawn, result.x, strict=True):
            entry["samples"] = np.ascontiguousarray(samples).reshape(-1, *model.card.x.shape)
    return drawn


def _shaped(mean: NDArray[Any], model: ServedModel) -> NDArray[Any]:
    return np.ascontiguousarray(mean).reshape(model.card.x.shape)


def _reply(model: ServedModel, result: JobResult, results: list[dict[str, Any]], seed: object) -> dict[str, Any]:
    timing = result.timing
    return {
        "model": model.name,
        "version": model.version,
        "precision": model.precision,
        "seed": seed,
        "results": results,
        "timing": {
            "queue_ms": round(timing.queue_ms, 4),
            "compute_ms": round(timing.compute_ms, 4),
            "predicted_ms": round(timing.predicted_ms, 4),
            "batch_rows": timing.batch_rows,
        },
    }
