"""Bulk encoding from the shell: every row once, nothing lost when interrupted."""

from __future__ import annotations

import asyncio
import signal

import httpx
import numpy as np
import orjson
import pytest

from service import bulk
from service.client import AsyncElbowClient, ElbowClient

SHAPE = [28, 28]


@pytest.fixture
def answers(monkeypatch):
    """Replaces the network: mu of a row is its mean; `requests` counts, `paths` keeps their paths, `interrupt_at` presses Ctrl-C there,
    and from request `swap_at` on the server has what is in `swapped`. `refusal` is the reply to what is to be encoded."""
    served = {"version": "1", "precision": "float32", "sha256": "a" * 64}
    state = {"requests": 0, "interrupt_at": None, "shape": SHAPE, "served": served, "swap_at": None, "swapped": {}, "refusal": None}
    state["paths"] = []

    def answer(request):
        state["paths"].append(request.url.path)
        if request.method == "GET":
            return httpx.Response(200, json={"x": {"shape": state["shape"]}} | state["served"])
        state["requests"] += 1
        if state["requests"] == state["interrupt_at"]:
            signal.raise_signal(signal.SIGINT)
        if state["requests"] == state["swap_at"]:
            state["served"] = state["served"] | state["swapped"]
        if state["refusal"] is not None:
            return httpx.Response(422, json={"code": "invalid_input", "detail": state["refusal"]})
        rows = [float(np.mean(row)) for row in orjson.loads(request.content)["inputs"]]
        level = {"log_sigma": [0.0], "kl": 1.0}
        results = [
            {"elbo": -1.0, "steps_used": 2, "stop_reason": "steps", "posterior": {"step": 2, "levels": [level | {"mu": [mean]}]}}
            for mean in rows
        ]
        said = {name: state["served"][name] for name in ("version", "precision")}
        return httpx.Response(200, content=orjson.dumps({"model": "m", "results": results, "timing": {}} | said))

    async def answer_later(request):
        response = answer(request)
        await asyncio.sleep(0.01)  # long enough for Ctrl-C to arrive while the reply is on its way
        return response

    monkeypatch.setattr(bulk, "ElbowClient", lambda *args, **kw: ElbowClient(*args, transport=httpx.MockTransport(answer), **kw))
    later = httpx.MockTransport(answer_later)
    monkeypatch.setattr(bulk, "AsyncElbowClient", lambda *args, **kw: AsyncElbowClient(*args, transport=later, **kw))
    return state


def run(source, out, *more):
    return bulk.main(["encode", str(source), "--out", str(out), "--model", "m", "--batch", "4", *more])


@pytest.fixture
def source(tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).random((10, 784)).astype(np.float32))
    return tmp_path / "rows.npy"


def test_an_array_is_encoded_in_order(answers, source, tmp_path, capsys):
    out = tmp_path / "out.npz"
    assert run(source, out) == 0
    assert "10 rows" in capsys.readouterr().out
    with np.load(out) as encoded:
        assert np.allclose(encoded["mu"][:, 0], np.load(source).mean(axis=1))
        assert encoded["steps_used"].tolist() == [2] * 10
        assert encoded["elbo"].tolist() == [-1.0] * 10
        assert (str(encoded["version"]), str(encoded["precision"])) == ("1", "float32")
    assert answers["requests"] == 3
    assert not bulk.parts_of(out).exists()


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(answers, source, tmp_path, capsys):
    out = tmp_path / "out.npz"
    answers["interrupt_at"] = 2
    assert run(source, out, "--concurrency", "1") == 130
    assert "goes on from there" in capsys.readouterr().err
    assert (bulk.parts_of(out) / "0.npz").exists()
    assert not out.exists()
    answers.update(requests=0, interrupt_at=None)
    assert run(source, out) == 0
    assert answers["requests"] == 2
    with np.load(out) as encoded:
        assert np.allclose(encoded["mu"][:, 0], np.load(source).mean(axis=1))


