"""Finding, loading and splitting by name."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import DataError, Images, load
from training.data.catalogue import CATALOGUE, find
from training.data.images import Split, hold_out_last, hold_out_tenth

SAMPLES = Path(__file__).resolve().parents[2] / "data"


@pytest.fixture(autouse=True)
def _no_data_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ELBOW_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def numbered(count: int) -> np.ndarray:
    """(count, 28, 28) uint8 images whose first two pixels spell their index."""
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(count) // 256, np.arange(count) % 256
    return images


def indices(rows: np.ndarray) -> np.ndarray:
    return rows[:, 0].astype(int) * 256 + rows[:, 1]


def write_mnist_npz(root: Path, name: str = "mnist", count: int = 5_100) -> Path:
    (root / name).mkdir(parents=True)
    path = root / name / f"{name}.npz"
    np.savez_compressed(path, x_train=numbered(count), y_train=(np.arange(count) % 10).astype(np.uint8))
    return path


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), 1))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_last_5000_training_images_are_for_validation(tmp_path: Path, name: str) -> None:
    write_mnist_npz(tmp_path, name)
    images = load(name, tmp_path)
    np.testing.assert_array_equal(indices(images.train), np.arange(100))
    np.testing.assert_array_equal(indices(images.valid), np.arange(100, 5_100))
    assert images.kind == "grey"
    assert images.shape == (28, 28)
    assert images.train_labels is not None
    np.testing.assert_array_equal(images.train_labels, np.arange(100) % 10)


def test_the_original_files_give_the_same_arrays_as_the_archive(tmp_path: Path) -> None:
    write_mnist_npz(tmp_path / "npz")
    write_idx(tmp_path / "idx/mnist/train-images-idx3-ubyte.gz", numbered(5_100))
    archive, original = load("mnist", tmp_path / "npz"), load("mnist", tmp_path / "idx")
    np.testing.assert_array_equal(original.train, archive.train)
    np.testing.assert_array_equal(original.valid, archive.valid)
    assert original.train_labels is None
    assert original.sha256 != archive.sha256
    write_idx(tmp_path / "idx/mnist/train-labels-idx1-ubyte.gz", (np.arange(5_100) % 10).astype(np.uint8))
    np.testing.assert_array_equal(load("mnist", tmp_path / "idx").valid_labels, archive.valid_labels)


def test_binarized_mnist_keeps_its_own_validation_split(tmp_path: Path) -> None:
    ones = np.ones((3, 28, 28), np.uint8)
    (tmp_path / "binarized_mnist").mkdir()
    np.savez(tmp_path / "binarized_mnist/binarized_mnist.npz", train=ones, valid=0 * ones[:2])
    images = load("binarized_mnist", tmp_path)
    assert (images.kind, len(images.train), len(images.valid)) == ("binary", 3, 2)


def test_binarized_mnist_is_read_from_its_original_text(tmp_path: Path) -> None:
    (tmp_path / "binarized_mnist").mkdir()
    for split, row in (("train", "1"), ("valid", "0")):
        (tmp_path / f"binarized_mnist/binarized_mnist_{split}.amat").write_text(" ".join([row] * 784) + "\n")
    images = load("binarized_mnist", tmp_path)
    assert images.train.all()
    assert not images.valid.any()


def test_a_binary_set_with_grey_values_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binarized_mnist").mkdir()
    np.savez(tmp_path / "binarized_mnist/binarized_mnist.npz", train=numbered(300), valid=numbered(300))
    with pytest.raises(DataError, match="said to be binary but holds"):
        load("binarized_mnist", tmp_path)


def test_omniglot_holds_out_a_seeded_tenth_of_the_background_set(tmp_path: Path) -> None:
    (tmp_path / "omniglot").mkdir()
    np.savez(tmp_path / "omniglot/omniglot_28.npz", background=numbered(1_000), background_char=np.arange(1_000, dtype=np.int16))
    first, second = load("omniglot", tmp_path), load("omniglot", tmp_path)
    assert (len(first.train), len(first.valid)) == (900, 100)
    np.testing.assert_array_equal(first.valid, second.valid)
    everything = np.concatenate([indices(first.train), indices(first.valid)])
    np.testing.assert_array_equal(np.sort(everything), np.arange(1_000))
    np.testing.assert_array_equal(first.valid_labels, indices(first.valid))


def test_a_folder_of_images_is_a_data_set(tmp_path: Path) -> None:
    for number in range(20):
        Image.new("L", (16, 16), number * 10).save(tmp_path / f"{number:02}.png")
    images = load(f"folder:{tmp_path}", shape=(8, 8))
    assert (images.train.shape, images.valid.shape, images.kind) == ((18, 64), (2, 64), "grey")


def test_the_shipped_sample_is_a_data_set() -> None:
    images = load(f"npz:{SAMPLES / 'mnist_sample.npz'}")
    assert (images.train.shape, images.valid.shape, images.shape, images.kind) == ((256, 784), (64, 784), (28, 28), "grey")
    assert images.train_labels is not None
    assert set(images.train_labels) == set(range(10))


def test_sets_are_looked_for_in_elbow_data_first_and_then_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = write_mnist_npz(tmp_path / "data")
    assert [path.resolve() for path in find("mnist").paths] == [here.resolve()]
    listed = write_mnist_npz(tmp_path / "second")
    monkeypatch.setenv("ELBOW_DATA", f"{tmp_path / 'first'}:{tmp_path / 'second'}")
    assert find("mnist").paths == (listed,)


def test_a_missing_set_says_what_was_looked_for_where_and_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELBOW_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError) as error:
        load("mnist")
    looked_for, places = ("mnist.npz", "train-images-idx3-ubyte.gz"), (str(tmp_path / "mine"), "data/mnist")
    for part in (*looked_for, *places, "elbow-train data fetch mnist", "ELBOW_DATA"):
        assert part in str(error.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"'cifar': choose mnist, .*folder:PATH"):
        load("cifar")


def test_a_source_that_is_too_short_for_its_split_is_refused(tmp_path: Path) -> None:
    write_mnist_npz(tmp_path, count=5_000)
    with pytest.raises(DataError, match="too few"):
        load("mnist", tmp_path)
    with pytest.raises(DataError, match="too few"):
        hold_out_tenth(Split(np.zeros((1, 4), np.uint8)))
    with pytest.raises(DataError, match="too few"):
        hold_out_last(Split(np.zeros((3, 4), np.uint8)), 3)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    np.savez(tmp_path / "mnist/mnist.npz", x_train=np.zeros((5_001, 8, 8), np.uint8))
    with pytest.raises(DataError, match="rows of 784 pixels"):
        load("mnist", tmp_path)


def test_labels_must_be_as_many_as_images() -> None:
    rows = np.zeros((2, 4), np.uint8)
    with pytest.raises(DataError, match="3 train labels for 2 images"):
        Images("some", "grey", (2, 2), rows, rows, "", train_labels=np.zeros(3))


def test_a_known_file_is_told_from_a_remade_one(tmp_path: Path) -> None:
    path = write_mnist_npz(tmp_path)
    assert find("mnist", tmp_path).altered() == [path]


def test_every_catalogued_set_can_be_fetched_and_checked() -> None:
    for name, dataset in CATALOGUE.items():
        assert name == dataset.name
        assert any(source.fetchable for source in dataset.sources)
        for source in dataset.sources:
            assert all(file.sha256 is not None for file in source.files)
            assert not source.fetchable or all(file.bytes for file in source.files)
