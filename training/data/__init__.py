"""Data sets: find them, fetch them, check them, read them; and what a training loop needs on top of the arrays.

    sources.py     what a catalogue's row has: the forms in which a set may lie on a disk, and finding one
    files.py       where files are looked for, and whether they are the published ones
    fetch.py       download, with checksum, progress bar and resume
    readers/       one file per format: idx, amat, npz, zip of Omniglot, folder of images; piano rolls, pickles, audio, MIDI

  still images
    catalogue.py   name -> where a set comes from and how it is read
    images.py      what `load` returns: uint8 rows with a train and a validation split
    binarise.py    images -> observations, 0/1 or grey · masks.py  random masks for training with missing data
    batches.py     shuffled index batches whose position can be saved and restored exactly

  sequences
    sequence_catalogue.py  the same for sets of sequences
    sequences.py           what `load_sequences` returns · ragged.py  many lengths in one array
    sequence_batches.py    whole sequences, random crops, or chunks with carried state; resumable like batches.py
    sequence_plan.py       which frames of which sequences make up each batch of an epoch
    baselines.py           the nats that a model without memory reaches

Nothing imported here needs torch; `binarise`, `masks`, `batches`, `sequence_plan` and `sequence_batches` do and are
imported by name. docs/data.md is the guide, with the conventions by which sequences are scored.
"""

from training.data.catalogue import load
from training.data.errors import DataError
from training.data.images import Images
from training.data.sequence_catalogue import load_sequences
from training.data.sequences import Sequences

__all__ = ["DataError", "Images", "Sequences", "load", "load_sequences"]
