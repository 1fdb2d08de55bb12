"""python -m service.client encode FILE.npy|FOLDER …: encodes many rows, a few requests at a time, and loses nothing.

Each answered batch is written at once beside the output (OUT.npz.parts/); a second run with the same arguments does only what
is missing, and the last batch joins all of them into OUT.npz: mu, log_sigma (N, D), elbo (N,) in nats, steps_used (N,), the model's
version and precision, and for a folder the file names. All parts are of one artifact and precision: a run keeps to the version that was
the newest when it began, and another one is refused. Images become grey values in 0 … 1, of whatever depth; transparent ones are refused.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from numpy.typing import NDArray

from service import stream_cli
from service.client import AsyncElbowClient, ElbowClient, ElbowHTTPError, Reply

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
COLUMNS = ("mu", "log_sigma", "elbo", "steps_used")
EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
"""Pillow's modes that become grey values by 255 levels."""


class BulkError(Exception):
    """The rows cannot be read, or belong to another run; the message says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "stream":
        return int(options.action(options))
    try:
        card = _card(options)
        rows, names = read_rows(options.source, card["x"]["shape"], options.resize)
        asyncio.run(encode_all(rows, names, card, options))
    except (BulkError, ElbowHTTPError, httpx.TransportError, httpx.InvalidURL, OSError) as exc:
        print(f"elbow: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nelbow: interrupted; what is done is in {parts_of(options.out)}, the same command goes on from there", file=sys.stderr)
        return 130
    print(f"{len(rows)} rows -> {options.out}")
    return 0


def read_rows(source: Path, shape: Sequence[int], resize: bool) -> tuple[NDArray[np.float32], list[str]]:
    """(N, *X) rows and, for a folder of images, their file names. Bytes up to 255 become 0 … 1; bytes that are 0 and 1 are so already.

    Raises:
        BulkError: no such file, no image in the folder, an image that does not fit the model's x of `shape`, or an array that is not
            rows of finite numbers.
    """
    if source.is_dir():
        height, width = image_size(shape)
        files = sorted(file for file in source.rglob("*") if file.suffix.lower() in IMAGES)
        if not files:
            raise BulkError(f"{source}: no image in this folder")
        rows = np.stack([_read_image(file, width, height, resize) for file in files])
        return rows.reshape(len(files), -1), [str(file.relative_to(source)) for file in files]
    try:
        with source.open("rb") as handle:
            array = np.load(handle, allow_pickle=False)
    except EOFError as exc:
        raise BulkError(f"{source}: is empty: save the rows again (np.save)") from exc
    except (OSError, ValueError, zipfile.BadZipFile) as exc:
        raise BulkError(f"{source}: not a readable .npy file: {exc}") from exc
    if not isinstance(array, np.ndarray):
        raise BulkError(f"{source}: is an .npz of {', '.join(array.files) or 'nothing'}: save the rows alone as .npy (np.save)")
    return _checked(array, source), []


def _checked(array: NDArray[Any], source: Path) -> NDArray[np.float32]:
    if array.ndim < 2 or not array.size:
        raise BulkError(f"{source}: has shape {array.shape}; the first axis must be the row, with at least one")
    if array.dtype.kind not in "fiub":
        raise BulkError(f"{source}: holds {array.dtype}: save rows of real numbers (array.astype('float32'))")
    grey = array.dtype == np.uint8 and array.max() > 1
    with np.errstate(over="ignore"):  # refused below
        rows = (array / np.float32(255) if grey else array).astype(np.float32)
    finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    if not finite.all():
        row, count = int(np.argmin(finite)), int((~finite).sum())
        raise BulkError(f"{source}: row {row} is not finite (NaN or infinite), as are {count} in all: fill them in, or leave them out")
    return rows


def image_size(shape: Sequence[int]) -> tuple[int, int]:
    """(height, width) of images that fit a model's x: its last two sizes, or the square of a flat one."""
    if len(shape) >= 2 and int(np.prod(shape)) == shape[-1] * shape[-2]:
        return shape[-2], shape[-1]
    side = round(float(np.prod(shape)) ** 0.5)
    if side * side != int(np.prod(shape)):
        raise BulkError(f"this model's x of shape {list(shape)} is no grey image: encode an .npy file instead")
    return side, side


