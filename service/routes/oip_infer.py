"""POST /v2/models/{model}/infer: read, hand to the same schemas, jobs and lanes as the native calls, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from service.body import in_worker_if_large
from service.columns import Column, chosen, parts_of
from service.deps import Server, caller_of, key_id_of, server_of
from service.errors import InvalidInput
from service.inflate import IDENTITY, LEAST_BYTES, accepted_encoding, deflate
from service.oip.metadata import outputs_of
from service.oip.methods import spoken_as_tensors
from service.oip.requests import Asked, Received, ask, receive
from service.oip.sequences import Sequence as LiveSequence
from service.oip.sequences import SequenceId
from service.oip.statistics import Measured
from service.oip.wire import HEAD_LENGTH, write_inference
from service.repository import ServedModel
from service.routes.infer import ENDPOINTS
from service.scheduler.job import Job
from service.schemas import FilterBody, read_body_fields
from service.streams.stateless import FRESH, Frames, read_frames, snapshot_after
from service.submission import filter_alone, submit

CALLS = {endpoint.name: endpoint for endpoint in ENDPOINTS}
Outputs = tuple[dict[str, NDArray[Any]], dict[str, Any]]
"""The reply's tensors by name, and its parameters."""


async def infer(request: Request, model: ServedModel) -> Response:
    server = server_of(request)
    arrival = server.clock()
    server.scheduler.check_door(model.key)
    with server.statistics.measured(model.key) as measured:
        with server.statistics.timed(measured, "compute_input"):
            received = await receive(request, server.limits.max_body_bytes)
            asked = await in_worker_if_large(received.work, partial(ask, received, model.card, server.limits.max_body_bytes))
        if model.card.family == "filter":
            with server.account(caller_of(request)) as charge:
                outputs, parameters = await _filter(request, server, model, asked, received, measured, charge)
        else:
            outputs, parameters = await _static(request, server, model, asked, received, measured, arrival)
        with server.statistics.timed(measured, "compute_output"):
            size = sum(array.nbytes for array in outputs.values())
            encoding = accepted_encoding(request.headers.get("accept-encoding"))
            return await in_worker_if_large(size, partial(_respond, asked, model, parameters, outputs, encoding))


async def _static(
    request: Request, server: Server, model: ServedModel, asked: Asked, received: Received, measured: Measured, arrival: float
) -> Outputs:
    if asked.control.id is not None:
        raise InvalidInput.at("parameters.sequence_id", f"{model.name} is no filter: its rows are independent")
    call = CALLS[asked.method.name]
    columns = chosen(outputs_of(model, asked.method), asked.inference.outputs, "outputs")

    def prepare() -> tuple[Any, Job]:
        fields = asked.method.body(asked.inference.inputs, asked.parameters, model.card)
        if "parts" in call.body.model_fields:
            fields["return"] = parts_of(columns)
        with spoken_as_tensors(asked.parameters):
            body = read_body_fields(call.body, fields)
            return body, call.job(body, model, server.limits, arrival)

    with server.statistics.timed(measured, "compute_input"):
        body, job = await in_worker_if_large(received.work, prepare)
    result = await submit(request, server, model, job)
    timing = result.timing
    measured.queue, measured.compute_infer, measured.rows = timing.queue_ms / 1e3, timing.compute_ms / 1e3, timing.batch_rows
    parameters: dict[str, Any] = {"method": asked.method.name, "precision": model.precision}
    if isinstance(body.seed, int):
        parameters["seed"] = body.seed
    parameters |= {name: round(getattr(timing, name), 4) for name in ("queue_ms", "compute_ms", "predicted_ms", "batch_rows")}
    with server.statistics.timed(measured, "compute_output"):
        outputs = _shaped(columns, asked, model, result)
    server.scheduler.replied(job, result)
    return outputs, parameters


async def _filter(
    request: Request,
    server: Server,
    model: ServedModel,
    asked: Asked,
    received: Received,
    measured: Measured,
    charge: Callable[[float], None],
) -> Outputs:
    key_id, control = key_id_of(request), asked.control
    columns = chosen(outputs_of(model, asked.method), asked.inference.outputs, "outputs")
    name = None
    sequence: LiveSequence | None = None
    if control.id is not None:
        name = SequenceId(key_id, model.name, request.path_params.get("version"), control.id)
        if not control.start:
            sequence = server.sequences.find(name)
            model = sequence.model

    def prepare() -> tuple[ServedModel, FilterBody, Frames]:
        fields = asked.method.body(asked.inference.inputs, asked.parameters, model.card) | {"return": parts_of(columns)}
        with spoken_as_tensors(asked.parameters):
            body = read_body_fields(FilterBody, fields)
            chosen = model if "version" in request.path_params or sequence is not None else server.issuer(model, body.state)
            return chosen, body, read_frames(body, chosen, server.tokens, key_id, server.limits.max_rows)

    with server.statistics.timed(measured, "compute_input"):
        model, body, frames = await in_worker_if_large(received.work, prepare)
    charge(len(frames.x) * (1 + frames.settings["steps"]))
    began = server.clock()
    if name is None:
        portion = await filter_alone(request, server, server.scheduler.stream_lane(model.key), frames)
        after = snapshot_after(portion, frames.settings, frames.snapshot.summary if frames.snapshot else FRESH)
    else:
        if control.start:
            sequence = server.sequences.start(name, model, server.scheduler.stream_lane(model.key), frames)
        else:
            # again: it may have ended while a large body was read
            if server.sequences.find(name) is not sequence:
                message = f"sequence {name} was begun anew while this request was read: its frames belong to the one before"
                raise InvalidInput.at("parameters.sequence_id", message)
            assert sequence is not None
            server.sequences.check_kept(sequence, body)
        portion, after = await server.sequences.filter(sequence, frames, last=control.end)
    measured.compute_infer, measured.rows = server.clock() - began, len(frames.x)
    with server.statistics.timed(measured, "compute_output"):
        parameters = {
            "method": asked.method.name,
            "seed": after.settings["seed"],
            "frame": after.frame,
            "state": server.tokens.issue(after, model.sha256, key_id),
        }
        if control.id is not None:
            parameters["sequence_id"] = control.id
        results = server.shaper(model).results(portion, portion.stream.spec)
        return _shaped(columns, asked, model, results), parameters


def _shaped(columns: Sequence[Column], asked: Asked, model: ServedModel, result: Any) -> dict[str, NDArray[Any]]:
    """The columns' arrays; what was not named and has no element is left out (samples, where none were drawn)."""
    arrays = {column.name: column.value(model, result) for column in columns}
    return arrays if asked.inference.outputs else {name: array for name, array in arrays.items() if array.size}


def _respond(asked: Asked, model: ServedModel, parameters: Mapping[str, Any], outputs: dict[str, NDArray[Any]], encoding: str) -> Response:
    body, head_length = write_inference(asked.inference, (model.name, model.version), dict(parameters), outputs)
    headers = {} if head_length is None else {HEAD_LENGTH: str(head_length)}
    if encoding != IDENTITY and len(body) >= LEAST_BYTES:
        body, headers["Content-Encoding"] = deflate(body, encoding), encoding
    return Response(body, headers=headers, media_type="application/json" if head_length is None else "application/octet-stream")
