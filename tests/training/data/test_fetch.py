"""Downloads from a real server on the loopback interface: whole, interrupted, altered, unreachable."""

from __future__ import annotations

import gzip
import hashlib
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from training.data.catalogue import Dataset
from training.data.errors import DataError
from training.data.fetch import fetch
from training.data.files import DataFile
from training.data.sequence_catalogue import SequenceSet
from training.data.sources import Source

CONTENT = np.random.default_rng(0).bytes(300_000)


@dataclass
class Mirror:
    """A server whose manners the test chooses, and what it was asked."""

    content: bytes = CONTENT
    stop_after: int | None = None
    resumes: bool = True
    status: int = 200
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers["Range"]
        self.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.resumes else 0
        if self.status != 200 or start >= len(self.content):
            handler.send_error(self.status if self.status != 200 else 416)
            return
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body if self.stop_after is None else body[: self.stop_after])


def _serve(mirror: Mirror) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mirror.answer(self)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    mirror = Mirror()
    with _serve(mirror) as server:
        mirror.url = f"http://127.0.0.1:{server.server_port}/file.bin"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield mirror
        server.shutdown()
        thread.join()


def dataset(*urls: str) -> Dataset:
    file = DataFile("file.bin", sha256=hashlib.sha256(CONTENT).hexdigest(), bytes=len(CONTENT), urls=urls)
    source = Source((file,), read=lambda paths: pytest.fail("fetching reads nothing"))
    return Dataset("some", "grey", train=1, valid=1, licence="", sources=(source,))


def test_a_file_is_downloaded_and_put_in_place(mirror: Mirror, tmp_path: Path) -> None:
    (path,) = fetch(dataset(mirror.url), tmp_path)
    assert path == tmp_path / "some/file.bin"
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["file.bin"]


def test_a_set_of_sequences_is_put_in_the_folder_it_is_read_from(mirror: Mirror, tmp_path: Path) -> None:
    image_set = dataset(mirror.url)
    sequences = SequenceSet("some", "binary", "music", train=1, valid=1, licence="", sources=image_set.sources)  # type: ignore[arg-type]
    assert fetch(sequences, tmp_path) == [tmp_path / "music/file.bin"]


def test_a_file_that_is_there_and_right_is_not_downloaded_again(mirror: Mirror, tmp_path: Path) -> None:
    fetch(dataset(mirror.url), tmp_path)
    fetch(dataset(mirror.url), tmp_path)
    assert len(mirror.ranges) == 1


def test_an_interrupted_download_goes_on_where_it_stopped(mirror: Mirror, tmp_path: Path) -> None:
    mirror.stop_after = 100_000
    with pytest.raises(DataError, match="Try again"):
        fetch(dataset(mirror.url), tmp_path)
    partial = tmp_path / "some/file.bin.partial"
    kept = partial.stat().st_size
    assert 0 < kept <= 100_000
    assert not (tmp_path / "some/file.bin").exists()
    mirror.stop_after = None
    (path,) = fetch(dataset(mirror.url), tmp_path)
    assert mirror.ranges == [None, f"bytes={kept}-"]
    assert path.read_bytes() == CONTENT
    assert not partial.exists()


def test_a_server_that_cannot_resume_is_read_from_the_start(mirror: Mirror, tmp_path: Path) -> None:
    mirror.resumes = False
    (tmp_path / "some").mkdir()
    (tmp_path / "some/file.bin.partial").write_bytes(CONTENT[:1_000])
    (path,) = fetch(dataset(mirror.url), tmp_path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"too long"], ids=["complete", "too long"])
def test_a_partial_file_as_long_as_the_original_is_checked_too(mirror: Mirror, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some/file.bin.partial").write_bytes(left)
    if left == CONTENT:
        (path,) = fetch(dataset(mirror.url), tmp_path)
        assert mirror.ranges == []
    else:
        with pytest.raises(DataError, match="checksum"):
            fetch(dataset(mirror.url), tmp_path)
        (path,) = fetch(dataset(mirror.url), tmp_path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("content", [b"\0" + CONTENT[1:], CONTENT + b"more"], ids=["altered", "longer"])
def test_an_altered_file_never_gets_its_name(mirror: Mirror, tmp_path: Path, content: bytes) -> None:
    mirror.content = content
    with pytest.raises(DataError, match="does not have the published checksum"):
        fetch(dataset(mirror.url), tmp_path)
    assert list((tmp_path / "some").iterdir()) == []


def test_the_next_mirror_is_tried_where_one_fails(mirror: Mirror, tmp_path: Path) -> None:
    (path,) = fetch(dataset("http://127.0.0.1:9/file.bin", mirror.url), tmp_path)
    assert path.read_bytes() == CONTENT


def test_without_a_network_the_message_says_where_to_put_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        fetch(dataset("http://127.0.0.1:9/file.bin"), tmp_path)
    for part in ("127.0.0.1:9", "http://127.0.0.1:9/file.bin", str(tmp_path / "some/file.bin"), "ELBOW_DATA"):
        assert part in str(error.value)


def test_a_refusal_by_the_server_is_reported_with_its_status(mirror: Mirror, tmp_path: Path) -> None:
    mirror.status = 404
    with pytest.raises(DataError, match="404"):
        fetch(dataset(mirror.url), tmp_path)


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to .*--to"):
        fetch(dataset("http://127.0.0.1:9/file.bin"), tmp_path / "file")


def test_a_set_without_a_public_copy_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no public copy"):
        fetch(dataset(), tmp_path)


def test_what_was_fetched_can_be_loaded(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path of `fetch` then `load`, with the catalogue's own row for MNIST pointed at the loopback mirror."""
    from dataclasses import replace

    from training.data import catalogue

    images = np.zeros((5_001, 28, 28), np.uint8)
    mirror.content = gzip.compress(struct.pack(">4I", 0x803, *images.shape) + images.tobytes())
    file = DataFile(
        "train-images-idx3-ubyte.gz",
        sha256=hashlib.sha256(mirror.content).hexdigest(),
        bytes=len(mirror.content),
        urls=(mirror.url,),
    )
    original = catalogue.MNIST.sources[1]
    row = replace(catalogue.MNIST, sources=(replace(original, files=(file,)),))
    monkeypatch.setitem(catalogue.CATALOGUE, "mnist", row)
    fetch(row, tmp_path)
    assert len(catalogue.load("mnist", tmp_path).train) == 1
