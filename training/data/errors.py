"""The one exception of the data package: its message is meant for the person at the terminal."""

from __future__ import annotations


class DataError(Exception):
    """A data set is missing, damaged, or not what its name promises; the message says what to do about it."""


def reason(exc: BaseException) -> str:
    """What an exception says, or its name where it says nothing."""
    return str(exc) or type(exc).__name__
