"""Which artifacts are served: the newest by default, the bad ones refused without harm to the others."""

from __future__ import annotations

import json
import logging

import pytest

from models.artifact import ArtifactError, Signer, write_card
from service.errors import UnknownModel
from service.repository import Repository


class Registered(dict):
    """Stands in for the scheduler: remembers what was added."""

    def add_model(self, key, engine):
        self[key] = engine

    def remove_model(self, key):
        del self[key]


class FakeEngine:
    name, precision = "fake", "float32"

    def __init__(self, artifact):
        self.card = artifact.card


@pytest.fixture
def write(tmp_path, make_card):
    def write(name, version, signer=None):
        folder = tmp_path / name / version
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"weights of " + version.encode())
        write_card(folder, make_card(name, version), signer)
        return folder

    return write


@pytest.fixture
def registered():
    return Registered()


def test_the_newest_version_is_the_default_and_ten_is_newer_than_two(tmp_path, write, registered):
    for version in ("1", "10", "2"):
        write("digits", version)
    repository = Repository(registered, FakeEngine)
    repository.load_all(tmp_path)
    assert repository.get("digits").version == "10"
    assert repository.get("digits", "2").version == "2"
    assert repository.versions("digits") == ["1", "2", "10"]
    assert registered.keys() == {"digits/1", "digits/2", "digits/10"}


def test_a_version_that_is_the_default_again_stays(tmp_path, write, registered):
    now = [0.0]
    write("digits", "1")
    repository = Repository(registered, FakeEngine, keep_s=60.0, clock=lambda: now[0])
    repository.load_all(tmp_path)
    write("digits", "2")
    repository.refresh()
    assert repository.get("digits").version == "2"

    repository.unload("digits", "2")  # rolled back
    now[0] = 61.0
    repository.tend()

    assert repository.get("digits").version == "1"
    assert repository.versions("digits") == ["1"]


def spoil_weights(folder):
    (folder / "weights.safetensors").write_bytes(b"weights of X")


def truncate_weights(folder):
    (folder / "weights.safetensors").write_bytes(b"w")


def remove_weights(folder):
    (folder / "weights.safetensors").unlink()


def make_foreign(folder):
    (folder / "artifact.json").write_text(json.dumps({"format_version": 99}))


def break_card(folder):
    (folder / "artifact.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_weights, "altered"),
        (truncate_weights, "truncated or altered"),
        (remove_weights, "is missing"),
        (make_foreign, "format version 99 is unknown"),
        (break_card, "not JSON"),
    ],
)
def test_a_bad_artifact_is_refused_by_one_line_and_the_rest_is_served(write, registered, caplog, spoil, words):
    folder = write("good", "1")
    spoil(write("bad", "1"))
    repository = Repository(registered, FakeEngine)
    with caplog.at_level(logging.ERROR, logger="elbow"):
        repository.load_all(folder.parent.parent)
    assert registered.keys() == {"good/1"}
    assert words in repository.failures["bad/1"]
    assert len(caplog.records) == 1
    assert words in caplog.records[0].reason


def test_a_card_of_another_name_than_its_folder_is_refused(tmp_path, write, registered):
    write("one", "1").rename(tmp_path / "one" / "3")
    repository = Repository(registered, FakeEngine)
    repository.load_all(tmp_path)
    assert "the folder says one/3" in repository.failures["one/3"]


def test_with_a_key_only_what_it_signed_is_served(tmp_path, write, registered):
    ours = Signer(secret=b"ours")
    write("signed", "1", ours)
    write("unsigned", "1")
    write("theirs", "1", Signer(secret=b"theirs"))
    repository = Repository(registered, FakeEngine, ours)
    repository.load_all(tmp_path)
    assert registered.keys() == {"signed/1"}
    assert "signed artifacts only" in repository.failures["unsigned/1"]
    assert "does not match" in repository.failures["theirs/1"]


def test_an_engine_that_cannot_load_it_refuses_the_artifact(tmp_path, write, registered):
    write("digits", "1")

    def build(artifact):
        raise ArtifactError("parity: off by 1")

    repository = Repository(registered, build)
    repository.load_all(tmp_path)
    assert repository.failures == {"digits/1": "parity: off by 1"}


def test_an_unknown_model_is_answered_with_what_there_is(tmp_path, write, registered):
    repository = Repository(registered, FakeEngine)
    with pytest.raises(UnknownModel, match="loaded are none"):
        repository.get("digits")
    write("digits", "1")
    repository.load_all(tmp_path)
    with pytest.raises(UnknownModel, match="no model 'x': loaded are digits"):
        repository.get("x")
    with pytest.raises(UnknownModel, match="no version '2': loaded are 1"):
        repository.get("digits", "2")


def test_no_folder_at_all_is_a_warning_not_a_crash(tmp_path, registered, caplog):
    Repository(registered, FakeEngine).load_all(tmp_path / "nowhere")
    assert "no such repository folder" in caplog.text
