"""The head of a request and what its parameters say besides a method's own fields: media type, sequence, timeout, priority."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field
from starlette.requests import Request

from models.artifact import Card
from service.body import check_announced, parse_object, read_bytes
from service.deps import model_of
from service.errors import ArtifactRefused, InvalidInput, UnknownModel, UnsupportedMedia
from service.inflate import IDENTITY, check_encoding, inflate
from service.oip.methods import Method, default_method, method_named
from service.oip.sequences import SequenceControl, read_control
from service.oip.wire import HEAD_LENGTH, Inference, read_inference
from service.repository import Repository, ServedModel
from service.schemas import Body, read_body_fields

MEDIA = ("application/json", "application/octet-stream", "")


class RepositoryBody(Body):
    """The JSON of load and unload."""

    parameters: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Received:
    """A body as it came, its encoding, and the header that says where its JSON ends."""

    raw: bytes
    encoding: str
    head_length: str | None

    @property
    def work(self) -> int:
        """How many bytes there may be to chew: a compressed body says nothing of its size."""
        return len(self.raw) if self.encoding == IDENTITY else 1 << 62


@dataclass(frozen=True)
class Asked:
    """A request read as far as it can be without knowing where it goes: `parameters` are the method's own."""

    inference: Inference
    method: Method
    control: SequenceControl
    parameters: dict[str, Any]


def named_model(request: Request, endpoint: str) -> ServedModel:
    """`model_of`, its refusal beginning as clients of the protocol expect it.

    Raises:
        UnknownModel: there is no such model or version.
    """
    try:
        return model_of(request, endpoint)
    except UnknownModel as exc:
        raise UnknownModel(f"Request for unknown model: {exc.detail}") from exc


def load_named(repository: Repository, name: str) -> None:
    """Loads the newest version of `name`, its refusal worded as clients of the protocol expect it.

    Raises:
        UnknownModel, ArtifactRefused: as `Repository.load`.
    """
    try:
        repository.load(name)
    except (UnknownModel, ArtifactRefused) as exc:
        raise type(exc)(f"failed to load {name[:80]!r}: {exc.detail}") from exc


def read_repository_parameters(raw: bytes) -> None:
    """What a body of load or unload may say. A model is loaded as its folder has it: no other configuration, no files.

    Raises:
        MalformedBody, InvalidInput: it is not JSON, or asks for more.
    """
    body = read_body_fields(RepositoryBody, parse_object(raw)) if raw else RepositoryBody()
    for name in body.parameters.keys() - {"unload_dependents"}:  # nothing depends on a model here
        raise InvalidInput.at(f"parameters.{name[:40]}", "is not supported: a model is loaded as the repository has it")


async def receive(request: Request, limit: int) -> Received:
    """Reads the body. At most `limit` bytes of it, which also bounds what it inflates to (`ask`).

    Raises:
        UnsupportedMedia: a content type or encoding that is not read here. BodyTooLarge, ClientDisconnect: as `read_body`.
    """
    headers = request.headers
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in MEDIA and not media.endswith("+json"):
        raise UnsupportedMedia(f"content type {media[:80]!r} is not read here: send application/json or application/octet-stream")
    encoding = check_encoding(headers.get("content-encoding"))
    if len(headers.getlist(HEAD_LENGTH)) > 1:
        raise InvalidInput.at(HEAD_LENGTH, "is there more than once")
    check_announced(request, limit)
    return Received(await read_bytes(request, limit), encoding, headers.get(HEAD_LENGTH))


def ask(received: Received, card: Card, limit: int) -> Asked:
    """The request in a body.

    Raises:
        BodyTooLarge, MalformedBody, InvalidInput: it does not fit, and where.
    """
    inference = read_inference(inflate(received.raw, received.encoding, limit), received.head_length, card.x)
    parameters = dict(inference.parameters)
    control = read_control(parameters)
    method = method_named(parameters.pop("method", default_method(card)), card)
    if parameters.pop("priority", 0) != 0:
        raise InvalidInput.at("parameters.priority", "is not supported: the earliest deadline comes first")
    timeout_us = parameters.pop("timeout", None)
    if timeout_us is not None:
        _set_deadline(parameters, timeout_us)
    return Asked(inference, method, control, parameters)


def _set_deadline(parameters: dict[str, Any], timeout_us: Any) -> None:
    """The protocol's `timeout`, in microseconds, is a deadline; 0 is none."""
    if isinstance(timeout_us, bool) or not isinstance(timeout_us, int) or timeout_us < 0:
        raise InvalidInput.at("parameters.timeout", "must be a whole number of microseconds, 0 for none")
    if "deadline_ms" in parameters:
        raise InvalidInput.at("parameters.timeout", "is given beside deadline_ms: send one of them")
    if timeout_us:
        parameters["deadline_ms"] = timeout_us / 1e3
