"""A run on another data set than its own: `elbow-train train RUN --on DATA`.

What follows from the data (the size of x, the shape of an image) is taken from it, and the run that results says all of it: it is
saved with the weights, so that resume, evaluation, report and export need nothing but the folder. Data that the run's model
cannot learn from are refused before anything is written.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from models.architecture import LinearGaussianArchitecture
from training.config import RunConfig
from training.data.catalogue import CATALOGUE, is_images
from training.data.catalogue import SCHEMES as IMAGE_SCHEMES
from training.data.errors import DataError
from training.data.images import Images
from training.data.readers.folder import own_shape
from training.data.sequence_catalogue import SCHEMES, SEQUENCES, is_sequences
from training.data.sequences import Sequences
from training.sequence_config import SequenceRunConfig

IMAGE_SETS = f"{', '.join(CATALOGUE)}, {IMAGE_SCHEMES}"
SEQUENCE_SETS = f"{', '.join(SEQUENCES)}, {SCHEMES}"
LIKELIHOODS = {"binary": ("bernoulli",), "audio": ("gaussian", "quantised_gaussian"), "real": ("gaussian",)}
"""Kind of sequences -> the likelihoods that fit them."""
KINDS = {"binary": "piano rolls (as rolls:FILE, midi:FOLDER)", "audio": "recordings (as audio:FOLDER)", "real": "real numbers (as mocap35)"}


def on_images(run: RunConfig, name: str, root: str | None = None, size: tuple[int, int] | None = None) -> tuple[RunConfig, Images]:
    """The run on the set `name`, and its images.

    Args:
        size: (height, width) that the images of `folder:PATH` are stretched to; by default their own, if it is one for all and has
            at most LARGEST pixels, else the run's.

    Raises:
        DataError: unknown, not to be read, or of sequences; names the option.
    """
    if is_sequences(name):
        raise DataError(f"--on {name}: these are sequences, and {run.name} learns from images: choose {IMAGE_SETS}; or a run of sequences")
    if not is_images(name):
        raise DataError(f"--on {name}: no such data set: choose {IMAGE_SETS}")
    if size is not None and not name.startswith("folder:"):
        raise DataError(f"--size: only the images of folder:PATH are stretched, and those of {name} have their size: leave it out")
    data = replace(run.data, name=_absolute(name))
    try:
        if name.startswith("folder:"):
            data = replace(data, shape=size or own_shape(Path(data.name.removeprefix("folder:"))) or run.data.shape)
        images = data.load(root)
    except DataError as exc:
        raise DataError(f"--on {name}: {exc}") from exc
    data = replace(data, shape=images.shape)
    if data == run.data:
        return run, images
    generative = replace(run.architecture.generative, x_size=images.shape[0] * images.shape[1])
    parent = None if run.parent is None else called(run.parent, data.name)
    architecture = replace(run.architecture, generative=generative)
    run = replace(run, name=called(run.name, data.name), data=data, architecture=architecture, parent=parent)
    # how many rows of a published set are enough says nothing of one's own
    return (replace(run, train_rows=None, validation_rows=None) if ":" in name else run), images


def on_sequences(
    run: SequenceRunConfig, name: str, root: str | None = None, frame_size: int | None = None, steps_per_beat: int | None = None
) -> tuple[SequenceRunConfig, Sequences]:
    """The run on the set `name`, and its sequences.

    Args:
        frame_size: samples per frame of audio. steps_per_beat: frames per quarter note of `midi:FOLDER`. By default the run's.

    Raises:
        DataError: unknown, not to be read, of images, or of a kind that the run's likelihood does not fit; names the option.
    """
    if is_images(name):
        raise DataError(f"--on {name}: these are images, and {run.name} learns from sequences: choose {SEQUENCE_SETS}; or a run of images")
    if not is_sequences(name):
        raise DataError(f"--on {name}: no such set of sequences: choose {SEQUENCE_SETS}")
    if steps_per_beat is not None and not name.startswith("midi:"):
        raise DataError(f"--steps-per-beat: only midi:FOLDER is sampled, and {name} has its own grid: leave it out")
    data = replace(
        run.data,
        name=_absolute(name),
        frame_size=frame_size or run.data.frame_size,
        steps_per_beat=steps_per_beat or run.data.steps_per_beat,
    )
    try:
        sequences = data.load(root)
    except DataError as exc:
        raise DataError(f"--on {name}: {exc}") from exc
    _refuse_other_kind(run, name, sequences)
    if frame_size is not None and sequences.kind != "audio":
        raise DataError(f"--frame-size: only recordings are cut into frames, and {name} has frames of {sequences.size}: leave it out")
    if data == run.data:
        return run, sequences
    architecture = replace(run.architecture, generative=replace(run.architecture.generative, x_size=sequences.size))
    return replace(run, name=called(run.name, data.name), data=data, architecture=architecture), sequences


def _refuse_other_kind(run: SequenceRunConfig, name: str, sequences: Sequences) -> None:
    generative = run.architecture.generative
    likelihood = "gaussian" if isinstance(generative, LinearGaussianArchitecture) else generative.likelihood
    if likelihood not in LIKELIHOODS[sequences.kind]:
        wanted = " or ".join(KINDS[kind] for kind, fitting in LIKELIHOODS.items() if likelihood in fitting)
        these = f"these are {KINDS[sequences.kind]}"
        raise DataError(f"--on {name}: {these}, and the {likelihood} of {run.name} is for {wanted}: choose such a set, or another run")


def _absolute(name: str) -> str:
    """The same set from any working directory."""
    scheme, colon, path = name.partition(":")
    return f"{scheme}:{Path(path).expanduser().resolve()}" if colon else name


def called(run: str, data: str) -> str:
    """The name of `run` on `data`, by which its folder is called unless another is given."""
    scheme, colon, path = data.partition(":")
    called = Path(path).stem if colon else scheme
    return f"{run}-{re.sub(r'[^A-Za-z0-9._-]+', '-', called) or scheme}"