def test_parts_of_another_run_are_not_mixed_in(answers, source, tmp_path, capsys):
    out = tmp_path / "out.npz"
    answers["interrupt_at"] = 2
    run(source, out, "--concurrency", "1")
    assert run(source, out, "--steps", "9") == 1
    assert "unfinished run of other rows or arguments" in capsys.readouterr().err


def interrupted(answers, source, out, *more):
    answers.update(interrupt_at=2, requests=0)
    assert run(source, out, "--concurrency", "1", *more) == 130
    answers.update(interrupt_at=None, requests=0)


@pytest.mark.parametrize("change", [{"version": "2", "sha256": "b" * 64}, {"sha256": "b" * 64}, {"precision": "int8"}])
def test_parts_of_another_artifact_are_not_mixed_in(answers, source, tmp_path, capsys, change):
    out = tmp_path / "out.npz"
    interrupted(answers, source, out)
    answers["served"] |= change
    assert run(source, out) == 1
    assert "finish it with --version 1 where that one is served, or remove the folder" in capsys.readouterr().err
    assert answers["requests"] == 0


def test_a_run_may_be_finished_by_a_replica_but_not_by_a_server_that_hides_its_artifact(answers, source, tmp_path, capsys):
    out = tmp_path / "out.npz"
    interrupted(answers, source, out, "--url", "http://one")
    assert run(source, out, "--url", "http://two") == 0
    answers["served"]["sha256"] = None
    interrupted(answers, source, out, "--url", "http://one")
    assert run(source, out, "--url", "http://two") == 1
    assert "at http://one; here is version 1 in float32, at http://two" in capsys.readouterr().err


def test_a_run_keeps_to_the_version_it_began_with(answers, source, tmp_path):
    out = tmp_path / "out.npz"
    assert run(source, out) == 0
    assert set(answers["paths"]) == {"/v1/models/m", "/v1/models/m/versions/1", "/v1/models/m/versions/1/encode"}
    answers["paths"].clear()
    assert run(source, out, "--version", "1") == 0
    assert set(answers["paths"]) == {"/v1/models/m/versions/1", "/v1/models/m/versions/1/encode"}


@pytest.mark.parametrize("change", [{"version": "2"}, {"precision": "int8"}, {"sha256": "b" * 64}])
def test_a_swap_in_the_midst_of_a_run_is_refused(answers, source, tmp_path, capsys, change):
    out = tmp_path / "out.npz"
    answers.update(swap_at=2, swapped=change)
    assert run(source, out, "--concurrency", "1") == 1
    assert f"remove {bulk.parts_of(out)} to begin anew" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--batch", "0"), ("--batch", "-4"), ("--concurrency", "0"), ("--retries", "-1"), ("--batch", "x")]
)
def test_numbers_that_make_no_sense_are_refused_when_they_are_read(answers, source, tmp_path, capsys, option, value):
    with pytest.raises(SystemExit) as caught:
        run(source, tmp_path / "out.npz", option, value)
    assert caught.value.code == 2
    assert f"argument {option}: must be a whole number of at least" in capsys.readouterr().err


def test_a_row_that_the_server_refuses_is_named_as_in_the_file(answers, source, tmp_path, capsys):
    interrupted(answers, source, tmp_path / "out.npz")
    answers["refusal"] = "inputs[1][5]: 2 is outside [0, 1]"
    assert run(source, tmp_path / "out.npz", "--concurrency", "1") == 1
    assert f"422 invalid_input: {source} row 5[5]: 2 is outside [0, 1]" in capsys.readouterr().err


def test_an_image_that_the_server_refuses_is_named(answers, tmp_path, capsys):
    save_image(tmp_path / "images", "a.png", np.zeros((28, 28), np.uint8))
    answers["refusal"] = "inputs[0][5]: 2 is outside [0, 1]"
    assert run(tmp_path / "images", tmp_path / "out.npz") == 1
    assert f"{tmp_path / 'images' / 'a.png'}[5]: 2 is outside" in capsys.readouterr().err


