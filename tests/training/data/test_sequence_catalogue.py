"""Sets of sequences by name: how they are split, what is known of them, and the published figures where the data are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from training.data import DataError, Sequences, load_sequences
from training.data.baselines import marginal_bernoulli
from training.data.catalogue import CATALOGUE
from training.data.ragged import Ragged
from training.data.sequence_catalogue import SEQUENCES, find_sequences, lookup_sequences

CHORALES = Path(__file__).resolve().parents[2] / "data/chorales_sample.npz"
REAL = [Path(folder) for folder in os.environ.get("ELBOW_DATA", "").split(os.pathsep) if folder]


@pytest.fixture(autouse=True)
def _no_data_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ELBOW_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def save(path: Path, **arrays: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def write_rolls(path: Path, *splits: str) -> None:
    rolls = {split: np.eye(5, 88, dtype=bool) for split in splits}
    save(path, **rolls, **{f"{split}_lengths": np.array([2, 3], np.int32) for split in splits})


def write_speech(path: Path, *splits: str, **more: object) -> None:
    samples = (np.random.default_rng(0).standard_normal(1_500) * 1_000).astype(np.int16)
    audio = {f"{split}_audio": samples for split in splits}
    save(path, sample_rate=np.int32(8_000), **audio, **{f"{split}_lengths": np.array([650, 450, 400]) for split in splits}, **more)


def test_the_shipped_chorales_are_a_data_set() -> None:
    music = load_sequences(f"rolls:{CHORALES}")
    assert (music.kind, music.size, len(music.train), len(music.valid), music.train.frames) == ("binary", 88, 12, 4, 814)
    assert music.valid.lengths.tolist() == [52, 105, 65, 49]
    assert (music.sample_rate, music.frame_size, music.mean, music.std, music.test) == (None,) * 5
    assert 3.5 < music.frame_mean().sum() < 4  # four voices, seldom silent
    assert len(music.sha256) == 64


def test_the_marginal_likelihood_of_the_shipped_chorales_is_the_one_computed_note_by_note() -> None:
    """The two figures come from a loop over frames and notes with math.log."""
    music = load_sequences(f"rolls:{CHORALES}")
    baseline = marginal_bernoulli(music.train, music.valid)
    assert baseline.frame == pytest.approx(10.408027414473445, rel=1e-12)
    assert baseline.sequence == pytest.approx(10.469272767681915, rel=1e-12)


@pytest.mark.parametrize("name", ["jsb", "nottingham", "musedata", "piano_midi"])
def test_only_the_chorales_keep_their_test_split(tmp_path: Path, name: str) -> None:
    file = lookup_sequences(name).sources[0].files[0].name
    write_rolls(tmp_path / "music" / file, "train", "valid", "test")
    music = load_sequences(name, tmp_path)
    assert ("test" in music.splits) == (name == "jsb")
    assert music.train.lengths.tolist() == [2, 3]


def test_fsdd_holds_out_the_last_takes_of_every_digit_and_speaker(tmp_path: Path) -> None:
    write_speech(tmp_path / "fsdd/fsdd.npz", "train", train_take=np.array([44, 45, 5], np.uint8))
    speech = load_sequences("fsdd", tmp_path)
    assert (speech.train.lengths.tolist(), speech.valid.lengths.tolist()) == ([3, 2], [2])
    assert (speech.sample_rate, speech.frame_size, speech.test) == (8_000, 200, None)
    assert load_sequences("fsdd", tmp_path, frame_size=100).train.lengths.tolist() == [6, 4]
    write_speech(tmp_path / "fsdd/fsdd.npz", "train", train_take=np.array([45], np.uint8))
    with pytest.raises(DataError, match="does not number the recordings"):
        load_sequences("fsdd", tmp_path)


def test_mean_and_std_are_those_of_the_training_frames_in_pcm_units(tmp_path: Path) -> None:
    write_speech(tmp_path / "speech16k/picovoice_barista.npz", "train", "valid", "test")
    speech = load_sequences("speech16k", tmp_path)
    assert list(speech.splits) == ["train", "valid", "test"]
    assert speech.std == pytest.approx(1_000 / 32_768, rel=0.05)
    assert abs(speech.train.joined).max() <= 1


def test_motion_capture_is_real_frames(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    save(tmp_path / "mocap35/mocap35.npz", **{split: rng.standard_normal((2, 7, 50)) for split in ("train", "valid", "test")})
    motion = load_sequences("mocap35", tmp_path)
    assert (motion.kind, motion.size, motion.train.lengths.tolist()) == ("real", 50, [7, 7])
    assert motion.std == pytest.approx(1, abs=0.1)
    save(tmp_path / "mocap35/mocap35.npz", **{split: np.full((2, 7, 50), np.nan) for split in ("train", "valid", "test")})
    with pytest.raises(DataError, match="not finite"):
        load_sequences("mocap35", tmp_path)


def test_a_missing_set_says_whether_it_can_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"jsb_chorales\.npz or JSB_Chorales\.mat or .*music.*elbow-train data fetch jsb"):
        load_sequences("jsb", tmp_path)
    with pytest.raises(DataError, match=r"fsdd\.npz.*No checked download is known.*ELBOW_DATA"):
        load_sequences("fsdd", tmp_path)
    with pytest.raises(DataError, match=r"'timit': choose jsb, .*audio:FOLDER"):
        load_sequences("timit")
    with pytest.raises(DataError, match="no such file"):
        load_sequences("rolls:missing.npz")


def test_frames_that_do_not_fit_their_kind_are_refused() -> None:
    twos, ones, narrow = (Ragged.of([np.full((2, width), value, np.uint8)]) for value, width in ((2, 3), (1, 3), (1, 2)))
    with pytest.raises(DataError, match="said to be binary but holds the value 2"):
        Sequences("some", "binary", twos, twos, "", "")
    with pytest.raises(DataError, match="valid must be uint8 frames of 3"):
        Sequences("some", "binary", ones, narrow, "", "")
    with pytest.raises(DataError, match="train must be float32"):
        Sequences("some", "real", twos, twos, "", "")


def test_every_row_of_the_catalogue_can_be_found_checked_and_downloaded_safely() -> None:
    assert not set(SEQUENCES) & set(CATALOGUE)
    for name, entry in SEQUENCES.items():
        assert name == entry.name
        assert entry.sources[0].files[0].sha256 is not None
        for source in entry.sources:
            assert not source.fetchable or all(file.sha256 and file.bytes for file in source.files)


PUBLISHED = {  # sequences and frames per split; marginal likelihood on validation, frame and sequence weighted
    "jsb": ({"train": (229, 13_807), "valid": (76, 4_602), "test": (77, 4_725)}, (10.9505, 10.9251)),
    "nottingham": ({"train": (694, 176_561), "valid": (173, 45_513)}, (10.0031, 10.0404)),
    "musedata": ({"train": (524, 245_202), "valid": (135, 82_755)}, (11.8469, 10.8948)),
    "piano_midi": ({"train": (87, 75_911), "valid": (12, 8_540)}, (11.4906, 11.4494)),
    "fsdd": ({"train": (2_400, 40_886), "valid": (300, 5_087)}, None),
    "speech16k": ({"train": (70, 48_028), "valid": (10, 6_656), "test": (9, 6_122)}, None),
    "mocap35": ({"train": (16, 4_800), "valid": (3, 900), "test": (4, 1_200)}, None),
    "jsb_srnn": ({"train": (16, 27_216), "valid": (16, 8_016), "test": (77, 9_396 + 77)}, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_real_files_have_the_known_counts_and_baselines(name: str) -> None:
    root = next((root for root in REAL if (root / lookup_sequences(name).folder).is_dir()), None)
    if root is None:
        pytest.skip(f"{name} is not under ELBOW_DATA")
    sequences, (counts, baseline) = load_sequences(name, root), PUBLISHED[name]
    assert {split: (len(part), part.frames) for split, part in sequences.splits.items()} == counts
    if baseline is not None:
        found = marginal_bernoulli(sequences.train, sequences.valid)
        assert (found.frame, found.sequence) == pytest.approx(baseline, abs=5e-5)
    assert not find_sequences(name, root).altered()


@pytest.mark.parametrize("file", ["JSB_Chorales.mat", "jsb-chorales-quarter.pkl"])
def test_the_original_files_of_the_chorales_give_the_rolls_of_the_archive(tmp_path: Path, file: str) -> None:
    root = next((root for root in REAL if (root / "raw" / file).is_file() and (root / "music").is_dir()), None)
    if root is None:
        pytest.skip(f"raw/{file} is not under ELBOW_DATA")
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / file).symlink_to((root / "raw" / file).resolve())
    original, archive = load_sequences("jsb", tmp_path), load_sequences("jsb", root)
    assert not find_sequences("jsb", tmp_path).altered()
    for split, part in archive.splits.items():
        np.testing.assert_array_equal(original.splits[split].joined, part.joined)
        np.testing.assert_array_equal(original.splits[split].lengths, part.lengths)
