"""elbow-serve run [--FLAG VALUE ...] | check ARTIFACT | bench ARTIFACT | key NAME | sign ARTIFACT …."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before anything can import onnxruntime, which else writes into the home folder

import numpy as np

from models.artifact import Arrays, Artifact, ArtifactError, Signer, sign_artifact
from service.engine.base import Engine
from service.engine.parity import PrecisionRefused, reduced_programs, verify_parity, verify_precision
from service.settings import flag_names
from service.signing import signer_of, signer_with

BATCHES = (1, 8, 64)
WARM_UP_CALLS = 5
BENCH_SECONDS = 0.5
RUN = "Each flag is also a variable, ELBOW_<FLAG>, and comes before it; secrets are variables only (docs/operations.md has them all)."


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "run":
            return run(_given(options))
        if options.command == "key":
            return key(options.name, options.quota)
        if options.command == "sign":
            return sign(options.artifact, options.private_key)
        return check(options.artifact) if options.command == "check" else bench(options.artifact, options.threads)
    except (ArtifactError, ValueError) as exc:  # pydantic's ValidationError is a ValueError
        print(f"elbow-serve: {exc}", file=sys.stderr)
        return 1


def run(flags: Mapping[str, str] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C; everything comes from `flags` or from ELBOW_ variables (service/settings.py)."""
    from service.app import create_app
    from service.process import serve
    from service.scheduler.scheduler import SWITCH_INTERVAL_S
    from service.settings import read_settings
    from service.telemetry import configure_logging

    settings = read_settings(flags=flags)
    configure_logging(settings.log_level)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    app = create_app(settings)
    return 0 if serve(app, settings, app.state.metrics) else 1


def check(path: Path) -> int:
    """Verifies hashes (and, with ELBOW_SIGNING_KEY or ELBOW_PUBLIC_KEY, the signature), then every program on every engine installed: its
    parity, or the nats that a further precision costs."""
    artifact = Artifact.open(path, _signer())
    card = artifact.card
    print(f"{card.name} {card.version}: {len(card.files)} files verified, {sum(file.bytes for file in card.files.values()):,} bytes")
    for engine in _engines(artifact, threads=1):
        for program, error in verify_parity(engine, artifact).items():
            print(f"{_label(engine):12} {program:18} largest error {error:.1e}")
        if changed := ", ".join(reduced_programs(engine)):
            lost, allowed = verify_precision(engine, artifact)
            print(f"{_label(engine):12} {changed:18} loses {lost:.3f} nats, at most {allowed:.3f}; rows do not see their neighbours")
        engine.close()
    return 0


def bench(path: Path, threads: int) -> int:
    """Prints the time of one step (a filter's frame, a direct model's `init`) by batch size on every engine installed."""
    artifact = Artifact.open(path, _signer())
    program = "frame_K" if artifact.card.family == "filter" else "step" if artifact.card.iterative else "init"
    print(f"{artifact.card.name} {artifact.card.version}: µs per {program}, {threads} thread{'s' if threads > 1 else ''}")
    print(f"{'engine':12}" + "".join(f"{f'batch {batch}':>12}" for batch in BATCHES))
    for engine in _engines(artifact, threads):
        times = (1e6 * _seconds(engine, program, _tiled(artifact, program, batch)) for batch in BATCHES)
        print(f"{_label(engine):12}" + "".join(f"{microseconds:12.0f}" for microseconds in times))
        engine.close()
    return 0


def key(name: str, quota: str | None) -> int:
    """Prints a new API key, and the line by which a server knows it; the key is kept nowhere."""
    from service.keys import ADMIN, KeyRing, digest_of, new_key

    made = new_key()
    digest = digest_of(made)
    print(f"key:  {made}")
    if name == ADMIN:
        print(f"set:  ELBOW_ADMIN_KEY_SHA256={digest}")
        return 0
    line = f"{name} {digest}" + (f" {quota}" if quota else "")
    KeyRing([line])  # refuses a name or quota that the server would refuse
    print(f"line: {line}")
    return 0