def test_a_run_that_failed_before_its_first_answer_leaves_nothing_in_the_way(answers, source, tmp_path):
    out = tmp_path / "out.npz"
    answers["interrupt_at"] = 1
    run(source, out, "--concurrency", "1")
    assert run(source, out, "--steps", "9") == 0


def test_a_folder_of_images_keeps_their_names(answers, tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name, grey in (("b.png", 255), ("deep/a.png", 0)):
        Image.fromarray(np.full((28, 28), grey, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    assert run(folder, tmp_path / "out.npz") == 0
    with np.load(tmp_path / "out.npz") as encoded:
        assert encoded["names"].tolist() == ["b.png", "deep/a.png"]
        assert encoded["mu"][:, 0].tolist() == [1.0, 0.0]


def save_image(folder, name, values, mode=None, **options):
    from PIL import Image

    folder.mkdir(exist_ok=True)
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(folder / name, **options)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a.png", np.full((28, 28), 32768, np.uint16)),
        ("a.tif", np.full((28, 28), 32768, np.uint16)),
        ("a.tif", np.full((28, 28), 32768, np.int32)),
        ("a.tif", np.full((28, 28), 0.5, np.float32)),
        ("a.png", np.full((28, 28), 128, np.uint8)),
        ("a.png", np.full((28, 28, 3), 128, np.uint8)),
        ("a.png", np.dstack([np.full((28, 28, 3), 128, np.uint8), np.full((28, 28), 255, np.uint8)])),
    ],
)
@pytest.mark.parametrize("shape", [[784], [14, 14]])
def test_grey_is_grey_in_any_depth(answers, tmp_path, name, values, shape):
    save_image(tmp_path / "images", name, values)
    answers["shape"] = shape
    assert run(tmp_path / "images", tmp_path / "out.npz", "--resize") == 0
    with np.load(tmp_path / "out.npz") as encoded:
        assert encoded["mu"][0, 0] == pytest.approx(0.5, abs=0.005)


OPAQUE_HALF = np.zeros((28, 28, 4), np.uint8)
OPAQUE_HALF[:14, :, 3] = 255


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("a.png", OPAQUE_HALF, "has transparent parts: put it on white or black first"),
        ("a.tif", np.full((28, 28), 3.5, np.float32), "has values from 3.5 to 3.5, not within 0 … 1"),
        ("a.tif", np.full((28, 28), np.nan, np.float32), "has values from nan to nan, not within 0 … 1"),
        ("a.tif", np.full((28, 28), 70000, np.int32), "has values from 70000 to 70000, not within 0 … 65535"),
    ],
)
def test_an_image_that_is_no_grey_picture_is_refused_by_name(answers, tmp_path, capsys, name, values, words):
    save_image(tmp_path / "images", name, values)
    assert run(tmp_path / "images", tmp_path / "out.npz") == 1
    assert f"{name}: {words}" in capsys.readouterr().err


def test_colours_and_depths_that_are_transparent_by_their_value_are_refused(answers, tmp_path, capsys):
    from PIL import Image

    save_image(tmp_path / "palette", "a.png", np.zeros((28, 28), np.uint8), "P", transparency=0)
    save_image(tmp_path / "deep", "a.png", np.zeros((28, 28), np.uint16), transparency=0)
    with Image.open(tmp_path / "deep" / "a.png") as image:
        assert image.has_transparency_data
    for folder in ("palette", "deep"):
        assert run(tmp_path / folder, tmp_path / "out.npz") == 1
        assert "a.png: has transparent parts" in capsys.readouterr().err


