"""The repository extension of the Open Inference Protocol, as Triton's own client uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.keys import digest_of
from tests.service.operations.conftest import add_version
from tests.service.streams.conftest import ServerProcess

http = pytest.importorskip("tritonclient.http")
Refused = pytest.importorskip("tritonclient.utils").InferenceServerException
ROOT = {"X-API-Key": "root"}


@pytest.fixture
def client(start: Callable[..., ServerProcess]) -> Iterator[Any]:
    with http.InferenceServerClient(f"127.0.0.1:{start(ELBOW_ADMIN_KEY_SHA256=digest_of('root')).port}") as client:
        yield client


def test_index_load_and_unload(client: Any, folder: Path) -> None:
    assert "model_repository" in client.get_server_metadata()["extensions"]
    add_version(folder, "iterative", "2")
    before = {(row["name"], row["version"]): row["state"] for row in client.get_model_repository_index(headers=ROOT)}
    assert before == {("iterative", "1"): "READY", ("iterative", "2"): "UNAVAILABLE", ("tiny-speech", "1"): "READY"}
    client.load_model("iterative", headers=ROOT)
    assert client.get_model_metadata("iterative")["versions"] == ["1", "2"]
    client.unload_model("iterative", headers=ROOT)
    assert not client.is_model_ready("iterative")
    assert {row["state"] for row in client.get_model_repository_index(headers=ROOT) if row["name"] == "iterative"} == {"UNAVAILABLE"}
    client.load_model("iterative", headers=ROOT)
    assert client.is_model_ready("iterative", "2")


def test_what_cannot_be_loaded_is_told_in_the_words_of_the_protocol(client: Any, folder: Path) -> None:
    with pytest.raises(Refused, match="failed to load 'nothing'"):
        client.load_model("nothing", headers=ROOT)
    (add_version(folder, "iterative", "2") / "artifact.json").write_text("{")
    with pytest.raises(Refused, match="failed to load 'iterative'"):
        client.load_model("iterative", headers=ROOT)
    with pytest.raises(Refused, match="config: is not supported"):
        client.load_model("iterative", headers=ROOT, config="{}")
    with pytest.raises(Refused, match="no model 'nothing'"):
        client.unload_model("nothing", headers=ROOT)
    with pytest.raises(Refused, match="admin key"):
        client.load_model("iterative")
    assert client.is_model_ready("iterative", "1")
