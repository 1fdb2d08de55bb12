"""Data sets: find them, fetch them, check them, read them; and what a training loop needs on top of the arrays.

    catalogue.py   name -> where a set comes from and how it is read (the only file that knows every set)
    files.py       where files are looked for, and whether they are the published ones
    fetch.py       download, with checksum, progress bar and resume
    readers/       one file per format: idx, amat, npz, zip of Omniglot, folder of images
    images.py      what `load` returns: uint8 rows with a train and a validation split
    binarise.py    grey images -> 0/1 observations · masks.py  random masks for training with missing data
    batches.py     shuffled index batches whose position can be saved and restored exactly

Nothing imported here needs torch; `binarise`, `masks` and `batches` do and are imported by name.
Still images only need one array per split; sets of sequences will bring their own value type beside `Images`.
"""

from training.data.catalogue import load
from training.data.errors import DataError
from training.data.images import Images

__all__ = ["DataError", "Images", "load"]
