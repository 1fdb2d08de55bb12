"""The one exception of the data package: its message is meant for the person at the terminal."""


class DataError(Exception):
    """A data set is missing, damaged, or not what its name promises; the message says what to do about it."""
