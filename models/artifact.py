"""One served directory: a card, the weights and the programs. Read, write, verify.

    <repository>/<name>/<version>/
        artifact.json           the card (this module's `Card`), the only file that is trusted by name
        artifact.json.sig       optional signature of the card's bytes
        weights.safetensors     every parameter once
        <program>.pt            TorchScript, its weights left empty: the loader fills them
        <program>.onnx          ONNX, its initialisers pointing into weights.safetensors by offset (so it lies beside it)
        reference.safetensors   inputs, noise and float64 outputs of every program, for the parity check at load
        <program>.int8.onnx     optional: a program in a further precision, on the same weights.safetensors
        elbo.safetensors        rows, noise and float64 ELBOs after the trained steps, which a further precision is held to

The card holds the sha256 of every other file, so whoever trusts the card (by signature, or because they wrote it)
trusts the whole directory. Nothing here is ever unpickled. Torch-free: training and service both import this module,
and it is the only one they share.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors.numpy import load_file, save_file

FORMAT_VERSION = 1
CARD = "artifact.json"
SIGNATURE = "artifact.json.sig"
WEIGHTS = "weights.safetensors"
REFERENCE = "reference.safetensors"
ELBO_REFERENCE = "elbo.safetensors"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
FILE_PATTERN = r"^(?:[A-Za-z0-9_][A-Za-z0-9._-]*/)?[A-Za-z0-9_][A-Za-z0-9._-]*$"

Array = NDArray[Any]
Arrays = dict[str, Array]


class ArtifactError(Exception):
    """The directory cannot be served: a file is missing, altered, foreign, or of an unknown format."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TensorSpec(_Frozen):
    """A named array of a program. The first axis is always the row; a string is a symbolic size (`rows`, `samples`)."""

    name: str
    shape: tuple[int | str, ...]
    dtype: Literal["float32", "float64", "int32", "int64", "bool"] = "float32"


