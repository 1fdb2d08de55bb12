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
    """Replaces the network: mu of a row is its mean; `requests` counts, `interrupt_at` presses Ctrl-C there."""
    state = {"requests": 0, "interrupt_at": None, "shape": SHAPE}

    def answer(request):
        if request.method == "GET":
            return httpx.Response(200, json={"x": {"shape": state["shape"]}})
        state["requests"] += 1
        if state["requests"] == state["interrupt_at"]:
            signal.raise_signal(signal.SIGINT)
        rows = [float(np.mean(row)) for row in orjson.loads(request.content)["inputs"]]
        level = {"log_sigma": [0.0], "kl": 1.0}
        results = [
            {"elbo": -1.0, "steps_used": 2, "stop_reason": "steps", "posterior": {"step": 2, "levels": [level | {"mu": [mean]}]}}
            for mean in rows
        ]
        return httpx.Response(200, content=orjson.dumps({"model": "m", "version": "1", "results": results, "timing": {}}))

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
