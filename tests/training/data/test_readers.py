"""Each reader on a real sample, and on damaged copies of it."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.errors import DataError
from training.data.readers.amat import read_amat
from training.data.readers.folder import read_folder
from training.data.readers.idx import read_idx, read_idx_split
from training.data.readers.npz import read_npz_split
from training.data.readers.omniglot import average_cells, read_omniglot_zip

SAMPLES = Path(__file__).resolve().parents[2] / "data"
IDX_IMAGES = SAMPLES / "mnist-20-images-idx3-ubyte.gz"
IDX_LABELS = SAMPLES / "mnist-20-labels-idx1-ubyte.gz"


def test_the_idx_sample_equals_the_first_images_of_the_npz_sample() -> None:
    idx = read_idx_split(IDX_IMAGES, IDX_LABELS)
    npz = read_npz_split(SAMPLES / "mnist_sample.npz", "train", "train_labels")
    np.testing.assert_array_equal(idx.images, npz.images[:20])
    np.testing.assert_array_equal(idx.labels, npz.labels[:20])


def test_an_idx_file_may_be_decompressed_already(tmp_path: Path) -> None:
    plain = tmp_path / "images-idx3-ubyte"
    plain.write_bytes(gzip.decompress(IDX_IMAGES.read_bytes()))
    np.testing.assert_array_equal(read_idx(plain, axes=3), read_idx(IDX_IMAGES, axes=3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda raw: raw[:10], "too short"),
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw + b"\0", "altered"),
        (lambda raw: b"\0\0\x08\x01" + raw[4:], "magic number 2049, not 2051"),
        (lambda raw: b"\0\0\x0d\x03" + raw[4:], "magic number"),
        (lambda raw: b"", "too short"),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path: Path, content, message: str) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(content(gzip.decompress(IDX_IMAGES.read_bytes()))))
    with pytest.raises(DataError, match=message):
        read_idx(path, axes=3)


@pytest.mark.parametrize("content", [lambda raw: raw[:-100], lambda raw: b"plain text", lambda raw: raw[:20] + b"\xff" * 20 + raw[40:]])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, content) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content(IDX_IMAGES.read_bytes()))
    with pytest.raises(DataError, match="gzip"):
        read_idx(path, axes=3)


@pytest.mark.parametrize("end", ["\n", "", "\r\n", " \n"])
def test_amat_rows_are_read_whatever_ends_the_lines(tmp_path: Path, end: str) -> None:
    path = tmp_path / "some.amat"
    path.write_bytes(f"0 1 1{end or chr(10)}1 0 0{end}".encode())
    np.testing.assert_array_equal(read_amat(path, pixels=3).images, [[0, 1, 1], [1, 0, 0]])


@pytest.mark.parametrize(("text", "message"), [("0 1 2\n", "0 and 1"), ("0 1\n", "not 3"), ("", "0 and 1"), ("0 1 1\n0 1 1 0\n", "not 3")])
def test_a_damaged_amat_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "some.amat"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_amat(path, pixels=3)


def test_an_npz_archive_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.npz"
    np.savez(path, x_train=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="plain arrays"):
        read_npz_split(path, "x_train")


def test_an_npz_archive_reads_only_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, x_train=np.ones((3, 2, 2), np.uint8), x_test=np.array([{"never": "read"}], dtype=object))
    assert read_npz_split(path, "x_train").images.shape == (3, 4)


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"text", lambda raw: b""])
def test_a_damaged_npz_archive_is_refused(tmp_path: Path, damage) -> None:
    path = tmp_path / "mnist_sample.npz"
    path.write_bytes(damage((SAMPLES / "mnist_sample.npz").read_bytes()))
    with pytest.raises(DataError, match=r"mnist_sample\.npz"):
        read_npz_split(path, "train")


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", np.zeros((3, 4), np.uint8))
    with pytest.raises(DataError, match="single array"):
        read_npz_split(tmp_path / "set.npy", "train")


@pytest.mark.parametrize(("array", "message"), [(np.zeros((3, 4)), "uint8"), (np.zeros(4, np.uint8), "shape")])
def test_an_npz_array_of_another_kind_is_refused(tmp_path: Path, array, message: str) -> None:
    np.savez(tmp_path / "set.npz", train=array)
    with pytest.raises(DataError, match=message):
        read_npz_split(tmp_path / "set.npz", "train")
    with pytest.raises(DataError, match="no array 'valid', only train"):
        read_npz_split(tmp_path / "set.npz", "valid")


def test_a_folder_of_real_digits_in_png_comes_back_unchanged(tmp_path: Path) -> None:
    digits = read_idx(IDX_IMAGES, axes=3)
    for number, digit in enumerate(digits):
        (tmp_path / str(number % 3)).mkdir(exist_ok=True)
        Image.fromarray(digit).save(tmp_path / str(number % 3) / f"{number:02}.png")
    split, sha256 = read_folder(tmp_path, (28, 28))
    order = sorted(range(20), key=lambda number: (number % 3, number))
    np.testing.assert_array_equal(split.images, digits[order].reshape(20, -1))
    (tmp_path / "0" / "00.png").rename(tmp_path / "0" / "renamed.png")
    assert read_folder(tmp_path, (28, 28))[1] != sha256


def test_images_of_every_kind_become_grey_at_the_size_asked_for(tmp_path: Path) -> None:
    white = Image.new("L", (40, 20), 255)
    white.save(tmp_path / "grey.png")
    white.convert("RGB").save(tmp_path / "colour.JPEG")
    Image.new("1", (7, 9), 1).save(tmp_path / "one_bit.png")
    Image.fromarray(np.full((5, 5), 65535, np.uint16)).save(tmp_path / "sixteen_bit.png")
    (tmp_path / "notes.txt").write_text("not an image, and not looked at")
    images = read_folder(tmp_path, (10, 12))[0].images
    assert images.shape == (4, 120)
    assert images.min() >= 254


def test_transparent_pixels_are_background(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert read_folder(tmp_path, (4, 4))[0].images.max() == 0


def test_a_folder_without_readable_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "nowhere", (28, 28))
    with pytest.raises(DataError, match=r"no \.png"):
        read_folder(tmp_path, (28, 28))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    with pytest.raises(DataError, match=r"broken\.png: not a readable image"):
        read_folder(tmp_path, (28, 28))


def test_averaging_cells_equals_averaging_on_a_fine_grid() -> None:
    """105 · 4 = 28 · 15: on a grid four times finer every cell is a whole number of pixels."""
    ink = np.random.default_rng(0).random((105, 105)) < 0.2
    fine = np.kron(ink, np.ones((4, 4)))
    expected = fine.reshape(28, 15, 28, 15).mean(axis=(1, 3))
    np.testing.assert_array_equal(average_cells(ink, 28), np.rint(255 * expected).astype(np.uint8))


def test_an_archive_of_drawings_is_read_in_order_with_ink_high(tmp_path: Path) -> None:
    path = tmp_path / "images_background.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, ink in (("b/1.png", 1.0), ("a/1.png", 0.0)):
            buffer = io.BytesIO()
            Image.fromarray(np.full((105, 105), ink == 0)).save(buffer, "PNG")
            archive.writestr(f"images_background/{name}", buffer.getvalue())
    np.testing.assert_array_equal(read_omniglot_zip(path).images, np.repeat([[0], [255]], 784, axis=1))


def test_an_archive_without_drawings_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(DataError, match=r"no \.png"):
        read_omniglot_zip(tmp_path / "empty.zip")
    (tmp_path / "broken.zip").write_bytes(b"PK not quite")
    with pytest.raises(DataError, match="not a readable archive"):
        read_omniglot_zip(tmp_path / "broken.zip")