async def encode_all(rows: NDArray[Any], names: list[str], card: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Encodes what is not yet done by the model of `card`, and joins the parts.

    Raises:
        BulkError: the parts there are of another run or artifact, the server changed its model meanwhile, or it refused a row.
    """
    from tqdm import tqdm

    parts, version, precision = parts_of(options.out), card["version"], card["precision"]
    _claim(parts, rows, card, options)
    starts = [start for start in range(0, len(rows), options.batch) if not (parts / f"{start}.npz").exists()]
    turn = asyncio.Semaphore(options.concurrency)
    done = len(rows) - sum(len(rows[start : start + options.batch]) for start in starts)
    who = {"model": options.model, "version": version, "retries": options.retries, "api_key": options.api_key}
    async with AsyncElbowClient(options.url, **who) as client:
        with tqdm(total=len(rows), initial=done, unit="row", disable=None) as bar:

            async def encode(start: int) -> None:
                async with turn:
                    batch = rows[start : start + options.batch]
                    try:
                        reply = await client.encode(
                            batch, steps=options.steps, deadline_ms=options.deadline_ms, tolerance=options.tolerance, seed=options.seed
                        )
                    except ElbowHTTPError as exc:
                        raise BulkError(_in_file(str(exc), start, names, options.source)) from exc
                    if (reply.version, reply.precision) != (version, precision):
                        raise _changed(parts, card, f"version {reply.version} in {reply.precision}")
                    _write(parts / f"{start}.npz", _columns(reply))
                    bar.update(len(batch))

            try:
                async with asyncio.TaskGroup() as group:
                    for start in starts:
                        group.create_task(encode(start))
            except ExceptionGroup as failures:  # the first one stopped the others; parts already written stay
                raise failures.exceptions[0] from None
        if starts and (now := _identity(await client.card(), options)) != _identity(card, options):
            raise _changed(parts, card, _named(now))
    _join(parts, len(rows), options, names)


def _card(options: argparse.Namespace) -> dict[str, Any]:
    who = {"model": options.model, "version": options.version, "retries": options.retries, "api_key": options.api_key}
    with ElbowClient(options.url, **who) as client:
        return client.card()


def _identity(card: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What a run's parts have in common: the artifact by its hash, wherever it is served; without one, this version of this server."""
    where = {"sha256": card["sha256"]} if card.get("sha256") else {"url": options.url}
    return {"version": card["version"], "precision": card["precision"]} | where


def _named(identity: Mapping[str, Any]) -> str:
    where = f"sha256 {identity['sha256'][:12]}…" if "sha256" in identity else f"at {identity['url']}"
    return f"version {identity['version']} in {identity['precision']}, {where}"


def _changed(parts: Path, card: Mapping[str, Any], now: str) -> BulkError:
    return BulkError(
        f"the run began with version {card['version']} in {card['precision']}, the server now answers with {now}: serve the former again "
        f"and go on with the same command, or remove {parts} to begin anew"
    )


def _in_file(message: str, start: int, names: list[str], source: Path) -> str:
    """The server's message about a batch, with its rows named as in the file or folder they came from."""

    def named(found: re.Match[str]) -> str:
        row = start + int(found[1])
        return str(source / names[row]) if names else f"{source} row {row}"

    return re.sub(r"\binputs\[(\d+)\]", named, message)


def parts_of(out: Path) -> Path:
    """Where the answered batches of an unfinished run lie."""
    return out.with_name(out.name + ".parts")


def _claim(parts: Path, rows: NDArray[Any], card: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Makes the folder of parts, or checks that the one there is of the same rows, arguments and artifact."""
    wanted = {name: getattr(options, name) for name in ("model", "steps", "deadline_ms", "tolerance", "seed", "batch")}
    wanted["rows"] = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
    stamp, served = parts / "run.json", _identity(card, options)
    if any(parts.glob("*.npz")):
        found = json.loads(stamp.read_text())
        before = found.pop("served", None)
        if found != wanted or before is None:
            raise BulkError(f"{parts} holds an unfinished run of other rows or arguments: finish it, or remove the folder")
        if before != served:
            raise BulkError(
                f"{parts} holds an unfinished run by {options.model} {_named(before)}; here is {_named(served)}: "
                f"finish it with --version {before['version']} where that one is served, or remove the folder"
            )
        return
    parts.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(wanted | {"served": served}))


def _columns(reply: Reply) -> dict[str, NDArray[Any]]:
    return {
        "mu": reply.mu,
        "log_sigma": reply.log_sigma,
        "elbo": reply.elbo,
        "steps_used": np.asarray([row.steps_used for row in reply.rows]),
        "version": np.asarray(reply.version),
        "precision": np.asarray(reply.precision),
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
    columns |= {name: loaded[0][name] for name in ("version", "precision")}
    for part in loaded:
        part.close()
    _write(options.out, columns | ({"names": np.asarray(names)} if names else {}))
    shutil.rmtree(parts)


def _read_image(file: Path, width: int, height: int, resize: bool) -> NDArray[np.float32]:
    """(height, width) grey values, 0 … 1: colours by their luminance, 16 bits by 65,535, floats as they are.

    Raises:
        BulkError: no readable image, another size, floats beyond 0 … 1, or transparent parts: whether they are white or black, which is
            what a model sees most of, is not for this program to guess.
    """
    from PIL import Image as pil

    try:
        with pil.open(file) as image:
            image.load()
            grey = _grey(image, file)
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as exc:
        raise BulkError(f"{file}: not a readable image: {exc}") from exc
    if grey.size != (width, height):
        if not resize:
            raise BulkError(f"{file}: is {grey.width} × {grey.height}, the model takes {width} × {height}: pass --resize")
        grey = grey.resize((width, height))
    values = np.asarray(grey, np.float32)
    return np.clip(values, 0, 1) if grey.mode == "F" else values / np.float32(255)  # resizing overshoots


def _grey(image: Image, file: Path) -> Image:
    """Of mode L or, where there are more than 256 levels, F in 0 … 1."""
    from PIL.Image import fromarray

    if image.has_transparency_data and (image.mode not in EIGHT_BIT or image.convert("RGBA").getchannel("A").getextrema() != (255, 255)):
        raise BulkError(f"{file}: has transparent parts: put it on white or black first (magick IN -background white -flatten OUT)")
    if image.mode in EIGHT_BIT:
        return image.convert("L")
    levels = 65535 if image.mode.startswith("I") else 1 if image.mode == "F" else None
    if levels is None:
        raise BulkError(f"{file}: is of mode {image.mode}, which this program cannot read as grey: save it as grey or RGB")
    values = np.asarray(image, np.float32)
    if not (values.min() >= 0 and values.max() <= levels):  # written so that NaN fails
        raise BulkError(f"{file}: has values from {values.min():g} to {values.max():g}, not within 0 … {levels}: scale it to that first")
    return fromarray(values / np.float32(levels))


def _whole_from(least: int) -> Callable[[str], int]:
    """For argparse: whole numbers of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        return int(text)

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service.client")
    commands = parser.add_subparsers(dest="command", required=True)
    stream_cli.add_parser(commands)
    encode = commands.add_parser("encode", help="encode an .npy file or a folder of images")
    encode.add_argument("source", type=Path, help=".npy file (rows first) or folder of images")
    encode.add_argument("--out", type=Path, required=True, help=".npz to write")
    encode.add_argument("--model", required=True)
    encode.add_argument("--version", help="of the model; default: the newest when the run begins")
    stream_cli.add_server(encode)
    encode.add_argument("--steps", type=int, help="refinement steps; default: the trained number")
    encode.add_argument("--deadline-ms", type=float, help="time limit of each request")
    encode.add_argument("--tolerance", type=float, help="stop a row that gains less than this many nats over 4 steps")
    encode.add_argument("--seed", type=int, default=0)
    encode.add_argument("--batch", type=_whole_from(1), default=64, help="rows per request")
    encode.add_argument("--concurrency", type=_whole_from(1), default=4, help="requests at a time")
    encode.add_argument("--retries", type=_whole_from(0), default=20, help="how often a refused request (503, 429) is sent again")
    encode.add_argument("--resize", action="store_true", help="resize images that do not fit")
    return parser
