"""create_app(settings): wires the parts in a lifespan."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from models.artifact import Artifact
from service.access import AccessMiddleware
from service.apart.remote import RemoteScheduler
from service.browser_tokens import BrowserTokens
from service.building import builder_of, closed_form, scheduler_of
from service.deps import Server
from service.direct import DirectRoutes
from service.engine.base import Loaded
from service.errors import ElbowError, handle_elbow_error, handle_http_exception
from service.jobs import Limits
from service.keys import KeyRing
from service.middleware import RequestMiddleware
from service.openapi import describe_api
from service.repository import Repository, card_sha256, follow
from service.routes import admin, filters, health, infer, models, oip, tokens
from service.settings import Settings
from service.signing import signer_of_settings
from service.streams.tokens import Tokens
from service.telemetry import LOG, Metrics
from service.tracing import telemetry

ASKED_HEADERS = ["Authorization", "X-API-Key", "Content-Type", "X-Request-ID", "traceparent"]
TOLD_HEADERS = ["X-Request-ID", "Retry-After"]


class ElbowApp(FastAPI):
    """FastAPI whose OpenAPI document names the loaded models."""

    def openapi(self) -> dict[str, Any]:
        server: Server = self.state.server
        return describe_api(server.repository.all(), server.repository.newest(), server.limits, needs_key=not server.keys.is_open)


def create_app(settings: Settings) -> FastAPI:
    """The application. Models are loaded and the scheduler started when the server starts it (its lifespan)."""
    metrics, keys = Metrics(), _keys(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        scheduler, build, stand_in = await _scheduling(settings)
        repository = Repository(
            scheduler, build, signer_of_settings(settings), metrics=metrics, keep_s=settings.token_ttl_s, grace_s=settings.drain_s
        )
        try:
            await asyncio.to_thread(_load, repository, settings, stand_in)
        except BaseException:
            await scheduler.stop(0.0)
            raise
        secret = _token_secret(settings)
        server = app.state.server = Server(
            scheduler,
            repository,
            limits_of(settings),
            metrics,
            tokens=Tokens(secret, settings.token_ttl_s, settings.max_token_bytes),
            keys=keys,
            browser_tokens=BrowserTokens(secret, settings.browser_token_ttl_s),
        )
        metrics.watch(scheduler.stats)
        metrics.watch_streams(scheduler.stream_stats)
        if isinstance(scheduler, RemoteScheduler):
            metrics.watch_engine_process(scheduler.process.pid)
        following = asyncio.create_task(follow(repository, settings.watch_s))
        try:
            yield
        finally:
            following.cancel()
            await server.stop(settings.drain_s)

    return assemble(metrics, lifespan, body_s=settings.body_s, origins=settings.allowed_origins)


def assemble(metrics: Metrics, lifespan: Any, *, body_s: float = 10.0, origins: Sequence[str] = (), tracer_provider: Any = None) -> FastAPI:
    """Routes, middleware and error handlers around a lifespan that sets `app.state.server`."""
    spans: Any = telemetry(tracer_provider)
    app = ElbowApp(title="Elbow", docs_url="/docs", redoc_url=None, redirect_slashes=False, lifespan=lifespan, telemetry=spans)
    # matched in order: the busiest first
    app.router.routes[:0] = [*infer.ROUTES, *oip.ROUTES, *filters.ROUTES, *models.ROUTES, *tokens.ROUTES, *health.ROUTES, *admin.ROUTES]
    endpoints = {endpoint.name: endpoint for endpoint in infer.ENDPOINTS}
    app.add_middleware(DirectRoutes, endpoints=endpoints, handlers=app.exception_handlers)
    app.add_middleware(AccessMiddleware, body_s=body_s, origins=frozenset(origins))
    app.add_middleware(RequestMiddleware, metrics=metrics)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=ASKED_HEADERS,
            expose_headers=TOLD_HEADERS,
        )

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, ElbowError)
        metrics.refused(error.code, request.scope["call"])
        return await handle_elbow_error(request, error)

    app.state.metrics = metrics
    app.add_exception_handler(ElbowError, refuse)
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(ClientDisconnect, _nobody_is_listening)
    return app


def limits_of(settings: Settings) -> Limits:
    return Limits(
        max_body_bytes=settings.max_body_bytes,
        max_rows=settings.max_rows,
        max_samples=settings.max_samples,
        max_importance_samples=settings.max_importance_samples,
        max_deadline_ms=settings.max_deadline_ms,
        max_message_bytes=settings.max_message_bytes,
        stream_idle_s=settings.stream_idle_s,
        max_sequences=settings.max_sequences,
        drain_s=settings.drain_s,
    )


async def _scheduling(settings: Settings) -> tuple[Any, Callable[[Artifact], Loaded], Callable[[], Loaded]]:
    """A running scheduler, in this process or in one of its own, what builds its engines, and what builds the stand-in."""
    if settings.has_engine_process:
        remote = await RemoteScheduler.start(settings)
        return remote, remote.build, remote.build_closed_form
    scheduler = scheduler_of(settings)
    scheduler.start()
    return scheduler, builder_of(settings), closed_form


def _load(repository: Repository, settings: Settings, stand_in: Callable[[], Loaded]) -> None:
    """All models that the settings name. Takes seconds."""
    repository.load_all(settings.repository)
    if settings.closed_form:
        engine = stand_in()
        repository.add(engine, card_sha256(engine.card))


def _keys(settings: Settings) -> KeyRing:
    admin = settings.admin_key_sha256
    return KeyRing(settings.key_lines(), None if admin is None else admin.get_secret_value())


def _token_secret(settings: Settings) -> bytes:
    secret = settings.token_secret
    if secret is None:
        LOG.warning("ELBOW_TOKEN_SECRET is not set: state tokens will not outlive this process, nor be read by another replica")
    return secrets.token_bytes(32) if secret is None else secret.get_secret_value().encode()


async def _nobody_is_listening(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
