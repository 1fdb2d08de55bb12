"""Name -> data set: its files, how they are read and split, what is known about them. The only file that knows every
set of still images (`sequence_catalogue.py` is its twin).

Besides the names in `CATALOGUE`, `load` takes `folder:PATH` (any folder of PNG and JPEG images) and `npz:PATH` (arrays
`train` and `valid` in one archive). Test splits are never read: where a file holds one, its array stays untouched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from training.data.errors import DataError
from training.data.files import DataFile, fingerprint
from training.data.images import Images, Kind, Split, hold_out_last, hold_out_tenth
from training.data.readers.amat import read_amat
from training.data.readers.folder import read_folder
from training.data.readers.idx import read_idx_split
from training.data.readers.npz import image_shape, read_npz_split
from training.data.readers.omniglot import read_omniglot_zip
from training.data.sources import Found, Source, find_source

TrainValid = tuple[Split, Split]
SCHEMES = "folder:PATH or npz:PATH"


@dataclass(frozen=True)
class Dataset:
    """One row of the catalogue. `train` and `valid` are the row counts of the published files; sources are tried in order."""

    name: str
    kind: Kind
    train: int
    valid: int
    licence: str
    sources: tuple[Source[TrainValid], ...]
    note: str = ""
    shape: tuple[int, int] = (28, 28)

    @property
    def folder(self) -> str:
        return self.name


def load(name: str, root: str | os.PathLike[str] | None = None, *, shape: tuple[int, int] = (28, 28)) -> Images:
    """Reads a data set.

    Args:
        name: a key of `CATALOGUE`, `folder:PATH` or `npz:PATH`.
        root: the only folder to search; by default those of ELBOW_DATA and ./data.
        shape: (height, width) that the images of `folder:PATH` are stretched to; the other sets have their own.

    Raises:
        DataError: unknown, not found, or damaged; says which file, where it was looked for, and how to get it.
    """
    scheme, _, path = name.partition(":")
    if scheme == "folder" and path:
        rows, sha256 = read_folder(Path(path).expanduser(), shape)
        return _images(name, "grey", shape, hold_out_tenth(rows), sha256)
    if scheme == "npz" and path:
        return _load_npz(name, Path(path).expanduser())
    dataset, found = lookup(name), find(name, root)
    return _images(name, dataset.kind, dataset.shape, found.read(), found.sha256)


def is_images(name: str) -> bool:
    """Whether `name` is one that `load` takes."""
    scheme, _, path = name.partition(":")
    return name in CATALOGUE or (scheme in ("folder", "npz") and bool(path))


def find(name: str, root: str | os.PathLike[str] | None = None) -> Found[TrainValid]:
    """The first complete source of a catalogued set, root by root.

    Raises:
        DataError: unknown, or not on this machine.
    """
    dataset = lookup(name)
    return find_source(dataset, dataset.sources, root)


def lookup(name: str) -> Dataset:
    """The catalogue's row for `name`, or a DataError that lists the names there are."""
    try:
        return CATALOGUE[name]
    except KeyError:
        raise DataError(f"unknown data set {name!r}: choose {', '.join(CATALOGUE)}, {SCHEMES}") from None


def _images(name: str, kind: Kind, shape: tuple[int, int], splits: TrainValid, sha256: str) -> Images:
    train, valid = splits
    return Images(name, kind, shape, train.images, valid.images, sha256, train.labels, valid.labels)


def _load_npz(name: str, path: Path) -> Images:
    train, valid = (read_npz_split(path, part, f"{part}_labels") for part in ("train", "valid"))
    kind: Kind = "binary" if train.images.max(initial=0) <= 1 else "grey"
    return _images(name, kind, image_shape(path, "train"), (train, valid), fingerprint([path]))


def _idx(base_urls: tuple[str, ...], images: DataFile, labels: DataFile) -> Source[TrainValid]:
    """The two training files of a set in MNIST's original format; the last 5,000 images are for validation."""
    return Source(
        files=tuple(_with_urls(file, base_urls) for file in (images, labels)),
        read=lambda paths: hold_out_last(read_idx_split(paths[images.name], paths.get(labels.name)), 5_000),
    )


def _with_urls(file: DataFile, base_urls: tuple[str, ...]) -> DataFile:
    urls = tuple(base + file.name for base in base_urls)
    return DataFile(file.name, file.sha256, file.content_sha256, file.bytes, urls, file.optional)


