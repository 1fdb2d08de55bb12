"""The artifact: what is written is read back, and everything foreign, altered or outside is refused with one clear message."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from models.artifact import (
    CARD,
    ELBO_REFERENCE,
    REFERENCE,
    SIGNATURE,
    WEIGHTS,
    Artifact,
    ArtifactError,
    Card,
    Curve,
    LevelSpec,
    LikelihoodSpec,
    ProgramSpec,
    Quantiles,
    Signer,
    TensorSpec,
    XSpec,
    list_versions,
    parity_error,
    version_key,
    write_card,
    write_reference,
)

SECRET = b"a shared secret"


def card(name: str = "tiny", version: str = "1") -> Card:
    mu = TensorSpec(name="q0.mu", shape=("rows", 2))
    return Card(
        name=name,
        version=version,
        family="static",
        x=XSpec(shape=(2, 3)),
        likelihood=LikelihoodSpec(name="bernoulli", parameters=("logits",)),
        levels=(LevelSpec(name="q0", size=2, parameters={"mu": "q0.mu"}),),
        carry=(mu,),
        trained_steps=5,
        max_steps=128,
        samples=1,
        antithetic=False,
        programs={"init": ProgramSpec(inputs=(TensorSpec(name="x", shape=("rows", 6)),), outputs=(mu,), files={"onnx": "init.onnx"})},
        curve=Curve(steps=(0, 1), elbo=(-2.0, -1.0), elbo_std=(1.0, 1.0), rows=10, samples=20),
        quantiles=Quantiles(probabilities=(0.5,), steps=(0, 1), elbo=((-2.0,), (-1.0,))),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "repository" / "tiny" / "1")


def write(folder: Path, signer: Signer | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"weights")
    (folder / "init.onnx").write_bytes(b"a graph")
    write_reference(folder, {"init": ({"x": np.zeros((2, 6), np.float32)}, {"q0.mu": np.ones((2, 2))})})
    write_card(folder, card(version=folder.name), signer)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / CARD).read_text())
    change(values)
    (folder / CARD).write_text(json.dumps(values))


def test_a_levels_mean_is_named_first_however_the_card_is_sorted() -> None:
    assert list(LevelSpec(name="z", size=2, parameters={"log_sigma": "b", "mu": "a"}).parameters) == ["mu", "log_sigma"]


def test_what_is_written_is_read_back(folder: Path) -> None:
    artifact = Artifact.open(folder)
    assert artifact.card.name == "tiny"
    assert artifact.card.x.size == 6
    assert not artifact.card.iterative
    assert set(artifact.card.files) == {WEIGHTS, REFERENCE, "init.onnx"}
    assert artifact.file("init.onnx").read_bytes() == b"a graph"
    ((inputs, outputs),) = [artifact.reference()["init"]]
    assert inputs["x"].shape == (2, 6)
    assert outputs["q0.mu"].dtype == np.float64


def test_a_folder_without_a_card_is_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no readable artifact\.json: not an Elbow artifact"):
        Artifact.open(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100_000], ids=["cut", "not text", "empty", "nested too deep"])
def test_a_card_that_is_not_json_is_refused(content: bytes, folder: Path) -> None:
    (folder / CARD).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"artifact\.json is not JSON"):
        Artifact.open(folder)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_format_version_is_refused(version: object, folder: Path) -> None:
    rewrite(folder, lambda values: values.update(format_version=version))
    with pytest.raises(ArtifactError, match=r"format version .* is unknown: this Elbow reads version 1"):
        Artifact.open(folder)


def test_json_that_is_no_card_is_refused(folder: Path) -> None:
    (folder / CARD).write_text("[1, 2]")
    with pytest.raises(ArtifactError, match="format version None is unknown"):
        Artifact.open(folder)
    (folder / CARD).write_text('{"format_version": 1}')
    with pytest.raises(ArtifactError, match=r"artifact\.json: name: Field required"):
        Artifact.open(folder)


def test_an_unknown_field_of_the_card_is_refused(folder: Path) -> None:
    rewrite(folder, lambda values: values.update(surprise=1))
    with pytest.raises(ArtifactError, match="surprise: Extra inputs are not permitted"):
        Artifact.open(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"weig")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors has 4 bytes, the card says 7: truncated or altered"):
        Artifact.open(folder)


def test_an_altered_file_of_the_same_length_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"Weights")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors does not have the sha256 that the card states: altered"):
        Artifact.open(folder)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "init.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"init\.onnx is missing"):
        Artifact.open(folder)


def test_a_folder_in_the_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / "init.onnx").unlink()
    (folder / "init.onnx").mkdir()
    with pytest.raises(ArtifactError, match=r"init\.onnx is missing"):
        Artifact.open(folder)


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/passwd", "a/b/c", ".hidden", "a\\b", ""])
def test_a_path_that_is_not_plainly_inside_is_refused(path: str, folder: Path) -> None:
    (folder.parent / "secret").write_bytes(b"weights")
    rewrite(folder, lambda values: values["files"].update({path: values["files"][WEIGHTS]}))
    with pytest.raises(ArtifactError, match="is not a plain path inside the artifact"):
        Artifact.open(folder)


def test_a_link_that_leads_outside_is_refused(folder: Path) -> None:
    outside = folder.parent / "secret"
    outside.write_bytes(b"weights")
    (folder / WEIGHTS).unlink()
    os.symlink(outside, folder / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors leads out of the artifact"):
        Artifact.open(folder)


def test_a_file_that_the_card_does_not_list_is_not_read(folder: Path) -> None:
    (folder / "extra.onnx").write_bytes(b"?")
    with pytest.raises(ArtifactError, match=r"extra\.onnx is not listed in the card"):
        Artifact.open(folder).file("extra.onnx")


def test_a_program_whose_file_is_not_listed_is_refused(folder: Path) -> None:
    rewrite(folder, lambda values: values["files"].pop("init.onnx"))
    with pytest.raises(ArtifactError, match=r"programs\.init: the file 'init\.onnx' is not listed"):
        Artifact.open(folder)


def int8(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A card that offers int8, the file of `init` in the place of a quantised one."""
    spec = {"cost_nats": 0.02, "cost_std": 0.1, "rows": 100, "samples": 20, "programs": {"init": {"onnx": "init.onnx"}}, **changes}
    return lambda values: values.update(precisions={"int8": spec})


