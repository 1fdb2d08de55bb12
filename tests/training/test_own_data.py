"""`elbow-train train RUN --on DATA`: sizes follow from the data, the run's folder says all, and what cannot be learnt is one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mido
import numpy as np
import pytest
import soundfile
from PIL import Image

from models.architecture import FilterArchitecture, OwnFilterArchitecture, SRNNArchitecture, VRNNArchitecture
from training import runs
from training.__main__ import main
from training.checkpoint import load_filter, load_static
from training.config import RefinementConfig, RunConfig
from training.data.readers.folder import common_shape
from training.evaluate_filter import FilterEffort, evaluate_filter
from training.export_filter import describe_filter
from training.export_static import describe_static
from training.report.make import Report
from training.sequence_config import SequenceDataConfig, SequenceRunConfig

SAMPLES = Path(__file__).parents[1] / "data"
OWN = OwnFilterArchitecture(hidden=(8,))
MUSIC = SequenceRunConfig(
    "music",
    FilterArchitecture(SRNNArchitecture(latent=3, hidden=6, prior_hidden=(6,), decoder_hidden=(6,)), OWN),
    SequenceDataConfig(frames=8),
    RefinementConfig(steps=0),
    epochs=1,
    compiled=False,
)
SPEECH = replace(
    MUSIC,
    name="speech",
    architecture=FilterArchitecture(
        VRNNArchitecture(latent=3, hidden=6, cell="gru", x_hidden=(6,), z_hidden=(6,), prior_hidden=(6,), decoder_hidden=(6,)), OWN
    ),
    data=SequenceDataConfig("fsdd", frames=8),
)


@pytest.fixture(autouse=True)
def somewhere(tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory without data sets, and three tiny runs."""
    monkeypatch.setenv("ELBOW_DATA", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    tiny = replace(tiny_run, epochs=1)
    for run in (tiny, replace(tiny, name="later", parent="tiny", frozen=("generative",)), MUSIC, SPEECH):
        monkeypatch.setitem(runs.RUNS, run.name, lambda run=run: run)
    return tmp_path


def write_images(folder: Path, count: int = 12, size: tuple[int, int] = (10, 12)) -> None:
    """Real digits, `size` wide and high."""
    folder.mkdir(parents=True)
    digits = np.load(SAMPLES / "mnist_sample.npz")["train"]
    for i in range(count):
        Image.fromarray(digits[i]).resize(size).save(folder / f"{i}.png")


def write_songs(folder: Path, count: int = 3) -> None:
    folder.mkdir()
    for i in range(count):
        track = mido.MidiTrack()
        for k in range(12):
            note = 60 + k * (i + 2) % 12
            track += [mido.Message("note_on", note=note, time=0), mido.Message("note_off", note=note, time=480)]
        mido.MidiFile(ticks_per_beat=480, tracks=[track]).save(folder / f"{i}.mid")


def saved(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text())["run"])


def test_images_decide_the_size_of_x_and_the_folder_is_named_after_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "my images")
    assert main(["train", "tiny", "--on", "folder:my images"]) == 0
    folder = Path("runs/tiny-my-images")
    assert str(folder) in capsys.readouterr().out
    run = saved(folder)
    assert run["name"] == "tiny-my-images"
    assert run["data"] == {"name": f"folder:{tmp_path / 'my images'}", "mask_probability": 0.5, "shape": [12, 10]}
    assert run["architecture"]["generative"]["x_size"] == 120


def test_images_of_several_sizes_get_that_of_the_run_and_any_can_be_asked_for(tmp_path: Path) -> None:
    write_images(tmp_path / "mixed")
    Image.new("L", (5, 5)).save(tmp_path / "mixed/small.png")
    assert main(["train", "tiny", "--on", "folder:mixed"]) == 0
    assert saved(Path("runs/tiny-mixed"))["data"]["shape"] == [28, 28]
    assert main(["train", "tiny", "--on", "folder:mixed", "--size", "6x9", "--output", "other"]) == 0
    assert saved(Path("other"))["data"]["shape"] == [6, 9]
    assert load_static(Path("other"))[0].generative.x_size == 54


def test_the_common_shape_is_that_of_the_upright_image(tmp_path: Path) -> None:
    write_images(tmp_path / "turned", count=2)
    assert common_shape(tmp_path / "turned") == (12, 10)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (12, 10)).save(tmp_path / "turned/sideways.jpg", exif=exif)
    assert common_shape(tmp_path / "turned") == (12, 10)
    Image.new("L", (12, 10)).save(tmp_path / "turned/z.png")
    assert common_shape(tmp_path / "turned") is None


