"""An application around a scheduler that answers at once with recognisable numbers, and a client that talks to it in process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.artifact import Card, Curve, LevelSpec, LikelihoodSpec, ProgramSpec, Quantiles, TensorSpec, XSpec
from service.app import assemble
from service.deps import Server
from service.jobs import Limits
from service.repository import Repository, card_sha256
from service.scheduler.job import Job, JobResult, StepEvent, StopReason, Timing
from service.telemetry import Metrics

LATENT = 4
LIMITS = Limits(max_body_bytes=2**20, max_rows=20, max_samples=16, max_importance_samples=5000, max_deadline_ms=10_000)


def card(name: str, version: str = "1", shape: tuple[int, ...] = (784,), *, iterative: bool = True, hidden: int = 0) -> Card:
    """A card of a digit model: x in [0, 1], one level of four; with `hidden` the model keeps more than λ between steps."""
    carry = [TensorSpec(name=f"q.{part}", shape=("rows", LATENT)) for part in ("mu", "log_sigma")]
    if hidden:
        carry.append(TensorSpec(name="hidden", shape=("rows", hidden)))
    program = ProgramSpec(inputs=(), outputs=())
    return Card(
        name=name,
        version=version,
        family="static",
        description="digits & <tests>",
        x=XSpec(shape=shape, minimum=0.0, maximum=1.0),
        likelihood=LikelihoodSpec(name="bernoulli", parameters=("logits",)),
        levels=(LevelSpec(name="z", size=LATENT, parameters={"mu": "q.mu", "log_sigma": "q.log_sigma"}),),
        carry=tuple(carry),
        trained_steps=5 if iterative else 0,
        max_steps=64 if iterative else 0,
        samples=2,
        antithetic=True,
        programs={"init": program, "score": program, "decode": program} | ({"step": program} if iterative else {}),
        curve=Curve(steps=(0, 1, 5), elbo=(-200.0, -110.0, -95.0), elbo_std=(5.0, 4.0, 3.0), rows=100, samples=20),
        quantiles=Quantiles(probabilities=(0.0, 0.5, 1.0), steps=(0, 5), elbo=((-300.0, -200.0, -100.0), (-110.0, -90.0, -70.0))),
    )


@dataclass
class CardOnly:
    """As much of an engine as the repository looks at."""

    card: Card
    name: str = "fake"
    precision: str = "float32"


@dataclass
class FakeScheduler:
    """Answers each job at once: μ = row index, log σ = ⅓, hidden = 7; keeps the jobs. `fault` is raised instead; `hold` waits."""

    cards: dict[str, Card] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    fault: BaseException | None = None
    hold: asyncio.Event | None = None
    cancelled: int = 0
    alive: bool = True

    def add_model(self, key: str, engine: Any) -> None:
        self.cards[key] = engine.card

    def check_door(self, key: str) -> None:
        pass

    def replied(self, job: Job, result: JobResult) -> None:
        pass

    async def predicted_ms(self, key: str, rows: int, program: str = "step", samples: int = 1) -> float:
        return {"init": 1.0, "step": 0.25, "score": 0.5}[program] * rows

    async def submit(self, job: Job) -> JobResult:
        self.jobs.append(job)
        try:
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fault is not None:
            raise self.fault
        result = self._result(job)
        if job.on_step is not None:
            for step in range(job.budget.steps + 1):
                for row in range(job.rows):
                    carry = {name: column[row] for name, column in result.carry.items()}
                    job.on_step(StepEvent(row, step, -100.0 + step, step, -100.0 + step, carry, np.zeros(1, np.float32)))
            await asyncio.sleep(0)
        return result

    def _result(self, job: Job) -> JobResult:
        model, rows, steps = self.cards[job.model], job.rows, job.budget.steps
        size = model.x.size
        carry = {tensor.name: np.full((rows, int(tensor.shape[1])), 7, np.float32) for tensor in model.carry}
        carry["q.mu"] = np.repeat(np.arange(rows, dtype=np.float32)[:, None], LATENT, axis=1)
        carry["q.log_sigma"] = np.full((rows, LATENT), 1 / 3, np.float32)
        first = np.zeros(rows, np.int64) if job.first_step is None else job.first_step
        return JobResult(
            elbo=np.full(rows, -90.0),
            log_likelihood=np.full(rows, -70.0),
            kl=np.full((rows, 1), 20.0),
            steps_used=np.full(rows, steps),
            step=first + steps,
            stop_reason=[StopReason.STEPS] * rows,
            carry=carry,
            trace=[[-100.0 + k for k in range(steps + 1)]] * rows if job.ask.trace else None,
            log_px=np.full(rows, -88.0) if job.ask.importance_samples else None,
            z={"z": np.zeros((rows, job.ask.z, LATENT), np.float32)} if job.ask.z else None,
            mean=np.full((rows, size), 0.5, np.float32) if job.ask.mean else None,
            x=np.ones((rows, job.ask.x, size), np.float32) if job.ask.x else None,
            timing=Timing(queue_ms=0.25, compute_ms=1.5, predicted_ms=1.25, batch_rows=rows),
        )


class Service:
    """A client in the application's own loop, usable from plain test functions."""

    def __init__(self, runner: asyncio.Runner, app: Any, scheduler: FakeScheduler):
        self.app, self.scheduler, self._runner = app, scheduler, runner
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    def run(self, awaitable: Any) -> Any:
        async def waited() -> Any:
            return await awaitable

        return self._runner.run(waited())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.run(self.http.get(path, **options))

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """POSTs `body` as JSON to /v1/models/<path>; bytes (in `content`) go as they are."""
        if body is not None:
            options["json"] = body
        elif "headers" not in options:
            options["headers"] = {"Content-Type": "application/json"}
        return self.run(self.http.post(f"/v1/models/{path}", **options))


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one real, untrained model in both formats: iterative/1, recurrent, 20 numbers in [0, 1] per row."""
    from tests.service.engine.conftest import exported_once

    return exported_once(tmp_path_factory, "iterative")


@pytest.fixture
def make_card() -> Callable[..., Card]:
    return card


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    """serve(card, …): the application with these models behind the fake scheduler; options go to `Server` (keys, …)."""
    with asyncio.Runner() as runner:

        def start(*cards: Card, limits: Limits = LIMITS, **options: Any) -> Service:
            scheduler, metrics = FakeScheduler(), Metrics()
            repository = Repository(scheduler, lambda artifact: pytest.fail("nothing to build"))
            for one in cards:
                repository.add(CardOnly(one), card_sha256(one))  # type: ignore[arg-type]

            @asynccontextmanager
            async def lifespan(app: Any) -> AsyncIterator[None]:
                yield

            app = assemble(metrics, lifespan)
            app.state.server = Server(scheduler, repository, limits, metrics, **options)
            return Service(runner, app, scheduler)

        yield start


@pytest.fixture
def service(serve: Callable[..., Service]) -> Service:
    """Four models: digits (two versions), a direct one, one with 28 × 28 rows, and one that keeps a hidden state."""
    return serve(
        card("digits", "1"),
        card("digits", "2"),
        card("direct", iterative=False),
        card("images", shape=(28, 28)),
        card("recurrent", hidden=3),
    )


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key), self-signed, for 127.0.0.1."""
    x509 = pytest.importorskip("cryptography.x509", reason="the extra sign is not installed: nothing here can make a certificate")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "elbow test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "chain.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    encoding = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(*encoding))
    return folder / "chain.pem", folder / "key.pem"