def test_a_further_precision_is_read(folder: Path) -> None:
    rewrite(folder, int8())
    assert Artifact.open(folder).card.precisions["int8"].programs == {"init": {"onnx": "init.onnx"}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cost_nats": 0.051}, "precisions.int8.cost_nats: Input should be less than or equal to 0.05"),
        ({"programs": {"step": {"onnx": "init.onnx"}}}, "precisions.int8: there is no program 'step'"),
        ({"programs": {"init": {"onnx": "init.int8.onnx"}}}, "precisions.int8.init: the file 'init.int8.onnx' is not listed"),
        ({"programs": {}}, "precisions.int8.programs: Dictionary should have at least 1 item"),
    ],
    ids=["too costly", "unknown program", "unlisted file", "nothing"],
)
def test_a_further_precision_that_costs_too_much_or_has_no_program_is_refused(changes: dict[str, Any], reason: str, folder: Path) -> None:
    rewrite(folder, int8(**changes))
    with pytest.raises(ArtifactError, match=re.escape(reason)):
        Artifact.open(folder)


@pytest.mark.parametrize("missing", ["x", "measure0", "elbo"])
def test_rows_that_a_precision_is_held_to_must_be_whole(missing: str, folder: Path) -> None:
    arrays = {"x": np.zeros((3, 6), np.float32), "measure0": np.zeros((3, 2, 2), np.float32), "elbo": np.zeros(3)}
    save_file({name: value for name, value in arrays.items() if name != missing}, folder / ELBO_REFERENCE)
    write_card(folder, card())
    with pytest.raises(ArtifactError, match=f"{ELBO_REFERENCE} lacks {missing}"):
        Artifact.open(folder).elbo_reference()


def test_a_card_without_files_is_refused(folder: Path) -> None:
    rewrite(folder, lambda values: values.update(files={}))
    with pytest.raises(ArtifactError, match="the card lists no files"):
        Artifact.open(folder)


def test_a_level_that_is_not_carried_is_refused(folder: Path) -> None:
    rewrite(folder, lambda values: values["levels"][0]["parameters"].update(mu="q9.mu"))
    with pytest.raises(ArtifactError, match=r"levels: 'q0' names the array 'q9\.mu', which is not in the carry"):
        Artifact.open(folder)