def test_large_images_are_stretched_to_the_size_of_the_run(tmp_path: Path) -> None:
    write_images(tmp_path / "large", size=(65, 64))
    assert main(["train", "tiny", "--on", "folder:large"]) == 0
    assert saved(Path("runs/tiny-large"))["data"]["shape"] == [28, 28]


def test_the_folder_alone_is_enough_for_what_comes_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "mine")
    np.savez(tmp_path / "own.npz", **dict.fromkeys(("train", "valid"), np.ones((6, 7, 3), np.uint8)))
    assert main(["train", "tiny", "--on", "folder:mine"]) == 0
    assert main(["train", "tiny", "--on", "npz:own.npz"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    seen: list[Report] = []
    monkeypatch.setattr(Report, "write", lambda self: seen.append(self) or self.folder)
    for name, shape, rows in (("tiny-mine", (12, 10), 1), ("tiny-own", (7, 3), 6)):
        folder = tmp_path / "runs" / name
        model, run, _ = load_static(folder)
        described = describe_static(model, run, rows=10, samples=1, data_root=None, quiet=True)
        assert described.card["x"].shape == (shape[0] * shape[1],)
        assert described.card["x"].description.startswith(f"{shape[0]}×{shape[1]} pixels")
        # one validation row: no spread, but no NaN
        assert described.card["curve"].rows == rows
        assert np.isfinite(described.card["curve"].elbo_std).all()
        assert main(["report", str(folder)]) == (0 if rows > 1 else 1)
    assert [(made.images.shape, made.effort.race.rows) for made in seen] == [((7, 3), 3)]


def test_the_same_command_resumes_from_anywhere_and_another_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "mine")
    write_images(tmp_path / "deep/mine")
    assert main(["train", "tiny", "--on", "folder:mine"]) == 0
    monkeypatch.chdir(tmp_path / "deep")
    output = ["--output", str(tmp_path / "runs/tiny-mine")]
    assert main(["train", "tiny", "--on", "folder:../mine", *output]) == 0
    before = (tmp_path / "runs/tiny-mine/last.pt").read_bytes()
    capsys.readouterr()
    for options in (["--on", "folder:mine"], []):
        assert main(["train", "tiny", *options, *output]) == 1
        error = capsys.readouterr().err
        assert f"was trained on folder:{tmp_path / 'mine'}, not on" in error
        assert f"resume it with --on folder:{tmp_path / 'mine'}" in error
        assert error.count("\n") == 1
    assert (tmp_path / "runs/tiny-mine/last.pt").read_bytes() == before


def test_all_of_ones_own_images_are_used_for_so_many_epochs_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "mine")
    assert main(["train", "tiny", "--on", "folder:mine", "--epochs", "2"]) == 0
    run = saved(Path("runs/tiny-mine"))
    assert (run["epochs"], run["train_rows"], run["validation_rows"]) == (2, None, None)
    assert len((tmp_path / "runs/tiny-mine/log.jsonl").read_text().splitlines()) == 2
    assert main(["train", "tiny", "--on", "folder:mine"]) == 1
    assert "another configuration: give its options again" in capsys.readouterr().err


def test_a_run_of_sequences_takes_epochs_too_and_says_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(SAMPLES / "digits", tmp_path / "wavs")
    samples, rate = soundfile.read(next((tmp_path / "wavs").glob("*.wav")))
    soundfile.write(tmp_path / "wavs/zz.wav", samples[:50], rate)
    soundfile.write(tmp_path / "wavs/zzz.wav", samples, rate)
    assert main(["train", "speech", "--on", "audio:wavs", "--epochs", "2"]) == 0
    assert saved(Path("runs/speech-wavs"))["epochs"] == 2
    assert capsys.readouterr().err.count("1 of 5 recordings are shorter than a frame of 200 samples, and left out") == 1