def _npz(file: DataFile) -> Source[TrainValid]:
    """A set of 60,000 training images as one archive of arrays x_train, y_train; the last 5,000 are for validation."""
    return Source((file,), lambda paths: hold_out_last(read_npz_split(paths[file.name], "x_train", "y_train"), 5_000))


MNIST = Dataset(
    name="mnist",
    kind="grey",
    train=55_000,
    valid=5_000,
    licence="none stated (LeCun, Cortes, Burges)",
    sources=(
        _npz(DataFile("mnist.npz", sha256="b91f08589ac0b4249f6dd03f8a39f1d91f38eb257228e0ec3fba9a949c7be368")),
        _idx(
            base_urls=("https://storage.googleapis.com/cvdf-datasets/mnist/", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
            images=DataFile(
                "train-images-idx3-ubyte.gz",
                sha256="440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                content_sha256="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                bytes=9_912_422,
            ),
            labels=DataFile(
                "train-labels-idx1-ubyte.gz",
                sha256="3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                content_sha256="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                bytes=28_881,
                optional=True,
            ),
        ),
    ),
    note="the last 5,000 training images are the validation split",
)

BINARIZED_MNIST = Dataset(
    name="binarized_mnist",
    kind="binary",
    train=50_000,
    valid=10_000,
    licence="none stated (Larochelle, Murray 2011)",
    sources=(
        Source(
            (DataFile("binarized_mnist.npz", sha256="627dd6719243afcd7d5a0c5efdcba2c8ce3feec1a3a35faa34dd023f89b54de2"),),
            lambda paths: (
                read_npz_split(paths["binarized_mnist.npz"], "train"),
                read_npz_split(paths["binarized_mnist.npz"], "valid"),
            ),
        ),
        Source(
            tuple(
                _with_urls(file, ("http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",))
                for file in (
                    DataFile(
                        "binarized_mnist_train.amat",
                        sha256="ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
                        bytes=78_400_000,
                    ),
                    DataFile(
                        "binarized_mnist_valid.amat",
                        sha256="1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
                        bytes=15_680_000,
                    ),
                )
            ),
            lambda paths: (read_amat(paths["binarized_mnist_train.amat"]), read_amat(paths["binarized_mnist_valid.amat"])),
        ),
    ),
    note="one fixed binarisation of MNIST, in another order and without labels; its own validation split",
)

FASHION_MNIST = Dataset(
    name="fashion_mnist",
    kind="grey",
    train=55_000,
    valid=5_000,
    licence="MIT (Zalando SE)",
    sources=(
        _npz(DataFile("fashion_mnist.npz", sha256="5b6d2c4c694a91887af8ab7d039c04f80af3c29378d731c93a538d2e831aa469")),
        _idx(
            base_urls=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
            images=DataFile(
                "train-images-idx3-ubyte.gz",
                sha256="3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                content_sha256="c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                bytes=26_421_880,
            ),
            labels=DataFile(
                "train-labels-idx1-ubyte.gz",
                sha256="a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                content_sha256="bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                bytes=29_515,
                optional=True,
            ),
        ),
    ),
    note="the last 5,000 training images are the validation split",
)

OMNIGLOT = Dataset(
    name="omniglot",
    kind="grey",
    train=17_352,
    valid=1_928,
    licence="MIT (Brenden Lake)",
    sources=(
        Source(
            (DataFile("omniglot_28.npz", sha256="f45bc341731b107a50f8f03365b9789e6289c6f55a94e160caca63efd5701157"),),
            lambda paths: hold_out_tenth(read_npz_split(paths["omniglot_28.npz"], "background", "background_char")),
        ),
        Source(
            (
                DataFile(
                    "images_background.zip",
                    sha256="ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
                    bytes=9_464_212,
                    urls=("https://github.com/brendenlake/omniglot/raw/master/python/images_background.zip",),
                ),
            ),
            lambda paths: hold_out_tenth(read_omniglot_zip(paths["images_background.zip"])),
        ),
    ),
    note="background set at 28 x 28 by area averaging, a seeded tenth held out: not comparable with published Omniglot figures",
)

CATALOGUE: dict[str, Dataset] = {dataset.name: dataset for dataset in (MNIST, BINARIZED_MNIST, FASHION_MNIST, OMNIGLOT)}