class ProgramSpec(_Frozen):
    """A pure function on named arrays (docs/decisions/programs.md). Inputs called `noise*` are standard normal."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: dict[str, str] = Field(default_factory=dict, description="engine format ('onnx', 'torchscript') -> file")


class XSpec(_Frozen):
    """What one row of x is, as a client sends it. `mean` and `std`: of all entries of the training data, where the model standardises by
    them; such densities are of standardised entries."""

    shape: tuple[int, ...]
    dtype: Literal["float32"] = "float32"
    minimum: float | None = None
    maximum: float | None = None
    units: str = "nats per row"
    description: str = ""
    sample_rate: int | None = None
    mean: float | None = None
    std: float | None = Field(default=None, gt=0)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


class LikelihoodSpec(_Frozen):
    """p(x|z): its name, and the arrays `decode` returns for it."""

    name: str
    parameters: tuple[str, ...]


class LevelSpec(_Frozen):
    """One level of latent variables: how its λ is called in the carry and how a reply names it.

    `parameters` maps the name shown to clients (`mu`, `log_sigma`) to the carry array that holds it.
    """

    name: str
    kind: Literal["gaussian"] = "gaussian"
    size: int
    parameters: dict[str, str]

    @field_validator("parameters")
    @classmethod
    def _mean_first(cls, parameters: dict[str, str]) -> dict[str, str]:
        """The order in which clients see them: a card on disk has its keys sorted."""
        return dict(sorted(parameters.items(), key=lambda item: (item[0] != "mu", item[0])))


class Curve(_Frozen):
    """Validation ELBO (nats per row) after `steps` refinement steps: mean and spread over rows."""

    steps: tuple[int, ...]
    elbo: tuple[float, ...]
    elbo_std: tuple[float, ...]
    rows: int
    samples: int


class Quantiles(_Frozen):
    """Quantiles over training rows of the one-row ELBO, for each number of steps."""

    probabilities: tuple[float, ...]
    steps: tuple[int, ...]
    elbo: tuple[tuple[float, ...], ...]


MAX_COST_NATS = 0.05
"""What a further precision may cost, in nats of validation ELBO, to be offered at all."""


class PrecisionSpec(_Frozen):
    """A further precision of the programs that choose λ, and its measured cost. Programs not listed are those of the card.

    The cost is float32's validation ELBO after the trained number of steps minus this one's, both measured in float32.
    """

    cost_nats: float = Field(le=MAX_COST_NATS, description="mean over rows")
    cost_std: float = Field(ge=0, description="over rows")
    rows: int = Field(ge=1)
    samples: int = Field(ge=1, description="measuring samples per row")
    programs: dict[str, dict[str, str]] = Field(min_length=1, description="program -> engine format -> file")


class FileSpec(_Frozen):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Card(_Frozen):
    """Everything a server needs to know about a model it has never seen (architecture.md, section 4)."""

    format_version: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    version: str = Field(pattern=NAME_PATTERN)
    family: Literal["static", "filter"]
    description: str = ""
    x: XSpec
    likelihood: LikelihoodSpec
    levels: tuple[LevelSpec, ...]
    carry: tuple[TensorSpec, ...] = ()
    context: tuple[TensorSpec, ...] = ()
    state: tuple[TensorSpec, ...] = ()
    encoding: tuple[str, ...] = ()
    trained_steps: int = Field(ge=0)
    max_steps: int = Field(ge=0)
    samples: int = Field(ge=1, description="S of the refining noise the model was trained with")
    antithetic: bool = Field(description="the refining noise comes in pairs (ε, −ε)")
    precision: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    precision_cost_nats: float = 0.0
    precisions: dict[Literal["int8"], PrecisionSpec] = Field(default_factory=dict, description="what the programs come in besides")
    programs: dict[str, ProgramSpec]
    curve: Curve
    quantiles: Quantiles
    metrics: dict[str, float] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, FileSpec] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_agree(self) -> Card:
        carried = {tensor.name for tensor in (*self.carry, *self.state)}
        for level in self.levels:
            for array in level.parameters.values():
                if carried and array not in carried:
                    raise ValueError(f"levels: {level.name!r} names the array {array!r}, which is not in the carry")
        for name, precision in self.precisions.items():
            if unknown := precision.programs.keys() - self.programs.keys():
                raise ValueError(f"precisions.{name}: there is no program {min(unknown)!r}")
        for place, file in self._named_files():
            if self.files and file not in self.files:
                raise ValueError(f"{place}: the file {file!r} is not listed under files")
        for file in self.files:
            if not re.match(FILE_PATTERN, file):
                raise ValueError(f"files: {file!r} is not a plain path inside the artifact")
        return self

    def _named_files(self) -> Iterable[tuple[str, str]]:
        """(where the card names it, file)."""
        for program, spec in self.programs.items():
            yield from ((f"programs.{program}", file) for file in spec.files.values())
        for name, precision in self.precisions.items():
            for program, formats in precision.programs.items():
                yield from ((f"precisions.{name}.{program}", file) for file in formats.values())

    @property
    def iterative(self) -> bool:
        """Whether there is anything to refine: a direct model has no `step`."""
        return "step" in self.programs


class Signer:
    """Signs and checks the bytes of a card: HMAC-SHA256 with a shared secret, or Ed25519 with a key pair."""

    def __init__(self, *, secret: bytes | None = None, private_key: bytes | None = None, public_key: bytes | None = None):
        self._secret, self._private, self._public = secret, private_key, public_key

    def sign(self, message: bytes) -> dict[str, str]:
        if self._secret is not None:
            return {"algorithm": "hmac-sha256", "signature": hmac.new(self._secret, message, "sha256").hexdigest()}
        if self._private is not None:
            return {"algorithm": "ed25519", "signature": _ed25519().Ed25519PrivateKey.from_private_bytes(self._private).sign(message).hex()}
        raise ArtifactError("signing needs a secret (HMAC) or a private key (Ed25519)")

    def verify(self, message: bytes, signature: Mapping[str, str]) -> None:
        """Raises ArtifactError unless `signature` was made over `message` by the holder of our key."""
        algorithm, given = signature.get("algorithm"), str(signature.get("signature", ""))
        if algorithm == "hmac-sha256" and self._secret is not None:
            expected = hmac.new(self._secret, message, "sha256").hexdigest()
            # as bytes: compare_digest raises on text that is not ASCII, and `given` may be anything
            if not hmac.compare_digest(expected.encode(), given.encode("utf-8", "replace")):
                raise ArtifactError("the card's signature does not match the card")
        elif algorithm == "ed25519" and self._public is not None:
            public = _ed25519().Ed25519PublicKey.from_public_bytes(self._public)
            try:
                public.verify(bytes.fromhex(given), message)
            except Exception as exc:  # InvalidSignature, whose module is an extra, or no hexadecimal digits
                raise ArtifactError("the card's signature does not match the card") from exc
        else:
            raise ArtifactError(f"the card is signed with {algorithm!r}, for which this server has no key")


def public_key_of(private_key: bytes) -> bytes:
    """The Ed25519 public key, 32 bytes, to a private one of 32 bytes.

    Raises:
        ArtifactError: it has another length, or the extra `sign` is not installed.
    """
    try:
        public: bytes = _ed25519().Ed25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()
    except ValueError as exc:
        raise ArtifactError(f"an Ed25519 private key has 32 bytes, this one {len(private_key)}") from exc
    return public


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as exc:
        raise ArtifactError("Ed25519 signatures need the extra `sign`: pip install 'elbow[sign]'") from exc
    return ed25519


class Artifact:
    """A verified directory. Make one with `Artifact.open`; files are read only after their hash was checked."""

    def __init__(self, path: Path, card: Card, sha256: str):
        self.path, self.card, self.sha256 = path, card, sha256

    @classmethod
    def open(cls, path: str | os.PathLike[str], signer: Signer | None = None) -> Artifact:
        """Reads the card and checks every file it lists.

        Args:
            path: the version's directory.
            signer: if given, the card must carry a signature that this signer accepts.

        Raises:
            ArtifactError: with one message that says which file is wrong and how.
        """
        root = Path(path).resolve()
        raw = _read_card_bytes(root)
        if signer is not None:
            signer.verify(raw, _read_signature(root))
        card = _parse_card(raw, root)
        if not card.files:
            raise ArtifactError(f"{root}: the card lists no files")
        for name, spec in card.files.items():
            file = _inside(root, name)
            if not file.is_file():
                raise ArtifactError(f"{root}: {name} is missing")
            if file.stat().st_size != spec.bytes:
                raise ArtifactError(f"{root}: {name} has {file.stat().st_size} bytes, the card says {spec.bytes}: truncated or altered")
            if sha256_of(file) != spec.sha256:
                raise ArtifactError(f"{root}: {name} does not have the sha256 that the card states: altered")
        return cls(root, card, hashlib.sha256(raw).hexdigest())

    def file(self, name: str) -> Path:
        """The path of a listed file.

        Raises:
            ArtifactError: the card does not list it, so it was never verified.
        """
        if name not in self.card.files:
            raise ArtifactError(f"{self.path}: {name} is not listed in the card")
        return _inside(self.path, name)

    def weights(self) -> Arrays:
        return load_file(str(self.file(WEIGHTS)))

    def begin(self) -> Arrays:
        """A filter's state before the first frame, (n,) by the name of the state array; {} of a static model."""
        if not self.card.state:
            return {}
        weights = self.weights()
        constants = {spec.name: spec.name.replace("state.", "begin.", 1) for spec in self.card.state}
        missing = [constant for constant in constants.values() if constant not in weights]
        if missing:
            raise ArtifactError(f"{self.path}: {WEIGHTS} lacks {missing[0]}, the stream's first state")
        return {name: weights[constant].reshape(-1).astype(np.float32) for name, constant in constants.items()}

    def reference(self) -> dict[str, tuple[Arrays, Arrays]]:
        """program -> (inputs, float64 outputs), as the eager model computed them at export."""
        programs: dict[str, tuple[Arrays, Arrays]] = {}
        for key, value in load_file(str(self.file(REFERENCE))).items():
            program, side, name = key.split("/", 2)
            programs.setdefault(program, ({}, {}))[0 if side == "in" else 1][name] = value
        return programs

    def elbo_reference(self) -> tuple[Arrays, Array]:
        """What a further precision is held to: x (R, X) and, per level, the noise of K steps (K, R, S, D) and the measuring
        noise (R, M, D), called `refine0`, `measure0`, …; and each row's float64 ELBO after those steps, (R,).

        Raises:
            ArtifactError: the artifact has none.
        """
        arrays = load_file(str(self.file(ELBO_REFERENCE)))
        missing = {"x", "measure0", "elbo"} - arrays.keys()
        if missing:
            raise ArtifactError(f"{self.path}: {ELBO_REFERENCE} lacks {min(missing)}")
        return arrays, arrays.pop("elbo")