def test_images_that_changed_are_said_to_have_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their new size once made it a run with another configuration; and evaluate, export and report took no notice."""
    write_images(tmp_path / "mine")
    assert main(["train", "tiny", "--on", "folder:mine"]) == 0
    shutil.rmtree(tmp_path / "mine")
    write_images(tmp_path / "mine", size=(8, 8))
    train, folder = ["train", "tiny", "--on", "folder:mine"], "runs/tiny-mine"
    for command in (train, ["evaluate", folder], ["report", folder], ["export", folder, "--name", "mine", "--to", "served"]):
        assert main(command) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"was trained on another folder:{tmp_path / 'mine'} (sha256 " in error
    assert not Path("served").exists()


def test_a_later_phase_goes_on_from_the_earlier_one_on_the_same_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "mine")
    assert main(["train", "later", "--on", "folder:mine"]) == 1
    assert f"First comes `elbow-train train tiny --on folder:{tmp_path / 'mine'}`" in capsys.readouterr().err
    assert main(["train", "tiny", "--on", "folder:mine"]) == 0
    assert main(["train", "later", "--on", "folder:mine"]) == 0
    assert saved(Path("runs/later-mine"))["parent"] == "tiny-mine"


def test_the_runs_own_set_changes_nothing(tiny_run: RunConfig) -> None:
    assert main(["train", "tiny", "--on", tiny_run.data.name]) == 0
    assert saved(Path("runs/tiny"))["name"] == "tiny"


def test_songs_of_ones_own_are_sampled_measured_and_described(tmp_path: Path) -> None:
    write_songs(tmp_path / "songs")
    assert main(["train", "music", "--on", "midi:songs", "--steps-per-beat", "1"]) == 0
    model, run, facts = load_filter(Path("runs/music-songs"))
    assert (run.data.name, run.data.steps_per_beat) == (f"midi:{tmp_path / 'songs'}", 1)
    assert run.data.load().valid.lengths.tolist() == [12]
    effort = FilterEffort(seeds=1, gap_frames=0, particles=2)
    assert evaluate_filter(model, run, facts, effort, quiet=True).frames == 12
    assert "1 frames per quarter note" in describe_filter(model, run, 20, None).card["x"].description


def test_recordings_of_ones_own_are_cut_into_frames_of_the_size_asked_for() -> None:
    assert main(["train", "speech", "--on", f"audio:{SAMPLES / 'digits'}", "--frame-size", "80"]) == 0
    model, run, _ = load_filter(Path("runs/speech-digits"))
    assert (run.data.frame_size, model.generative.x_size) == (80, 80)
    assert describe_filter(model, run, 20, None).card["x"].sample_rate == 8000


def test_rolls_of_ones_own_take_the_place_of_the_set() -> None:
    assert main(["train", "music", "--on", f"rolls:{SAMPLES / 'chorales_sample.npz'}"]) == 0
    assert saved(Path("runs/music-chorales_sample"))["architecture"]["generative"]["x_size"] == 88


ROLLS, RECORDINGS, IMAGES = f"rolls:{SAMPLES / 'chorales_sample.npz'}", f"audio:{SAMPLES / 'digits'}", f"npz:{SAMPLES / 'mnist_sample.npz'}"


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("tiny", ["--on", ROLLS], f"--on {ROLLS}: these are sequences, and tiny learns from images: choose mnist, "),
        ("tiny", ["--on", "jsb"], "--on jsb: these are sequences"),
        ("tiny", ["--on", "minst"], "--on minst: no such data set: choose mnist, "),
        ("tiny", ["--on", "folder:nowhere"], "--on folder:nowhere: "),
        ("tiny", ["--on", "mnist"], "--on mnist: mnist: no "),
        ("tiny", ["--on", IMAGES, "--size", "8x8"], "--size: only the images of folder:PATH are stretched"),
        ("tiny", ["--frame-size", "8"], "--frame-size: tiny learns from images: leave it out"),
        ("music", ["--on", IMAGES], "these are images, and music learns from sequences: choose jsb, "),
        ("music", ["--on", "jbs"], "--on jbs: no such set of sequences: choose jsb, "),
        ("music", ["--on", RECORDINGS], "these are recordings (as audio:FOLDER), and the bernoulli of music is for piano rolls"),
        ("speech", ["--on", ROLLS], "these are piano rolls (as rolls:FILE, midi:FOLDER), and the gaussian of speech is for recordings"),
        ("music", ["--on", ROLLS, "--frame-size", "8"], "--frame-size: only recordings are cut into frames"),
        ("music", ["--on", ROLLS, "--steps-per-beat", "8"], "--steps-per-beat: only midi:FOLDER is sampled"),
        ("music", ["--size", "8x8"], "--size: music learns from sequences: leave it out"),
    ],
)
def test_what_a_run_cannot_learn_from_is_one_line_and_nothing_is_written(
    run: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", run, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("elbow-train: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(Path().iterdir())


@pytest.mark.parametrize("size", ["8", "8x", "x8", "0x8", "-1x8", "8x8x8"])
def test_a_size_is_height_x_width(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "tiny", f"--size={size}"])
    assert "is not a whole number above 0" in capsys.readouterr().err
