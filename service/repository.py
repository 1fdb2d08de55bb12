"""Which artifacts and versions are served: scan, verify, build the engine, hand it to the scheduler; refuse what is bad.

One bad artifact never stops the others: it is logged once, remembered in `failures`, and reported by /readyz.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from models.artifact import CARD, Artifact, ArtifactError, Card, Signer, list_versions, sha256_of, version_key
from service.engine.base import Loaded
from service.errors import ArtifactRefused, UnknownModel
from service.reference import Reference
from service.telemetry import LOG, Metrics

TEND_S = 1.0
"""Between two looks for versions whose time is over."""


class Registrar(Protocol):
    """The part of the scheduler that the repository needs."""

    def add_model(self, key: str, engine: Any) -> None: ...

    def remove_model(self, key: str) -> None: ...


@dataclass(frozen=True, eq=False)
class ServedModel:
    """One version of one model, loaded. `sha256` identifies its weights and card; posteriors' carries are bound to it."""

    card: Card
    sha256: str
    engine: str
    precision: str = "float32"

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def version(self) -> str:
        return self.card.version

    @property
    def cost_nats(self) -> float:
        """What the precision it is served in was measured to cost, in nats of validation ELBO."""
        offered = {name: spec.cost_nats for name, spec in self.card.precisions.items()}
        return offered.get(self.precision, self.card.precision_cost_nats)  # type: ignore[call-overload]

    @property
    def key(self) -> str:
        """How the scheduler calls it."""
        return f"{self.card.name}/{self.card.version}"

    @cached_property
    def reference(self) -> Reference:
        """Where an ELBO lies among the card's reference rows."""
        return Reference(self.card.quantiles)