def write_card(path: Path, card: Card, signer: Signer | None = None) -> Card:
    """Hashes the files in `path`, completes the card with them and writes it, last, so that a crash leaves no valid artifact.

    Files become readable by everyone: a server seldom runs as the user who exported.
    """
    for file in path.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    files = {
        str(file.relative_to(path)): FileSpec(sha256=sha256_of(file), bytes=file.stat().st_size)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (CARD, SIGNATURE)
    }
    card = Card.model_validate({**card.model_dump(), "files": {name: spec.model_dump() for name, spec in files.items()}})
    raw = (json.dumps(card.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()
    if signer is not None:
        (path / SIGNATURE).write_text(json.dumps(signer.sign(raw)))
    temporary = path / (CARD + ".partial")
    temporary.write_bytes(raw)
    temporary.replace(path / CARD)
    return card


def sign_artifact(path: Path, signer: Signer) -> Artifact:
    """Writes the signature of a whole artifact beside its card, over one that may be there.

    Raises:
        ArtifactError: a file is not as the card says, or the signer has nothing to sign with.
    """
    artifact = Artifact.open(path)
    partial = artifact.path / (SIGNATURE + ".partial")
    partial.write_text(json.dumps(signer.sign(_read_card_bytes(artifact.path))))
    partial.replace(artifact.path / SIGNATURE)
    return artifact


def write_reference(path: Path, programs: Mapping[str, tuple[Mapping[str, Array], Mapping[str, Array]]]) -> None:
    """Writes the arrays `Artifact.reference` reads back."""
    flat = {
        f"{program}/{side}/{name}": np.ascontiguousarray(value)
        for program, pair in programs.items()
        for side, arrays in zip(("in", "out"), pair, strict=True)
        for name, value in arrays.items()
    }
    save_file(flat, str(path / REFERENCE))


def write_elbo_reference(path: Path, arrays: Mapping[str, Array], elbo: Array) -> None:
    """Writes what `Artifact.elbo_reference` reads back."""
    save_file({name: np.ascontiguousarray(value) for name, value in {**arrays, "elbo": elbo}.items()}, str(path / ELBO_REFERENCE))


def list_versions(repository: Path) -> Iterable[tuple[str, str, Path]]:
    """(name, version, path) of every directory in the repository that holds a card, versions in numeric order.

    Hidden directories are versions that an export has not finished.
    """
    for card in sorted(repository.glob(f"[!.]*/[!.]*/{CARD}"), key=lambda file: (file.parts[-3], version_key(file.parts[-2]))):
        yield card.parts[-3], card.parts[-2], card.parent


def version_key(version: str) -> tuple[tuple[int, int | str], ...]:
    """Orders '2' before '10' and '1.9' before '1.10'."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"[._-]", version))


def sha256_of(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def parity_error(measured: Array, reference: Array) -> float:
    """The largest |a − b| / max(1, |b|): at most 1e-4 for a float32 engine (architecture.md, section 7)."""
    if measured.shape != reference.shape:
        raise ArtifactError(f"parity: shape {measured.shape} instead of {reference.shape}")
    error = np.abs(measured.astype(np.float64) - reference) / np.maximum(1.0, np.abs(reference))
    return float(np.max(error, initial=0.0)) if np.all(np.isfinite(error)) else float("inf")


def _read_card_bytes(root: Path) -> bytes:
    try:
        return (root / CARD).read_bytes()
    except OSError as exc:
        raise ArtifactError(f"{root}: no readable {CARD}: not an Elbow artifact") from exc


def _read_signature(root: Path) -> dict[str, str]:
    try:
        signature = json.loads((root / SIGNATURE).read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise ArtifactError(f"{root}: this server takes signed artifacts only, and there is no readable {SIGNATURE}") from exc
    if not isinstance(signature, dict):
        raise ArtifactError(f"{root}: {SIGNATURE} is not a JSON object")
    return signature


def _parse_card(raw: bytes, root: Path) -> Card:
    try:
        parsed = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise ArtifactError(f"{root}: {CARD} is not JSON: {exc}") from exc
    version = parsed.get("format_version") if isinstance(parsed, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{root}: format version {version!r} is unknown: this Elbow reads version {FORMAT_VERSION}")
    try:
        return Card.model_validate(parsed)
    except ValidationError as exc:
        first = exc.errors()[0]
        raise ArtifactError(f"{root}: {CARD}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from exc


def _inside(root: Path, name: str) -> Path:
    file = (root / name).resolve()
    if not file.is_relative_to(root):
        raise ArtifactError(f"{root}: {name} leads out of the artifact")
    return file
