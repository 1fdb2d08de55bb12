"""Any folder of PNG and JPEG files, as grey images of one size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from training.data.errors import DataError, reason
from training.data.files import fingerprint_tree
from training.data.images import Bytes, Split

SUFFIXES = (".png", ".jpg", ".jpeg")
LARGEST = 64 * 64
"""Pixels of the images of a folder that are taken as they are: a fully connected model of larger ones is seldom what is meant."""
SIDEWAYS = (5, 6, 7, 8)
"""Orientations of EXIF in which width and height are changed over."""


def read_folder(folder: Path, shape: tuple[int, int]) -> tuple[Split, str]:
    """Every image below `folder`, in the order of its path, stretched to `shape`; and the sha256 of the whole.

    Returns:
        The images (N, height · width), and the hash over the relative paths and contents.

    Raises:
        DataError: no such folder, nothing in it, or a file that is no image.
    """
    files = _files(folder)
    return Split(np.stack([_read_grey(path, shape).reshape(-1) for path in files])), fingerprint_tree(folder, files)


def common_shape(folder: Path) -> tuple[int, int] | None:
    """(height, width) of every image below `folder` as it is seen upright, None where they differ; read from their headers alone.

    Raises:
        DataError: no such folder, nothing in it, or a file that is no image.
    """
    first, *rest = _files(folder)
    shape = _shape(first)
    return shape if all(_shape(path) == shape for path in rest) else None


def own_shape(folder: Path) -> tuple[int, int] | None:
    """`common_shape`, if it has at most LARGEST pixels."""
    shape = common_shape(folder)
    return shape if shape is not None and shape[0] * shape[1] <= LARGEST else None


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"{folder}: no {', '.join(SUFFIXES)} files in it")
    return files


def _shape(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as exc:
        raise DataError(f"{path}: not a readable image: {reason(exc)}") from exc


def _read_grey(path: Path, shape: tuple[int, int]) -> Bytes:
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        return np.asarray(_to_grey(upright).resize((shape[1], shape[0]), Image.Resampling.BILINEAR), dtype=np.uint8)


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray((np.asarray(image, dtype=np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:  # what is transparent is background, and background is 0
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), rgba).convert("L")
    return image.convert("L")