class Repository:
    """The loaded models by name and version; without a version, the newest.

    Everything that loads or unloads may take seconds and is called in worker threads, one at a time. Readers never wait: what they
    read is replaced, never changed.

    Args:
        keep_s: how long a version that was superseded stays loaded, for the tokens that it issued.
        grace_s: between the last request that can find a version and the close of its engine: bodies may still be on their way.
    """

    def __init__(
        self,
        registrar: Registrar,
        build_engine: Callable[[Artifact], Loaded],
        signer: Signer | None = None,
        *,
        metrics: Metrics | None = None,
        keep_s: float = 3600.0,
        grace_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._registrar, self._build, self._signer, self._metrics = registrar, build_engine, signer, metrics
        self._keep_s, self._grace_s, self._clock = keep_s, grace_s, clock
        self._changing = threading.RLock()
        self._models: dict[str, dict[str, ServedModel]] = {}
        self._newest: dict[str, ServedModel] = {}
        self._folder: Path | None = None
        self._tried: dict[str, str] = {}
        """Key -> what the folder looked like when it was last loaded or refused: it is not tried again until it looks otherwise."""
        self._seen: dict[str, str] = {}
        self._leaving: dict[str, float] = {}
        """Superseded versions, and when they are unloaded."""
        self._closing: dict[str, float] = {}
        """Unloaded versions whose engine is still there, and when it is given up."""
        self.failures: dict[str, str] = {}

    # Reading.

    def get(self, name: str, version: str | None = None) -> ServedModel:
        """The newest version of `name`, or the given one.

        Raises:
            UnknownModel: listing what there is.
        """
        model = self._newest.get(name) if version is None else self._models.get(name, {}).get(version)
        if model is not None:
            return model
        if name in self._models:
            raise UnknownModel(f"model {name!r} has no version {version!r}: loaded are {', '.join(self._models[name])}")
        raise UnknownModel(f"no model {name!r}: loaded are {', '.join(sorted(self._models)) or 'none'}")

    def issued_by(self, name: str, sha256: str | None) -> ServedModel | None:
        """The loaded version of `name` with this hash: a token goes on where it came from, whatever the default is by now."""
        return next((model for model in self._models.get(name, {}).values() if model.sha256 == sha256), None)

    def newest(self) -> list[ServedModel]:
        """The default version of every model, by name."""
        newest = self._newest
        return [newest[name] for name in sorted(newest)]

    def versions(self, name: str) -> list[str]:
        """The loaded versions of `name`, oldest first."""
        return sorted(self._models.get(name, {}), key=version_key)

    def all(self) -> list[ServedModel]:
        models = self._models
        return [models[name][version] for name in sorted(models) for version in sorted(models[name], key=version_key)]

    def index(self) -> list[dict[str, str]]:
        """Every version that is loaded, lies in the folder or was refused: name, version, state (READY, UNAVAILABLE), reason."""
        ready = {model.key: model for model in self.all()}
        found = self._found() if self._folder is not None else {}
        rows = []
        for key in sorted({*ready, *found, *self.failures}, key=lambda key: (key.partition("/")[0], version_key(key.partition("/")[2]))):
            name, _, version = key.partition("/")
            state = "READY" if key in ready else "UNAVAILABLE"
            rows.append({"name": name, "version": version, "state": state, "reason": self._reason(key)})
        return rows

    def _reason(self, key: str) -> str:
        if key in self.failures:
            return self.failures[key]
        leaves = self._leaving.get(key)
        return "" if leaves is None else f"superseded; unloaded in {max(0.0, leaves - self._clock()):.0f} s"

    # Changing.

    def load_all(self, folder: Path) -> None:
        """Loads every <name>/<version>/ in `folder` that verifies. From then on `refresh` follows it."""
        self._folder = folder
        if not folder.is_dir():
            LOG.warning("no such repository folder", extra={"repository": str(folder)})
            return
        with self._changing:
            for key, path in self._found().items():
                self._try(key, path, supersede=False)

    def add(self, engine: Loaded, sha256: str, *, supersede: bool = False) -> ServedModel:
        """Serves `engine` under its card's name and version; with `supersede`, the default it replaces leaves after `keep_s`."""
        model = ServedModel(engine.card, sha256, engine.name, engine.precision)
        with self._changing:
            self._registrar.add_model(model.key, engine)
            self._closing.pop(model.key, None)
            before = self._newest.get(model.name)
            self._publish(model.name, {**self._models.get(model.name, {}), model.version: model})
            if supersede and before is not None and self._newest[model.name] is model:
                self._leaving[before.key] = self._clock() + self._keep_s
        served = {"model": model.name, "version": model.version, "engine": model.engine, "precision": model.precision}
        LOG.info("model loaded", extra=served)
        self._count("loaded")
        return model

    def load(self, name: str, version: str | None = None) -> ServedModel:
        """Loads a version from the folder (without one, the newest there). Loading what is loaded keeps it from leaving.

        Raises:
            UnknownModel: the folder has no such model or version. ArtifactRefused: it cannot be served, and why.
        """
        with self._changing:
            found = self._found()
            keys = [key for key in found if key.partition("/")[0] == name and version in (None, key.partition("/")[2])]
            if not keys:
                raise UnknownModel(f"the repository holds no {name!r}" + (f" of version {version!r}" if version else ""))
            key = keys[-1]
            loaded = self._models.get(name, {}).get(key.partition("/")[2])
            if loaded is None or not self._is_unchanged(key, found[key], loaded):
                self._try(key, found[key], supersede=True)
            if key in self.failures:
                raise ArtifactRefused(self.failures[key])
            self._leaving.pop(key, None)
            return self.get(name, key.partition("/")[2])

    def unload(self, name: str, version: str | None = None) -> list[str]:
        """Takes a version (without one, all of them) away from new requests; those running finish on it. The keys unloaded.

        Raises:
            UnknownModel: it is not loaded.
        """
        with self._changing:
            if version is not None or name not in self._models:
                self.get(name, version)
            versions = [version] if version is not None else self.versions(name)
            for each in versions:
                self._unload(f"{name}/{each}")
            return [f"{name}/{each}" for each in versions]

    def refresh(self, *, only_settled: bool = False) -> None:
        """Makes what is loaded follow the folder: new versions in, removed ones out, broken ones refused once.

        Args:
            only_settled: load only what looked the same at the last call, so that nobody loads what is still being copied.
        """
        with self._changing:
            if self._folder is None or not self._folder.is_dir():
                return
            found = self._found()
            for key in [key for key in self._tried if key not in found]:
                del self._tried[key]
                self.failures.pop(key, None)
                if self._loaded(key) is not None:
                    self._unload(key)
            for key, path in found.items():
                looks = _looks(path)
                if self._tried.get(key) == looks:
                    continue
                if only_settled and self._seen.get(key) != looks:
                    self._seen[key] = looks
                    continue
                loaded = self._loaded(key)
                if loaded is None or not self._is_unchanged(key, path, loaded):
                    self._try(key, path, supersede=True)
            self._report()

    def tend(self) -> None:
        """Unloads what has been superseded for long enough, and gives up engines that nobody can ask for any more."""
        with self._changing:
            now = self._clock()
            for key in [key for key, due in self._leaving.items() if due <= now]:
                self._unload(key)
            for key in [key for key, due in self._closing.items() if due <= now]:
                del self._closing[key]
                self._registrar.remove_model(key)

    def _try(self, key: str, path: Path, *, supersede: bool) -> None:
        """Loads one version beside the others, or notes in one message why not. What is loaded already stays as it is."""
        self._tried[key] = _looks(path)
        engine: Loaded | None = None
        try:
            artifact = Artifact.open(path, self._signer)
            if f"{artifact.card.name}/{artifact.card.version}" != key:
                raise ArtifactError(f"{path}: the card is of {artifact.card.name}/{artifact.card.version}, the folder says {key}")
            if self._loaded(key) is not None:
                raise ArtifactError(f"{path}: changed since it was loaded; export it as a new version, or unload this one first")
            engine = self._build(artifact)
            self.add(engine, artifact.sha256, supersede=supersede)
            self.failures.pop(key, None)
        except Exception as exc:  # whatever is wrong with one artifact, the others are served
            self.failures[key] = str(exc)
            LOG.error("artifact refused", extra={"artifact": key, "reason": str(exc)}, exc_info=not isinstance(exc, ArtifactError))
            self._count("refused")
            if engine is not None:
                engine.close()
        self._report()

    def _is_unchanged(self, key: str, path: Path, loaded: ServedModel) -> bool:
        """Whether the folder still holds the card that is served: then only its times were touched."""
        try:
            same = sha256_of(path / CARD) == loaded.sha256
        except OSError:
            same = False
        if same:
            self._tried[key] = _looks(path)
            self.failures.pop(key, None)
        return same

    def _unload(self, key: str) -> None:
        name, _, version = key.partition("/")
        self._leaving.pop(key, None)
        self._publish(name, {each: model for each, model in self._models.get(name, {}).items() if each != version})
        if name in self._newest:  # who becomes the default again, as when its successor is rolled back, no longer leaves
            self._leaving.pop(self._newest[name].key, None)
        self._closing[key] = self._clock() + self._grace_s
        LOG.info("model unloaded", extra={"model": name, "version": version})
        self._count("unloaded")
        self._report()

    def _publish(self, name: str, versions: dict[str, ServedModel]) -> None:
        """Replaces what readers see of one model, in an order in which they never miss one that is there."""
        models, newest = dict(self._models), dict(self._newest)
        models[name] = versions
        if versions:
            newest[name] = versions[max(versions, key=version_key)]
        else:
            del models[name]
            newest.pop(name, None)
        self._models, self._newest = models, newest

    def _found(self) -> dict[str, Path]:
        return {} if self._folder is None else {f"{name}/{version}": path for name, version, path in list_versions(self._folder)}

    def _loaded(self, key: str) -> ServedModel | None:
        name, _, version = key.partition("/")
        return self._models.get(name, {}).get(version)

    def _count(self, outcome: str) -> None:
        if self._metrics is not None:
            self._metrics.model_loads.labels(outcome).inc()
        self._report()

    def _report(self) -> None:
        if self._metrics is not None:
            self._metrics.models_loaded.set(len(self.all()))
            self._metrics.artifacts_refused.set(len(self.failures))


async def follow(repository: Repository, watch_s: float) -> None:
    """Tends the repository for as long as the server runs, and looks into its folder every `watch_s` seconds (0: never)."""

    def look() -> None:
        if watch_s:
            repository.refresh(only_settled=True)
        repository.tend()

    while True:
        await asyncio.sleep(watch_s or TEND_S)
        try:
            await asyncio.to_thread(look)
        except Exception:  # a folder that is away for a moment must not end the watch
            LOG.exception("the repository could not be looked through")


def _looks(path: Path) -> str:
    """What tells one state of a version's folder from another without reading it: names, sizes and times of its files."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return repr([(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files])


def card_sha256(card: Card) -> str:
    """What stands in for an artifact's hash where there are no files (the closed-form model)."""
    return hashlib.sha256(card.model_dump_json().encode()).hexdigest()
