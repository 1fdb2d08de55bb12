"""What the numbers on the command line may be, and options that belong to another kind of model."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable

LARGEST_SEED = 2**32 - 1
"""Every generator of a run, its epochs and its processes gets a seed made of this one."""


class OptionError(Exception):
    """Options that do not go together; the message names them."""


def positive(text: str) -> int:
    """A whole number above 0. Raises ArgumentTypeError."""
    if not _is_whole(text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def natural(text: str) -> int:
    """A whole number, 0 or above. Raises ArgumentTypeError."""
    if not _is_whole(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or above")
    return int(text)


def seed(text: str) -> int:
    """A whole number from 0 to LARGEST_SEED. Raises ArgumentTypeError."""
    if not _is_whole(text) or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {LARGEST_SEED}")
    return int(text)


def seconds(text: str) -> float:
    """A finite number above 0. Raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def refuse_given(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raises OptionError if one of these options was given; their default must be None or False."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value is not False:
            raise OptionError(f"--{name.replace('_', '-')}: {why}: leave it out")


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18
