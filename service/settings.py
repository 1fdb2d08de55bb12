"""All that comes from the environment or the command line, read once by the entry point and passed to `create_app`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "ELBOW_"
FOREIGN = frozenset({"ELBOW_DATA", "ELBOW_API_KEY"})  # read by training, and by the client: harmless here


class Settings(BaseSettings):
    """The deployment of one server. Each field is the environment variable ELBOW_<FIELD>; secrets are masked in `repr`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on")
    repository: Path = Field(default=Path("artifacts"), description="folder of <name>/<version>/ artifacts")
    watch_s: float = Field(default=0.0, ge=0, description="seconds between looks into the repository for new versions; 0: on request only")
    closed_form: bool = Field(default=False, description="also serve the exact conjugate-Gaussian stand-in, for demos and load runs")
    engine: Literal["auto", "onnx", "torchscript"] = Field(default="auto", description="auto: onnxruntime where installed, else torch")
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N; a GPU runs TorchScript")
    precision: Literal["float32", "int8"] = Field(
        default="float32", description="int8: where a card offers it, on ONNX Runtime; other models stay float32, and the log says why"
    )
    device_memory_mb: int = Field(default=0, ge=0, description="what all models together may use of the GPU; 0: 90 % of what is free")
    threads: int = Field(default=0, ge=0, le=1024, description="compute threads of the engine; 0: all cores but one, at least one")
    engine_process: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="on: scheduler and engines get a process of their own, beside the one that speaks HTTP; auto: with two cores or more",
    )
    signing_key: SecretStr | None = Field(default=None, description="if set, only artifacts signed with it (HMAC-SHA256) are loaded")
    public_key: str | None = Field(
        default=None,
        pattern=r"^[0-9a-fA-F]{64}$",
        description="if set, only artifacts signed with its private key (Ed25519) are loaded; needs the extra `sign`",
    )
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024, description="largest request body")
    max_rows: int = Field(default=10_000, ge=1, description="most rows in one request")
    max_samples: int = Field(default=256, ge=1, description="most measuring or drawn samples per row")
    max_importance_samples: int = Field(default=5_000, ge=1, description="most samples of the importance-weighted log p(x)")
    max_deadline_ms: float = Field(default=600_000.0, gt=0, description="longest deadline a client may name")
    queue_rows: int = Field(default=20_000, ge=1, description="rows that may wait, per model; beyond it: 503")
    max_wait_s: float = Field(
        default=1.0,
        gt=0,
        description="seconds of promised work, per model, beyond which requests get 503; elastic ones give up steps from a quarter of it",
    )
    keys_file: Path | None = Field(
        default=None, description="API keys, one a line: NAME SHA256 [ROW_STEPS_PER_SECOND[/BURST]] (elbow-serve key prints one)"
    )
    keys: SecretStr | None = Field(default=None, description="the same lines as a variable, separated by newlines or semicolons")
    admin_key_sha256: SecretStr | None = Field(default=None, description="sha256 of the key of the admin routes; unset: there are none")
    browser_token_ttl_s: float = Field(default=60.0, gt=0, description="how long a token of POST /v1/token opens WebSockets")
    cors_origins: str = Field(default="", description="origins of web pages that may call, separated by commas; * = all; empty: none")
    token_secret: SecretStr | None = Field(
        default=None, description="signs state tokens; the same on all replicas. Unset: drawn at start, and tokens end with the process"
    )
    token_ttl_s: float = Field(default=3600.0, gt=0, description="how long a state token holds")
    max_token_bytes: int = Field(default=65_536, ge=1024, description="largest state token")
    max_streams: int = Field(default=1024, ge=1, description="streams that may be open at once, per filter")
    max_sequences: int = Field(default=512, ge=1, description="sequences of the Open Inference Protocol that may be live at once")
    max_message_bytes: int = Field(default=2**20, ge=1024, description="largest WebSocket message")
    stream_idle_s: float = Field(default=60.0, gt=0, description="a stream that says nothing for so long is closed")
    tls_cert_file: Path | None = Field(default=None, description="certificate chain (PEM); with TLS_KEY_FILE: serve HTTPS and WSS")
    tls_key_file: Path | None = Field(default=None, description="its private key (PEM)")
    max_connections: int = Field(default=4096, ge=1, description="HTTP connections open at once; beyond it: 503")
    max_head_bytes: int = Field(default=16_384, ge=1024, description="largest request line and headers together; beyond it: 431")
    head_s: float = Field(default=10.0, gt=0, description="time for a request's head to arrive: 408")
    keep_alive_s: float = Field(default=15.0, gt=0, description="an idle connection is closed after so long")
    send_s: float = Field(default=30.0, gt=0, description="a client that takes nothing of its reply for so long is cut off")
    body_s: float = Field(default=10.0, gt=0, description="a body that has not arrived by then (and 16 KiB/s later) gets 408")
    drain_delay_s: float = Field(default=0.0, ge=0, description="time between unready and refusing at shutdown, for balancers to notice")
    drain_s: float = Field(default=10.0, ge=0, description="time that running requests get at shutdown")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="debug logs every request")

    @model_validator(mode="after")
    def _tls_takes_both(self) -> Settings:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file, tls_key_file: give both, or neither")
        return self

    @field_validator("public_key")
    @classmethod
    def _one_signature(cls, public_key: str | None, others: ValidationInfo) -> str | None:
        if public_key is not None and others.data.get("signing_key") is not None:
            raise ValueError("artifacts carry one signature: set this or ELBOW_SIGNING_KEY")
        return public_key

    @property
    def allowed_origins(self) -> list[str]:
        """`cors_origins` as a list."""
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]

    def key_lines(self) -> list[str]:
        """The lines of `keys_file`, then those of `keys`.

        Raises:
            ValueError: the file cannot be read.
        """
        lines: list[str] = []
        if self.keys_file is not None:
            try:
                lines = self.keys_file.read_text().splitlines()
            except OSError as exc:
                raise ValueError(f"ELBOW_KEYS_FILE: {exc}") from exc
            if not any(line.partition("#")[0].strip() for line in lines):
                raise ValueError(f"ELBOW_KEYS_FILE: {self.keys_file} holds no key; unset it to serve everybody")
        if self.keys is not None:
            lines += self.keys.get_secret_value().replace(";", "\n").splitlines()
        return lines

    @property
    def has_engine_process(self) -> bool:
        """Whether scheduler and engines run in a process of their own: on one core there would be nothing for a second one to run on."""
        return self.engine_process == "on" or (self.engine_process == "auto" and len(os.sched_getaffinity(0)) > 1)

    @property
    def engine_threads(self) -> int:
        """Threads for compute: what was asked for, else every core but the one that parses and answers."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) - 1)


def flag_names() -> dict[str, FieldInfo]:
    """The settings that may also be given on the command line: all but secrets, which every user of the machine could read there."""
    return {name: field for name, field in Settings.model_fields.items() if field.annotation != (SecretStr | None)}


def read_settings(environ: Mapping[str, str] = os.environ, flags: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment; `flags`, by field, come before it.

    Raises:
        ValueError: a value is out of bounds, or a variable begins with ELBOW_ and is none of ours (misspelt), naming it. Values are not
            repeated: some are secrets.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields} | FOREIGN
    unknown = sorted(name for name in environ if name.upper().startswith(PREFIX) and name.upper() not in known)
    if unknown:
        raise ValueError(f"unknown variable {', '.join(unknown)}: known are {', '.join(sorted(known))}")
    try:
        return Settings.model_validate(dict(flags or {}))
    except ValidationError as exc:
        raise ValueError("; ".join(_said(error) for error in exc.errors(include_input=False, include_url=False))) from None


def _said(error: Mapping[str, Any]) -> str:
    """One error in a line: the variable, the flag where there is one, and what it takes."""
    what = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return what
    field = str(error["loc"][0])
    flag = f" (--{field.replace('_', '-')})" if field in flag_names() else ""
    return f"{PREFIX}{field.upper()}{flag}: {what}"
