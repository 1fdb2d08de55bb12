"""elbow-serve check and bench on a real artifact, and run as a process that SIGTERM ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from models.artifact import SIGNATURE
from service import __main__ as cli
from service import building
from service.engine.parity import PrecisionRefused
from tests.int8 import needs_exact_int8

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "mnist-iterative" / "1"


@pytest.fixture
def artifact(tiny_repository, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(tiny_repository / "iterative" / "1", tmp_path / "1")
    return tmp_path / "1"


def test_check_prints_the_parity_of_every_program_on_every_engine(artifact, capsys):
    assert cli.main(["check", str(artifact)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "files verified" in lines[0]
    engines = {tuple(line.split()[:2]) for line in lines[1:]}
    assert {(engine, program) for engine in ("onnx", "torchscript") for program in ("init", "step", "score", "decode")} <= engines


def test_check_of_an_altered_artifact_is_one_clear_line(artifact, capsys):
    weights = artifact / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert cli.main(["check", str(artifact)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "weights.safetensors does not have the sha256" in captured.err


def test_check_of_something_else_is_one_clear_line(tmp_path, capsys):
    assert cli.main(["check", str(tmp_path)]) == 1
    assert "not an Elbow artifact" in capsys.readouterr().err


def test_check_refuses_an_unsigned_artifact_where_a_key_is_set(artifact, capsys, monkeypatch):
    monkeypatch.setenv("ELBOW_SIGNING_KEY", "secret")
    assert cli.main(["check", str(artifact)]) == 1
    assert "signed artifacts only" in capsys.readouterr().err


def test_an_artifact_signed_with_the_shared_secret_is_one_that_the_server_takes(artifact, tmp_path, capsys, monkeypatch):
    assert cli.main(["sign", str(artifact)]) == 1
    assert "set ELBOW_SIGNING_KEY" in capsys.readouterr().err
    monkeypatch.setenv("ELBOW_SIGNING_KEY", "secret")
    assert cli.main(["sign", str(artifact)]) == 0
    assert cli.main(["check", str(artifact)]) == 0
    monkeypatch.setenv("ELBOW_SIGNING_KEY", "another")
    assert cli.main(["check", str(artifact)]) == 1
    assert "signature does not match" in capsys.readouterr().err


def test_one_signed_with_a_private_key_is_checked_with_the_public_key_that_signing_prints(artifact, tmp_path, capsys, monkeypatch):
    key = tmp_path / "key"
    key.write_text("17" * 32 + "\n")
    assert cli.main(["sign", str(artifact), "--private-key", str(key)]) == 0
    public = capsys.readouterr().out.splitlines()[-1].removeprefix("set:  ELBOW_PUBLIC_KEY=")
    monkeypatch.setenv("ELBOW_PUBLIC_KEY", public)
    assert cli.main(["check", str(artifact)]) == 0
    monkeypatch.setenv("ELBOW_PUBLIC_KEY", "17" * 32)
    assert cli.main(["check", str(artifact)]) == 1
    assert "signature does not match" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "no digits", "17" * 31])
def test_a_file_that_holds_no_private_key_signs_nothing(artifact, tmp_path, capsys, content):
    key = tmp_path / "key"
    if content is not None:
        key.write_text(content)
    assert cli.main(["sign", str(artifact), "--private-key", str(key)]) == 1
    assert "private key" in capsys.readouterr().err
    assert not (artifact / SIGNATURE).exists()


def test_what_is_not_whole_is_not_signed(artifact, tmp_path, capsys, monkeypatch):
    (artifact / "weights.safetensors").write_bytes(b"cut")
    monkeypatch.setenv("ELBOW_SIGNING_KEY", "secret")
    assert cli.main(["sign", str(artifact)]) == 1
    assert "truncated or altered" in capsys.readouterr().err


def test_a_server_is_told_one_of_the_two_keys(capsys, monkeypatch):
    monkeypatch.setenv("ELBOW_SIGNING_KEY", "secret")
    assert cli.main(["run", "--public-key", "17" * 32]) == 1
    assert "artifacts carry one signature" in capsys.readouterr().err


def test_bench_prints_microseconds_by_engine_and_batch(artifact, capsys, monkeypatch):
    monkeypatch.setattr(cli, "BENCH_SECONDS", 0.01)
    assert cli.main(["bench", str(artifact)]) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert "µs per step, 1 thread" in title
    assert header.split() == ["engine", "batch", "1", "batch", "8", "batch", "64"]
    assert [row.split()[0] for row in rows] == ["onnx", "torchscript"]
    assert all(int(number) > 0 for row in rows for number in row.split()[1:])


def test_check_and_bench_pass_over_a_precision_that_this_processor_refuses(capsys, monkeypatch):
    """The artifact is sound, and such a machine serves it in float32."""
    plain = building.build_engine

    def build(artifact, name, threads=1, **options):
        if options.get("precision") == "int8":
            raise PrecisionRefused("loses 0.478 nats")
        return plain(artifact, name, threads, **options)

    monkeypatch.setattr(building, "build_engine", build)
    monkeypatch.setattr(cli, "BENCH_SECONDS", 0.01)
    for command in ("check", "bench"):
        assert cli.main([command, str(SHIPPED)]) == 0
        out, err = capsys.readouterr()
        assert "int8" not in out
        assert "onnx int8: not on this machine, which serves float32 instead: loses 0.478 nats" in err


@needs_exact_int8
def test_check_and_bench_cover_int8_where_the_card_offers_it(capsys, monkeypatch):
    monkeypatch.setattr(cli, "BENCH_SECONDS", 0.01)
    assert cli.main(["check", str(SHIPPED)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("onnx int8")]
    assert {line.split()[2] for line in lines[:-1]} == {"decode", "posterior_sample", "prior_sample", "sample_x", "score"}
    assert re.search(r"init, step +loses -?0\.0\d\d nats, at most 0\.0\d\d; rows do not see their neighbours", lines[-1])
    assert cli.main(["bench", str(SHIPPED)]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row[:12].strip() for row in rows] == ["onnx", "onnx int8", "torchscript"]


def test_run_refuses_a_misspelt_variable(monkeypatch, capsys):
    monkeypatch.setenv("ELBOW_PROT", "1")
    assert cli.main(["run"]) == 1
    assert "unknown variable ELBOW_PROT" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--prot", "--keys", "--token-secret"])  # misspelt; secrets, which anybody could read in the process list
def test_run_refuses_what_is_no_flag(flag, capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", flag, "1"])
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


@pytest.fixture
def server(tmp_path):
    """(process, url, log file) of `elbow-serve run` with the closed-form model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ELBOW_")}
    environment |= {"ELBOW_PORT": str(port), "ELBOW_CLOSED_FORM": "1", "ELBOW_REPOSITORY": str(tmp_path), "ELBOW_DRAIN_S": "0.2"}
    log = tmp_path / "log"
    with log.open("wb") as handle:
        process = subprocess.Popen([sys.executable, "-m", "service", "run"], env=environment, stderr=handle)
    try:
        _first_answer(f"http://127.0.0.1:{port}/readyz", process)
        yield process, f"http://127.0.0.1:{port}", log
    finally:
        process.kill()
        process.wait()


def test_run_serves_until_sigterm(server):
    process, url, log = server
    assert httpx.get(f"{url}/readyz").json()["models"] == ["closed-form/1"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) in (0, -signal.SIGTERM)
    assert '"message":"model loaded"' in log.read_text()


def test_a_request_longer_than_the_drain_is_answered_all_the_same(server):
    process, url, _ = server
    body = {"inputs": [[0.0] * 8] * 10_000, "steps": 128, "samples": 200, "return": ["elbo", "trace"]}
    with ThreadPoolExecutor() as pool:
        reply = pool.submit(httpx.post, f"{url}/v1/models/closed-form/encode", json=body, timeout=60)
        while 'elbow_rows_in_flight{model="closed-form",version="1"} 10000.0' not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        answer = reply.result(60)
    assert answer.status_code == 503
    assert answer.json()["code"] == "shutting_down"
    assert int(answer.headers["retry-after"]) >= 1
    assert process.wait(30) in (0, -signal.SIGTERM)


def _first_answer(url: str, server: subprocess.Popen[bytes]) -> httpx.Response:
    for _ in range(300):
        try:
            return httpx.get(url)
        except httpx.TransportError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.1)
    raise AssertionError("the server did not come up")
