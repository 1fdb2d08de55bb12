"""python -m service.client encode FILE.npy|FOLDER …: encodes many rows, a few requests at a time, and loses nothing.

Each answered batch is written at once beside the output (OUT.npz.parts/); a second run with the same arguments does only what
is missing, and the last batch joins all of them into OUT.npz: mu, log_sigma (N, D), elbo (N,) in nats, steps_used (N,), and for a
folder the file names.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from service import stream_cli
from service.client import AsyncElbowClient, ElbowClient, ElbowHTTPError, Reply

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
COLUMNS = ("mu", "log_sigma", "elbo", "steps_used")


class BulkError(Exception):
    """The rows cannot be read, or belong to another run; the message says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "stream":
        return int(options.action(options))
    try:
        rows, names = read_rows(options.source, options.url, options.model, options.resize, options.api_key)
        asyncio.run(encode_all(rows, names, options))
    except (BulkError, ElbowHTTPError, httpx.TransportError, OSError) as exc:
        print(f"elbow: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nelbow: interrupted; what is done is in {parts_of(options.out)}, the same command goes on from there", file=sys.stderr)
        return 130
    print(f"{len(rows)} rows -> {options.out}")
    return 0


def read_rows(source: Path, url: str, model: str, resize: bool, api_key: str | None = None) -> tuple[NDArray[Any], list[str]]:
    """(N, *X) rows and, for a folder of images, their file names. Bytes up to 255 become 0 … 1; bytes that are 0 and 1 are so already.

    Raises:
        BulkError: no such file, no image in the folder, or an image of another size than the model's.
    """
    if source.is_dir():
        with ElbowClient(url, model=model, api_key=api_key) as client:
            height, width = image_size(client.card()["x"]["shape"])
        files = sorted(file for file in source.rglob("*") if file.suffix.lower() in IMAGES)
        if not files:
            raise BulkError(f"{source}: no image in this folder")
        rows = np.stack([_read_image(file, width, height, resize) for file in files])
        return rows.reshape(len(files), -1), [str(file.relative_to(source)) for file in files]
    try:
        array = np.load(source, allow_pickle=False)
    except (OSError, ValueError) as exc:
        raise BulkError(f"{source}: not a readable .npy file: {exc}") from exc
    if array.ndim < 2 or not len(array):
        raise BulkError(f"{source}: has shape {array.shape}; the first axis must be the row, with at least one")
    grey = array.dtype == np.uint8 and array.size > 0 and array.max() > 1
    return (array / np.float32(255) if grey else array).astype(np.float32), []


def image_size(shape: Sequence[int]) -> tuple[int, int]:
    """(height, width) of images that fit a model's x: its last two sizes, or the square of a flat one."""
    if len(shape) >= 2 and int(np.prod(shape)) == shape[-1] * shape[-2]:
        return shape[-2], shape[-1]
    side = round(float(np.prod(shape)) ** 0.5)
    if side * side != int(np.prod(shape)):
        raise BulkError(f"this model's x of shape {list(shape)} is no grey image: encode an .npy file instead")
    return side, side


async def encode_all(rows: NDArray[Any], names: list[str], options: argparse.Namespace) -> None:
    """Encodes what is not yet done and joins the parts."""
    from tqdm import tqdm

    parts = parts_of(options.out)
    _claim(parts, rows, options)
    starts = [start for start in range(0, len(rows), options.batch) if not (parts / f"{start}.npz").exists()]
    turn = asyncio.Semaphore(options.concurrency)
    done = len(rows) - sum(len(rows[start : start + options.batch]) for start in starts)
    async with AsyncElbowClient(options.url, model=options.model, retries=options.retries, api_key=options.api_key) as client:
        with tqdm(total=len(rows), initial=done, unit="row", disable=None) as bar:

            async def encode(start: int) -> None:
                async with turn:
                    batch = rows[start : start + options.batch]
                    reply = await client.encode(
                        batch, steps=options.steps, deadline_ms=options.deadline_ms, tolerance=options.tolerance, seed=options.seed
                    )
                    _write(parts / f"{start}.npz", _columns(reply))
                    bar.update(len(batch))

            try:
                async with asyncio.TaskGroup() as group:
                    for start in starts:
                        group.create_task(encode(start))
            except ExceptionGroup as failures:  # the first one stopped the others; parts already written stay
                raise failures.exceptions[0] from None
    _join(parts, len(rows), options, names)


def parts_of(out: Path) -> Path:
    """Where the answered batches of an unfinished run lie."""
    return out.with_name(out.name + ".parts")


def _claim(parts: Path, rows: NDArray[Any], options: argparse.Namespace) -> None:
    """Makes the folder of parts, or checks that the one there is of the same rows and arguments."""
    wanted = {name: getattr(options, name) for name in ("model", "steps", "deadline_ms", "tolerance", "seed", "batch")}
    wanted["rows"] = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
    stamp = parts / "run.json"
    if any(parts.glob("*.npz")):
        if json.loads(stamp.read_text()) != wanted:
            raise BulkError(f"{parts} holds an unfinished run of other rows or arguments: finish it, or remove the folder")
        return
    parts.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(wanted))


def _columns(reply: Reply) -> dict[str, NDArray[Any]]:
    return {
        "mu": reply.mu,
        "log_sigma": reply.log_sigma,
        "elbo": reply.elbo,
        "steps_used": np.asarray([row.steps_used for row in reply.rows]),
    }


def _write(path: Path, columns: dict[str, NDArray[Any]]) -> None:
    """Whole or not at all, also when interrupted."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as handle:
        np.savez(handle, **columns)  # type: ignore[arg-type]  # savez's own keyword makes the others look like booleans
    partial.replace(path)


def _join(parts: Path, rows: int, options: argparse.Namespace, names: list[str]) -> None:
    loaded = [np.load(parts / f"{start}.npz") for start in range(0, rows, options.batch)]
    columns = {name: np.concatenate([part[name] for part in loaded]) for name in COLUMNS}
    for part in loaded:
        part.close()
    _write(options.out, columns | ({"names": np.asarray(names)} if names else {}))
    shutil.rmtree(parts)


def _read_image(file: Path, width: int, height: int, resize: bool) -> NDArray[np.float32]:
    from PIL import Image

    with Image.open(file) as image:
        grey = image.convert("L")
        if grey.size != (width, height):
            if not resize:
                raise BulkError(f"{file}: is {grey.width} × {grey.height}, the model takes {width} × {height}: pass --resize")
            grey = grey.resize((width, height))
        return np.asarray(grey, np.float32) / np.float32(255)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service.client")
    commands = parser.add_subparsers(dest="command", required=True)
    stream_cli.add_parser(commands)
    encode = commands.add_parser("encode", help="encode an .npy file or a folder of images")
    encode.add_argument("source", type=Path, help=".npy file (rows first) or folder of images")
    encode.add_argument("--out", type=Path, required=True, help=".npz to write")
    encode.add_argument("--model", required=True)
    stream_cli.add_server(encode)
    encode.add_argument("--steps", type=int, help="refinement steps; default: the trained number")
    encode.add_argument("--deadline-ms", type=float, help="time limit of each request")
    encode.add_argument("--tolerance", type=float, help="stop a row that gains less than this many nats over 4 steps")
    encode.add_argument("--seed", type=int, default=0)
    encode.add_argument("--batch", type=int, default=64, help="rows per request")
    encode.add_argument("--concurrency", type=int, default=4, help="requests at a time")
    encode.add_argument("--retries", type=int, default=20, help="how often a refused request (503, 429) is sent again")
    encode.add_argument("--resize", action="store_true", help="resize images that do not fit")
    return parser