def ed25519() -> tuple[bytes, bytes]:
    key = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519").Ed25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def test_a_card_signed_with_a_shared_secret_is_accepted(tmp_path: Path) -> None:
    folder = write(tmp_path / "1", Signer(secret=SECRET))
    assert Artifact.open(folder, Signer(secret=SECRET)).card.name == "tiny"


def test_a_card_signed_with_a_private_key_is_accepted_by_the_public_one(tmp_path: Path) -> None:
    private, public = ed25519()
    folder = write(tmp_path / "1", Signer(private_key=private))
    assert Artifact.open(folder, Signer(public_key=public)).card.name == "tiny"
    _, other = ed25519()
    with pytest.raises(ArtifactError, match="signature does not match"):
        Artifact.open(folder, Signer(public_key=other))


def test_an_unsigned_card_is_refused_where_signatures_are_required(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="takes signed artifacts only"):
        Artifact.open(folder, Signer(secret=SECRET))


@pytest.mark.parametrize("signature", ["0" * 64, "", "ünïcode", None])
def test_a_wrong_signature_is_refused(signature: str | None, tmp_path: Path) -> None:
    folder = write(tmp_path / "1", Signer(secret=SECRET))
    (folder / SIGNATURE).write_text(json.dumps({"algorithm": "hmac-sha256", "signature": signature}))
    with pytest.raises(ArtifactError, match="signature does not match"):
        Artifact.open(folder, Signer(secret=SECRET))


def test_a_signature_by_another_secret_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "1", Signer(secret=b"another"))
    with pytest.raises(ArtifactError, match="signature does not match"):
        Artifact.open(folder, Signer(secret=SECRET))


def test_a_card_changed_after_signing_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "1", Signer(secret=SECRET))
    rewrite(folder, lambda values: values.update(description="better than it is"))
    with pytest.raises(ArtifactError, match="signature does not match"):
        Artifact.open(folder, Signer(secret=SECRET))


@pytest.mark.parametrize("algorithm", ["ed25519", "none", None])
def test_a_signature_of_an_algorithm_without_a_key_is_refused(algorithm: str | None, tmp_path: Path) -> None:
    folder = write(tmp_path / "1", Signer(secret=SECRET))
    (folder / SIGNATURE).write_text(json.dumps({"algorithm": algorithm, "signature": "00"}))
    with pytest.raises(ArtifactError, match="for which this server has no key"):
        Artifact.open(folder, Signer(secret=SECRET))


@pytest.mark.parametrize("content", ["[]", "{", '"x"'])
def test_a_signature_file_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "1", Signer(secret=SECRET))
    (folder / SIGNATURE).write_text(content)
    with pytest.raises(ArtifactError, match=r"artifact\.json\.sig"):
        Artifact.open(folder, Signer(secret=SECRET))


def test_signing_needs_a_key() -> None:
    with pytest.raises(ArtifactError, match="needs a secret"):
        Signer(public_key=b"0" * 32).sign(b"card")


def test_versions_are_ordered_as_numbers_where_they_are_numbers() -> None:
    ordered = ["1", "1.9", "1.10", "2", "2-rc", "10", "beta"]
    assert sorted(reversed(ordered), key=version_key) == ordered


def test_a_version_of_strange_digits_is_text() -> None:
    """'²'.isdigit() holds and int('²') fails: one such folder made the whole repository unreadable."""
    assert version_key("²") == ((1, "²"),)


def test_versions_of_a_repository_are_listed_in_order_and_unfinished_ones_left_out(tmp_path: Path) -> None:
    for version in ("10", "2", ".3.partial"):
        folder = tmp_path / "tiny" / version
        folder.mkdir(parents=True)
        (folder / CARD).write_text("{}")
    (tmp_path / "tiny" / "4").mkdir()
    (tmp_path / "a-file").write_text("")
    assert [(name, version) for name, version, _ in list_versions(tmp_path)] == [("tiny", "2"), ("tiny", "10")]


def test_parity_is_relative_above_one_and_absolute_below() -> None:
    assert parity_error(np.float32([1e-3, 200.0]), np.float64([0.0, 100.0])) == pytest.approx(1.0)
    assert parity_error(np.float32([1e-3]), np.float64([0.0])) == pytest.approx(1e-3)
    assert parity_error(np.float32([np.nan]), np.float64([0.0])) == float("inf")
    assert parity_error(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0
    with pytest.raises(ArtifactError, match=r"shape \(2,\) instead of \(3,\)"):
        parity_error(np.zeros(2), np.zeros(3))