def sign(paths: Sequence[Path], private_key: Path | None) -> int:
    """Signs artifacts where they lie: with ELBOW_SIGNING_KEY, or with a private key, whose public one it prints."""
    signer, public_key = signer_with(os.environ.get("ELBOW_SIGNING_KEY") or None, private_key)
    for path in paths:
        card = sign_artifact(path, signer).card
        print(f"{card.name} {card.version}: signed")
    if public_key is not None:
        print(f"set:  ELBOW_PUBLIC_KEY={public_key}")
    return 0


def _engines(artifact: Artifact, threads: int) -> list[Engine]:
    from service.building import available_engines, build_engine

    formats = {format_ for program in artifact.card.programs.values() for format_ in program.files}
    engines = []
    for name in available_engines():
        if name in formats:
            engines.append(build_engine(artifact, name, threads))
            for precision in artifact.card.precisions if name == "onnx" else ():
                try:
                    engines.append(build_engine(artifact, name, threads, precision=precision))
                except PrecisionRefused as exc:  # by this processor: the artifact is sound, and served in float32
                    print(f"{name} {precision}: not on this machine, which serves float32 instead: {exc}", file=sys.stderr)
    if not engines:
        raise ArtifactError(f"{artifact.path}: has {sorted(formats)}, installed are {available_engines()}: nothing can run it")
    return engines


def _label(engine: Engine) -> str:
    return engine.name if engine.precision == "float32" else f"{engine.name} {engine.precision}"


def _tiled(artifact: Artifact, program: str, rows: int) -> Arrays:
    """The reference inputs of `program`, repeated or cut to `rows`."""
    inputs, _ = artifact.reference()[program]
    wanted = {tensor.name: tensor.dtype for tensor in artifact.card.programs[program].inputs}
    return {name: np.resize(inputs[name], (rows, *inputs[name].shape[1:])).astype(dtype) for name, dtype in wanted.items()}


def _seconds(engine: Engine, program: str, arrays: Arrays) -> float:
    """Median time of one call."""
    times: list[float] = []
    for _ in range(WARM_UP_CALLS):
        engine.run(program, arrays)
    until = time.perf_counter() + BENCH_SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        engine.run(program, arrays)
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def _signer() -> Signer | None:
    return signer_of(os.environ.get("ELBOW_SIGNING_KEY") or None, os.environ.get("ELBOW_PUBLIC_KEY") or None)


def _given(options: argparse.Namespace) -> dict[str, str]:
    """The flags of `run` that were given, by setting."""
    return {name: value for name in flag_names() if (value := getattr(options, name)) is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="elbow-serve", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="serve the repository", description=RUN, allow_abbrev=False)
    for name, field in flag_names().items():
        metavar = "BOOL" if field.annotation is bool else name.rpartition("_")[2].upper()
        command.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=str(field.description).replace("%", "%%"))
    command = commands.add_parser("key", help="make an API key: prints it once, and the line of its sha256 for ELBOW_KEYS_FILE")
    command.add_argument("name", help="whose key it is; `admin` for the key of the admin routes")
    command.add_argument("--quota", help="ROW_STEPS_PER_SECOND[/BURST]")
    command = commands.add_parser("sign", help="sign artifacts, for servers that load signed ones only")
    command.add_argument("artifact", type=Path, nargs="+", help="<repository>/<name>/<version>")
    command.add_argument(
        "--private-key", type=Path, help="file of 64 hexadecimal digits (Ed25519); without it ELBOW_SIGNING_KEY signs (HMAC)"
    )
    for name, text in (("check", "verify an artifact and its parity on every engine"), ("bench", "time one step on every engine")):
        command = commands.add_parser(name, help=text)
        command.add_argument("artifact", type=Path, help="<repository>/<name>/<version>")
        if name == "bench":
            command.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
