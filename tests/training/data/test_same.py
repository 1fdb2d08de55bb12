"""Data that changed since a checkpoint was trained on them; published forms of one set are the same data."""

from __future__ import annotations

import pytest

from training.data.catalogue import CATALOGUE
from training.data.errors import DataError
from training.data.same import refuse_other_data

ARCHIVE = "b91f08589ac0b4249f6dd03f8a39f1d91f38eb257228e0ec3fba9a949c7be368"


def test_other_files_are_refused_with_both_sha256s_and_what_to_do() -> None:
    with pytest.raises(DataError, match=r"tiny was trained on another folder:x \(sha256 aaaaaaaaaaaa…\) .* \(bbbbbbbbbbbb…\).*--data"):
        refuse_other_data("tiny", "folder:x", "a" * 64, "b" * 64)
    with pytest.raises(DataError, match="another mnist"):
        refuse_other_data("tiny", "mnist", ARCHIVE, "b" * 64)
    refuse_other_data("tiny", "folder:x", "a" * 64, "a" * 64)
    refuse_other_data("tiny", "folder:x", None, "a" * 64)


def test_mnist_in_its_original_format_is_the_mnist_of_the_archive() -> None:
    """The shipped models were trained on the archive, and `data fetch` brings the original files."""
    published = set().union(*(source.published() for source in CATALOGUE["mnist"].sources))
    assert ARCHIVE in published
    assert len(published) == 3  # the archive; images alone; images and labels
    for other in published:
        refuse_other_data("mnist-direct", "mnist", ARCHIVE, other)
