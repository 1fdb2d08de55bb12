"""Command line of every peer: which artifact, which port, and the settings that load.py searches."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """`batch` rows at most, gathered for at most `window_ms`; `workers` processes compute, each with `threads` threads per operator."""

    artifact: Path
    port: int
    batch: int
    window_ms: float
    workers: int
    threads: int
    api_servers: int


def read_options(arguments: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser()
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--window-ms", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--api-servers", type=int, default=1)
    return Options(**vars(parser.parse_args(arguments)))
