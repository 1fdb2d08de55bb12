"""Which artifacts and versions are served: scan, verify, build the engine, hand it to the scheduler; refuse what is bad.

One bad artifact never stops the others: it is logged once, remembered in `failures`, and reported by /readyz.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from models.artifact import Artifact, ArtifactError, Card, Signer, list_versions, version_key
from service.engine.base import Engine
from service.errors import UnknownModel
from service.reference import Reference
from service.telemetry import LOG


class Registrar(Protocol):
    """The part of the scheduler that the repository needs."""

    def add_model(self, key: str, engine: Engine) -> None: ...


@dataclass(frozen=True, eq=False)
class ServedModel:
    """One version of one model, loaded. `sha256` identifies its weights and card; posteriors' carries are bound to it."""

    card: Card
    sha256: str
    engine: str

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def version(self) -> str:
        return self.card.version

    @property
    def key(self) -> str:
        """How the scheduler calls it."""
        return f"{self.card.name}/{self.card.version}"

    @cached_property
    def reference(self) -> Reference:
        """Where an ELBO lies among the card's reference rows."""
        return Reference(self.card.quantiles)


class Repository:
    """The loaded models by name and version; without a version, the newest."""

    def __init__(self, registrar: Registrar, build_engine: Callable[[Artifact], Engine], signer: Signer | None = None):
        self._registrar, self._build, self._signer = registrar, build_engine, signer
        self._models: dict[str, dict[str, ServedModel]] = {}
        self._newest: dict[str, ServedModel] = {}
        self.failures: dict[str, str] = {}

    def load_all(self, folder: Path) -> None:
        """Loads every <name>/<version>/ in `folder` that verifies."""
        if not folder.is_dir():
            LOG.warning("no such repository folder", extra={"repository": str(folder)})
            return
        for name, version, path in list_versions(folder):
            self._load(f"{name}/{version}", path)

    def add(self, engine: Engine, sha256: str) -> ServedModel:
        """Serves `engine` under its card's name and version."""
        model = ServedModel(engine.card, sha256, engine.name)
        self._registrar.add_model(model.key, engine)
        versions = self._models.setdefault(model.name, {})
        versions[model.version] = model
        self._newest[model.name] = versions[max(versions, key=version_key)]
        LOG.info("model loaded", extra={"model": model.name, "version": model.version, "engine": engine.name})
        return model

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

    def newest(self) -> list[ServedModel]:
        """The default version of every model, by name."""
        return [self._newest[name] for name in sorted(self._newest)]

    def versions(self, name: str) -> list[str]:
        """The loaded versions of `name`, oldest first."""
        return sorted(self._models.get(name, {}), key=version_key)

    def all(self) -> list[ServedModel]:
        return [self._models[name][version] for name in sorted(self._models) for version in self.versions(name)]

    def _load(self, key: str, path: Path) -> None:
        try:
            artifact = Artifact.open(path, self._signer)
            if f"{artifact.card.name}/{artifact.card.version}" != key:
                raise ArtifactError(f"{path}: the card is of {artifact.card.name}/{artifact.card.version}, the folder says {key}")
            self.add(self._build(artifact), artifact.sha256)
        except Exception as exc:  # whatever is wrong with one artifact, the others are served
            self.failures[key] = str(exc)
            LOG.error("artifact refused", extra={"artifact": key, "reason": str(exc)}, exc_info=not isinstance(exc, ArtifactError))


def card_sha256(card: Card) -> str:
    """What stands in for an artifact's hash where there are no files (the closed-form model)."""
    return hashlib.sha256(card.model_dump_json().encode()).hexdigest()
