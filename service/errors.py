"""Everything that can go wrong with a request, and what the client is told.

    ElbowError                   anything this service refuses or fails at, on purpose and with a message
    ├── InvalidInput        422  JSON that does not fit: `errors` names the fields (on /v2: 400, as for the next)
    ├── TokenRefused        422  a state token that is altered, expired, or another model's or caller's
    ├── ArtifactRefused     422  an artifact that was to be loaded cannot be served
    ├── MalformedBody       400  not JSON
    ├── Unauthorized        401  no API key, or one that is not known
    ├── Forbidden           403  a key that does not open this
    ├── UnknownModel        404  no such model or version here
    ├── BodyTooLarge        413  more bytes than the server takes
    ├── HeadTooLarge        431  request line and headers of more bytes than the server takes
    ├── UnsupportedMedia    415  a content type or encoding it does not read
    ├── WrongMessageKind    415  on a WebSocket: a binary message where text belongs, or the other way round
    ├── ClientIdle          408  nothing was heard for too long
    ├── RetryLater               try again after `retry_after_s` (the Retry-After header)
    │   ├── QuotaExceeded   429  this caller's own limit
    │   ├── Overloaded      503  the queue is full
    │   └── ShuttingDown    503  the server is draining
    ├── DeadlineExceeded    504  the deadline cannot be, or was not, met
    └── BackendFailure      500  the engine failed

Every error leaves as `application/problem+json` (RFC 9457) through the one handler on the base class. What the framework
raises by itself (404, 405) takes the same shape. Anything else is a fault of ours: a full log and a plain 500.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

PROBLEM_JSON = "application/problem+json"


class ElbowError(Exception):
    """Base of all refusals and failures that a client is told about.

    Attributes:
        detail: one sentence for a human, which names the field and the fix.
        fields: (path, message) of each offending field; the reply's `errors`.
    """

    code = "error"

    def __init__(self, detail: str, *, fields: Sequence[tuple[str, str]] = ()):
        super().__init__(detail)
        self.detail = detail
        self.fields = tuple(fields)


class InvalidInput(ElbowError):
    code = "invalid_input"

    @classmethod
    def at(cls, path: str, message: str) -> InvalidInput:
        """The error of one field."""
        return cls(f"{path}: {message}", fields=[(path, message)])


class TokenRefused(ElbowError):
    code = "token_refused"


class ArtifactRefused(ElbowError):
    code = "artifact_refused"


class MalformedBody(ElbowError):
    code = "malformed_body"


class Unauthorized(ElbowError):
    code = "unauthorized"


class Forbidden(ElbowError):
    code = "forbidden"


class UnknownModel(ElbowError):
    code = "unknown_model"


class BodyTooLarge(ElbowError):
    code = "body_too_large"


class HeadTooLarge(ElbowError):
    code = "head_too_large"


class UnsupportedMedia(ElbowError):
    code = "unsupported_media"


class WrongMessageKind(ElbowError):
    code = "wrong_message_kind"


class ClientIdle(ElbowError):
    code = "idle"


class RetryLater(ElbowError):
    """Base of the refusals that time cures."""

    def __init__(self, detail: str, *, retry_after_s: float = 1.0, fields: Sequence[tuple[str, str]] = ()):
        super().__init__(detail, fields=fields)
        self.retry_after_s = retry_after_s


class QuotaExceeded(RetryLater):
    code = "quota_exceeded"


class Overloaded(RetryLater):
    code = "overloaded"


class ShuttingDown(RetryLater):
    code = "shutting_down"


class DeadlineExceeded(ElbowError):
    code = "deadline_exceeded"


class BackendFailure(ElbowError):
    code = "backend_failure"


STATUS: dict[type[ElbowError], int] = {
    InvalidInput: 422,
    TokenRefused: 422,
    ArtifactRefused: 422,
    MalformedBody: 400,
    Unauthorized: 401,
    Forbidden: 403,
    UnknownModel: 404,
    BodyTooLarge: 413,
    HeadTooLarge: 431,
    UnsupportedMedia: 415,
    WrongMessageKind: 415,
    ClientIdle: 408,
    QuotaExceeded: 429,
    Overloaded: 503,
    ShuttingDown: 503,
    DeadlineExceeded: 504,
    BackendFailure: 500,
}

FRAMEWORK_CODES = {404: "not_found", 405: "method_not_allowed"}


def problem(error: ElbowError, *, instance: str, request_id: str) -> dict[str, Any]:
    """The problem document of `error`, as a JSON object."""
    status = STATUS[type(error)]
    if status == HTTPStatus.UNPROCESSABLE_ENTITY and instance.startswith("/v2/"):
        status = HTTPStatus.BAD_REQUEST  # what clients of the Open Inference Protocol know
    members = _members(int(status), error.code, error.detail, instance, request_id)
    if error.fields:
        members["errors"] = [{"field": path, "message": message} for path, message in error.fields]
    if isinstance(error, RetryLater):
        members["retry_after_s"] = error.retry_after_s
    return members


def unforeseen(*, instance: str, request_id: str) -> dict[str, Any]:
    """The problem document of a fault of ours: nothing of it leaks, the log has it under the request id."""
    return _members(500, "internal", f"internal error; the server's log has it under request id {request_id}", instance, request_id)


def problem_response(members: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(members), members["status"], headers, PROBLEM_JSON)


def error_response(error: ElbowError, path: str, request_id: str) -> Response:
    """The reply to a request that met `error`."""
    headers = {}
    if isinstance(error, RetryLater):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, ClientIdle | BodyTooLarge):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    if isinstance(error, ShuttingDown):
        headers["Connection"] = "close"  # the next request goes elsewhere
    return problem_response(problem(error, instance=path, request_id=request_id), headers)


async def handle_elbow_error(request: Request, error: Exception) -> Response:
    """The one handler: any ElbowError becomes its problem document."""
    assert isinstance(error, ElbowError)
    return error_response(error, request.url.path, _request_id(request))


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """What the framework raises (an unknown path, a wrong method), in the same shape."""
    assert isinstance(error, HTTPException)
    status, path = error.status_code, request.url.path
    detail = error.detail
    if status == HTTPStatus.NOT_FOUND:
        detail = f"there is nothing at {path}; GET /v1/models lists the models, /docs describes the calls"
    elif status == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "another method")
        detail = f"{request.method} is not allowed at {path}: use {allowed}"
    code = FRAMEWORK_CODES.get(status, HTTPStatus(status).phrase.lower().replace(" ", "_"))
    return problem_response(_members(status, code, detail, path, _request_id(request)), error.headers)


def _members(status: int, code: str, detail: str, instance: str, request_id: str) -> dict[str, Any]:
    return {
        "type": f"urn:elbow:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": instance,
        "error": detail,
        "code": code,
        "request_id": request_id,
    }


def _request_id(request: Request) -> str:
    return str(request.scope.get("request_id", ""))
