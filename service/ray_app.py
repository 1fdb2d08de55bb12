"""Elbow on Ray Serve: replicas of the same FastAPI application, one process each, behind Ray's proxy.

    pip install 'elbow[ray]'
    ELBOW_REPOSITORY=checkpoints ELBOW_TOKEN_SECRET=... serve run service.ray_app:build replicas=4

deploy/ray/serve.yaml is the same for a cluster (`serve deploy`). Ray finds the replicas, restarts those that die and spreads
requests; batching, queueing, deadlines and streams stay the scheduler's inside each replica. A stream whose replica dies goes on
at another one through its state token, which is why all of them need the same secret.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before anything can import onnxruntime, which else writes into the home folder
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from service.app import create_app
from service.settings import Settings, read_settings
from service.telemetry import configure_logging


class Options(BaseModel):
    """The arguments of the application; everything else comes from ELBOW_ variables, as everywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(default=2, ge=1, description="processes, each with all models loaded and a scheduler of its own")
    cpus: float = Field(default=1.0, gt=0, description="cores per replica; also its compute threads unless ELBOW_THREADS is set")
    gpus: float = Field(
        default=0.0, ge=0, description="GPUs per replica, or a part of one; a replica with any serves on it unless ELBOW_DEVICE is set"
    )
    ongoing: int = Field(default=1024, ge=1, description="requests and streams that Ray hands to one replica at a time")


class Replica:
    """One server. Ray calls `__serve_build_asgi_app__` once, in the replica's process, and runs the application's lifespan."""

    def __init__(self, settings: Settings):
        configure_logging(settings.log_level)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._settings)


def build(options: Options) -> Any:
    """The Serve application: what `serve run service.ray_app:build` and serve.yaml name.

    Raises:
        ValueError: there are several replicas and no secret that they share, or no such repository.
    """
    settings = read_settings()
    if options.replicas > 1 and settings.token_secret is None:
        raise ValueError("set ELBOW_TOKEN_SECRET: without it no replica can go on with the stream of another")
    if not settings.closed_form and not settings.repository.is_dir():
        raise ValueError(f"ELBOW_REPOSITORY: {settings.repository} is no folder; every node needs it at the same path")
    threads = settings.threads or max(1, int(options.cpus))
    device = "cuda" if options.gpus > 0 and "device" not in settings.model_fields_set else settings.device
    settings = settings.model_copy(update={"repository": settings.repository.absolute(), "threads": threads, "device": device})
    if settings.engine_process == "auto":  # Ray's proxies parse HTTP in processes of their own, and a replica has the cores it asked for
        settings = settings.model_copy(update={"engine_process": "off"})
    deployment = serve.deployment(
        name="elbow",
        num_replicas=options.replicas,
        max_ongoing_requests=options.ongoing,  # far beyond what is worth having: the scheduler refuses, and says when to come back
        graceful_shutdown_timeout_s=settings.drain_s,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )
    return deployment(serve.ingress()(Replica)).bind(settings)
