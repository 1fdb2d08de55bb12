"""`python -m service.client stream FILE.wav`: one line per frame, and a summary."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

import orjson

from service.stream_client import FilterStream, StreamError

BAR = 40
KEY_VARIABLE = "ELBOW_API_KEY"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    stream = commands.add_parser("stream", help="stream a sound file through a filter and print what it says of each frame")
    stream.add_argument("file", type=Path, help="WAV; FLAC and others if soundfile is installed")
    stream.add_argument("--model", default="speech-filter")
    add_server(stream)
    stream.add_argument("--steps", type=int, help="refinement steps per frame; default: the trained number")
    stream.add_argument("--seed", type=int, default=0)
    stream.add_argument("--elastic", action="store_true", help="accept fewer steps when the stream lags")
    stream.add_argument("--realtime", action="store_true", help="send at the pace of speech")
    stream.add_argument("--return", dest="returns", default="", help="more of each frame, with --json: posterior,kl,reconstruction,…")
    stream.add_argument("--json", action="store_true", help="print each result as a line of JSON")
    stream.set_defaults(action=run)


def add_server(command: argparse.ArgumentParser) -> None:
    """Where the server is, and who calls."""
    command.add_argument("--url", default="http://127.0.0.1:8000")
    command.add_argument(
        "--api-key", default=os.environ.get(KEY_VARIABLE), help=f"default: the variable {KEY_VARIABLE}, which `ps` does not show"
    )


def run(options: argparse.Namespace) -> int:
    """The exit code: 1 if the stream was refused or lost."""
    try:
        asyncio.run(_print_frames(options))
    except (StreamError, ValueError) as exc:
        print(f"elbow: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


async def _print_frames(options: argparse.Namespace) -> None:
    stream = FilterStream(
        options.url,
        options.model,
        options.file,
        steps=options.steps,
        seed=options.seed,
        elastic=options.elastic or None,
        returns=[part for part in options.returns.split(",") if part],
        realtime=options.realtime,
        api_key=options.api_key,
    )
    async for frame in stream:
        if options.json:
            print(orjson.dumps(frame.raw).decode(), flush=True)
            continue
        rate, size = stream.opened["model_sample_rate"], stream.opened["frame_size"]
        seconds = f"{frame.frame * size / rate:7.3f} s" if rate else f"{frame.frame:7d}"
        rarity = frame.surprise_quantile or 0.0
        surprise = "   not finite" if frame.surprise is None else f"{frame.surprise:9.2f} nats"
        print(f"{seconds}  surprise {surprise}  {'▇' * round(BAR * rarity)}", flush=True)
    said = stream.summary
    if said is not None and not options.json:
        print(f"{said.frames} frames, ELBO {said.nats:.1f} nats, lag {said.lag_ms_mean:.1f} ms mean, {said.lag_ms_max:.1f} ms at most")
