"""`elbow-train data` as a user types it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from training.data import cli
from training.data.catalogue import CATALOGUE
from training.data.errors import DataError
from training.data.sequence_catalogue import SEQUENCES

CHORALES = Path(__file__).resolve().parents[2] / "data/chorales_sample.npz"
SAMPLE = Path(__file__).resolve().parents[2] / "data/mnist_sample.npz"


@pytest.fixture(autouse=True)
def _no_data_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ELBOW_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return cli.run(parser.parse_args(["data", *arguments]))


def write_mnist(root: Path) -> None:
    (root / "mnist").mkdir()
    np.savez_compressed(root / "mnist/mnist.npz", x_train=np.zeros((5_001, 28, 28), np.uint8))


def test_the_list_names_every_set_and_says_how_to_get_the_missing_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_mnist(tmp_path)
    assert run() == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == {"name", *CATALOGUE, *SEQUENCES}
    assert "differs" in lines["mnist"]
    assert str(tmp_path / "mnist/mnist.npz") in lines["mnist"]
    assert "missing: elbow-train data fetch omniglot" in lines["omniglot"]
    assert "missing: elbow-train data fetch jsb" in lines["jsb"]
    assert "no checked download is known" in lines["fsdd"]


def test_check_reads_a_set_and_fails_where_it_is_not_the_published_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_mnist(tmp_path)
    assert run("check", "mnist") == 1
    out = capsys.readouterr().out
    assert "1 training and 5,000 validation images of 28 x 28" in out
    assert "not the published file" in out


def test_check_takes_an_archive_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", f"npz:{SAMPLE}") == 0
    assert "256 training and 64 validation images" in capsys.readouterr().out


def test_check_describes_sequences_with_the_nats_of_independent_notes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", f"rolls:{CHORALES}") == 0
    out = capsys.readouterr().out
    assert "train: 12 sequences" in out
    assert "nats per frame" in out


def test_check_describes_audio_by_its_mean_and_std(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", f"audio:{CHORALES.parent / 'digits'}") == 0
    assert "200 samples of mono PCM at 8000 Hz" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("check", "mnist"), ("check", "cifar"), ("fetch", "cifar")])
def test_errors_go_to_stderr_with_status_1(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    assert run(*arguments) == 1
    assert capsys.readouterr().err.startswith("elbow-train data: ")


@pytest.mark.parametrize("action", ["check", "fetch"])
@pytest.mark.parametrize("name", ["mnists", "folder:"])
def test_an_unknown_name_is_answered_with_all_names_and_schemes(action: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(action, name) == 1
    error = capsys.readouterr().err
    assert f"{name!r}" in error
    assert all(known in error for known in (*CATALOGUE, *SEQUENCES, "folder:PATH", "npz:PATH", "rolls:FILE", "audio:FOLDER", "midi:FOLDER"))


def test_check_describes_the_images_that_a_run_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    for i in range(3):
        Image.new("L", (12, 10), i).save(tmp_path / f"mine/{i}.png")
    assert run("check", f"folder:{tmp_path / 'mine'}") == 0
    assert "images of 10 x 12" in capsys.readouterr().out
    Image.new("L", (70, 70)).save(tmp_path / "mine/large.png")
    assert run("check", f"folder:{tmp_path / 'mine'}") == 0
    assert "images of 28 x 28" in capsys.readouterr().out


def test_check_says_which_recordings_are_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for path in (CHORALES.parent / "digits").glob("*.wav"):
        shutil.copy(path, tmp_path)
    short = sorted(tmp_path.glob("*.wav"))[0]
    samples, rate = soundfile.read(short)
    soundfile.write(tmp_path / "z.wav", samples[:100], rate)
    soundfile.write(tmp_path / "zz.wav", samples, rate)
    assert run("check", f"audio:{tmp_path}") == 0
    assert "1 of 5 recordings are shorter than a frame of 200 samples, and left out" in capsys.readouterr().out


def test_fetch_puts_a_set_where_it_is_told_and_says_how_to_use_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched: list[Path] = []
    monkeypatch.setattr(cli, "fetch", lambda dataset, folder: fetched.append(folder) or [folder / dataset.name])
    assert run("fetch", "mnist") == 0
    assert "export" not in capsys.readouterr().out
    assert run("fetch", "mnist", "--to", "elsewhere") == 0
    assert "export ELBOW_DATA=elsewhere" in capsys.readouterr().out
    assert fetched == [tmp_path, Path("elsewhere")]


def test_a_failed_download_is_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise DataError("no network")

    monkeypatch.setattr(cli, "fetch", fail)
    assert run("fetch", "mnist") == 1
    assert "no network" in capsys.readouterr().err
