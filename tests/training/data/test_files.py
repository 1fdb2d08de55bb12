"""Roots, checksums and fingerprints."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from training.data.files import DataFile, fingerprint, locate, roots


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_roots_are_those_of_elbow_data_and_then_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELBOW_DATA", "/one::~/two")
    assert roots() == (Path("/one"), Path.home() / "two", Path("data"))
    assert roots("/only") == (Path("/only"),)
    monkeypatch.delenv("ELBOW_DATA")
    assert roots() == (Path("data"),)


def test_a_recompressed_copy_is_as_good_as_the_original(tmp_path: Path) -> None:
    path = tmp_path / "some.gz"
    file = DataFile("some.gz", sha256=sha256(gzip.compress(b"content", 9, mtime=0)), content_sha256=sha256(b"content"))
    for level, content, original in ((9, b"content", True), (1, b"content", True), (9, b"other", False)):
        path.write_bytes(gzip.compress(content, level, mtime=0))
        assert file.is_original(path) is original
    path.write_bytes(b"not gzip")
    assert not file.is_original(path)


def test_an_optional_file_may_be_absent_and_a_required_one_may_not(tmp_path: Path) -> None:
    files = (DataFile("images"), DataFile("labels", optional=True))
    assert locate("some", files, tmp_path) is None
    (tmp_path / "some").mkdir()
    (tmp_path / "some/labels").touch()
    assert locate("some", files, tmp_path) is None
    (tmp_path / "some/images").touch()
    assert locate("some", files, tmp_path) == (tmp_path / "some/images", tmp_path / "some/labels")


def test_the_fingerprint_is_the_files_own_hash_or_that_of_the_listing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    assert fingerprint([tmp_path / "a"]) == sha256(b"1")
    listing = f"{sha256(b'1')}  a\n{sha256(b'2')}  b\n"
    assert fingerprint([tmp_path / "a", tmp_path / "b"]) == sha256(listing.encode())
