"""Native calls whose rows or replies are arrays (service/tensor_bodies.py): the same bodies, jobs and refusals as in JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from service.body import check_announced, in_worker_if_large, parse_object, read_body, read_bytes
from service.columns import parts_of
from service.deps import server_of, static_model_of
from service.errors import InvalidInput
from service.inflate import IDENTITY, check_encoding, inflate
from service.scheduler.job import Job
from service.schemas import read_body_fields
from service.submission import submit
from service.tensor_bodies import NPY, RAW, array_response, fields_of, rows_of, wanted_columns, wanted_media

if TYPE_CHECKING:
    from service.routes.infer import Endpoint


def speaks_arrays(request: Request) -> bool:
    """Whether the rows come as bytes, or the reply is wanted as arrays."""
    return _media(request) in (RAW, NPY) or wanted_media(request.headers.get("accept", "")) is not None


async def array_call(endpoint: Endpoint, request: Request) -> Response:
    server = server_of(request)
    arrival = server.clock()
    model = static_model_of(request, endpoint.name)
    server.scheduler.check_door(model.key)
    media, wanted, limit = _media(request), wanted_media(request.headers.get("accept", "")), server.limits.max_body_bytes
    has_rows = media in (RAW, NPY)
    encoding = IDENTITY
    if has_rows:
        encoding = check_encoding(request.headers.get("content-encoding"))
        check_announced(request, limit)
        raw = await read_bytes(request, limit)
    else:
        raw = await read_body(request, limit)
    query = fields_of(request.query_params, endpoint.body)
    names = query.pop("columns", None)
    if query and not has_rows:
        raise InvalidInput.at(next(iter(query)), "is in the query: beside a JSON body only columns belongs there")
    columns = None if wanted is None else wanted_columns(wanted, endpoint.name, model.card, None if names is None else str(names))
    if columns is None and names is not None:
        raise InvalidInput.at("columns", "is for replies that are arrays: accept one, or use return")

    def prepare() -> tuple[Any, Job]:
        given = query | {"inputs": rows_of(inflate(raw, encoding, limit), media, model.card.x)} if has_rows else parse_object(raw)
        if columns is not None and "parts" in endpoint.body.model_fields:
            if "return" in given:
                raise InvalidInput.at("return", "is for replies in JSON: name columns in the query")
            given["return"] = parts_of(columns)
        body = read_body_fields(endpoint.body, given)
        return body, endpoint.job(body, model, server.limits, arrival)

    body, job = await in_worker_if_large(len(raw) if encoding == IDENTITY else 1 << 62, prepare)
    if wanted is None or columns is None:
        return await endpoint.answer(request, server, model, body, job)
    result = await submit(request, server, model, job)
    numbers = job.rows * model.card.x.size
    response = await in_worker_if_large(4 * numbers, lambda: array_response(wanted, columns, model, result))
    server.scheduler.replied(job, result)
    return response


def _media(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