def test_modes_that_are_no_grey_are_refused_by_name(answers, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("LAB", (28, 28)).save(tmp_path / "images" / "a.tif")
    assert run(tmp_path / "images", tmp_path / "out.npz") == 1
    assert "a.tif: is of mode LAB" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_file_that_is_no_image_is_named(answers, tmp_path, capsys, content):
    save_image(tmp_path / "images", "a.png", np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8))
    file = tmp_path / "images" / "a.png"
    file.write_bytes(file.read_bytes()[:400] if content is None else content)
    assert run(tmp_path / "images", tmp_path / "out.npz") == 1
    assert f"{file}: not a readable image" in capsys.readouterr().err


def test_an_image_of_another_size_is_named_unless_resizing_is_asked_for(answers, tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.zeros((30, 20), np.uint8)).save(folder / "a.png")
    answers["shape"] = [784]
    assert run(folder, tmp_path / "out.npz") == 1
    assert "a.png: is 20 × 30, the model takes 28 × 28: pass --resize" in capsys.readouterr().err
    assert run(folder, tmp_path / "out.npz", "--resize") == 0


@pytest.mark.parametrize(("array", "words"), [(np.zeros(3), "first axis must be the row"), (np.zeros((0, 4)), "at least one")])
def test_an_array_without_rows_is_refused(answers, tmp_path, capsys, array, words):
    np.save(tmp_path / "rows.npy", array)
    assert run(tmp_path / "rows.npy", tmp_path / "out.npz") == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([[1.0, 2.0], [1.0, np.nan], [np.inf, 0.0]]), "row 1 is not finite (NaN or infinite), as are 2 in all"),
        (np.array([[0.0], [1e300]]), "row 1 is not finite"),
        (np.ones((2, 3), complex), "holds complex128: save rows of real numbers"),
        (np.array([["a", "b"]]), "holds <U1: save rows of real numbers"),
    ],
)
def test_rows_that_are_no_finite_numbers_are_refused_by_name(answers, tmp_path, capsys, array, words):
    np.save(tmp_path / "rows.npy", array)
    assert run(tmp_path / "rows.npy", tmp_path / "out.npz") == 1
    assert f"rows.npy: {words}" in capsys.readouterr().err
    assert answers["requests"] == 0


def test_an_archive_of_arrays_is_no_array(answers, source, tmp_path, capsys):
    np.savez(tmp_path / "rows.npz", x=np.load(source), y=np.zeros(3))
    assert run(tmp_path / "rows.npz", tmp_path / "out.npz") == 1
    assert "rows.npz: is an .npz of x, y: save the rows alone as .npy" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_array_is_named(answers, tmp_path, capsys, content):
    (tmp_path / "rows.npy").write_bytes(content)
    assert run(tmp_path / "rows.npy", tmp_path / "out.npz") == 1
    assert f"elbow: {tmp_path / 'rows.npy'}: " in capsys.readouterr().err


def test_an_address_that_is_none_is_a_line_and_no_traceback(source, tmp_path, capsys):
    for url in ("127.0.0.1:8077", "http://127.0.0.1:abc"):
        assert run(source, tmp_path / "out.npz", "--url", url) == 1
        assert capsys.readouterr().err.startswith("elbow: ")


def test_a_pickle_is_never_loaded(answers, tmp_path, capsys):
    np.save(tmp_path / "rows.npy", np.asarray([{"a": 1}]), allow_pickle=True)
    assert run(tmp_path / "rows.npy", tmp_path / "out.npz") == 1
    assert "not a readable .npy file" in capsys.readouterr().err


def test_bytes_that_are_0_and_1_stay_so(answers, tmp_path):
    np.save(tmp_path / "rows.npy", np.ones((1, 784), np.uint8))
    run(tmp_path / "rows.npy", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as encoded:
        assert encoded["mu"].tolist() == [[1.0]]


def test_bytes_from_0_to_255_become_grey_values_from_0_to_1(answers, tmp_path):
    np.save(tmp_path / "rows.npy", np.full((1, 784), 255, np.uint8))
    run(tmp_path / "rows.npy", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as encoded:
        assert encoded["mu"].tolist() == [[1.0]]
