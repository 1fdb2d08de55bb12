"""The border between the service and whatever computes: named numpy arrays in, named numpy arrays out.

An engine holds one verified artifact. `run` calls a program on arrays the caller owns. Rows in refinement live in
*slots* instead: `load_rows` puts them there, `run_rows` runs a program on some of them, `read_rows` brings arrays back.
On the CPU a slot is a line of a numpy array (`HostRows`); on an accelerator it never leaves the device, and only what
`run_rows` returns (per-row scalars) and `read_rows` asks for crosses. `run_rows` may return before the device is done: an
output waits for it when it is looked at, so a caller that looks one tick later never waits, and the next `run_rows` is
already in line. An engine is used from one thread at a time.

Shapes: R rows, S samples, D latent size, X size of x.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.artifact import Arrays, Card
from service.noise import Keys

Slots = NDArray[np.intp]
Given = Mapping[str, NDArray[Any] | Keys]
"""What a caller hands to `run_rows`: arrays, or keys of noise that the engine draws."""
Outputs = Mapping[str, NDArray[Any]]


class Loaded(Protocol):
    """An engine as the repository sees it, wherever it runs."""

    @property
    def name(self) -> str: ...

    @property
    def card(self) -> Card: ...

    @property
    def precision(self) -> str: ...

    def close(self) -> None: ...


class Engine(Protocol):
    """What the scheduler needs (one file per implementation; only building.py and the CLI name a concrete one)."""

    name: str
    card: Card
    precision: str
    """Of the programs that choose λ: "float32", or one of the card's `precisions`."""
    begin: Arrays
    """Of a filter: the state before the first frame, (n,) per state array."""
    draws_noise: bool
    """Whether noise is better given as keys than as arrays."""
    warm_up_rows: int
    """Batches up to this size want to be warmed up before rows are served; 0 = whatever the caller finds enough."""

    def run(self, program: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        """Runs `program` on `arrays` (every input the card lists, same number of rows) and returns its outputs by name."""
        ...

    def allocate(self, capacity: int) -> int:
        """Makes room for x, mask, context, carry and state of `capacity` rows, or of fewer where memory is short; returns of how
        many. Called once, before any row is loaded.

        Raises:
            ArtifactError: there is no memory for a useful number of rows.
        """
        ...

    def load_rows(self, slots: Slots, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes `arrays` (R, ...) into `slots` (R,)."""
        ...

    def run_rows(self, program: str, slots: Slots, noise: Given, guard: str | None = None) -> Outputs:
        """Runs `program` on the rows in `slots`. A row whose output `guard` is not finite keeps what it had.

        Inputs come from the slots by name, noise (R, S, D) from the caller. Outputs that have a place in the slots
        (carry, context) are written back there; the others (norms, likelihoods) are returned, to be looked at before the
        same program runs again.
        """
        ...

    def read_rows(self, slots: Slots, names: Iterable[str]) -> Arrays:
        """Copies the named arrays of the rows in `slots` to the host."""
        ...

    def close(self) -> None: ...


class HostRows:
    """Slots in host memory, for engines that compute on the CPU: gather, run, scatter."""

    name: str
    card: Card
    precision: str = "float32"
    begin: Arrays = {}  # noqa: RUF012 (never changed, replaced by engines of filters)
    draws_noise = False
    warm_up_rows = 0

    def run(self, program: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        raise NotImplementedError

    def allocate(self, capacity: int) -> int:
        x = self.card.x.shape
        self._rows: Arrays = {"x": np.zeros((capacity, *x), np.float32), "mask": np.ones((capacity, *x), np.float32)}
        for tensor in (*self.card.context, *self.card.carry, *self.card.state):
            self._rows[tensor.name] = np.zeros((capacity, *(int(size) for size in tensor.shape[1:])), tensor.dtype)
        return capacity

    def load_rows(self, slots: Slots, arrays: Mapping[str, NDArray[Any]]) -> None:
        for name, value in arrays.items():
            self._rows[name][slots] = value

    def run_rows(self, program: str, slots: Slots, noise: Given, guard: str | None = None) -> Outputs:
        spec = self.card.programs[program]
        given = {name: value.draw() if isinstance(value, Keys) else value for name, value in noise.items()}
        gathered = {t.name: given[t.name] if t.name in given else self._rows[t.name].take(slots, axis=0) for t in spec.inputs}
        outputs = self.run(program, gathered)
        resident = [name for name in outputs if name in self._rows]
        made = {name: outputs.pop(name) for name in resident}
        if guard is not None and not np.isfinite(outputs[guard]).all():
            good = np.isfinite(outputs[guard].reshape(len(slots), -1)).all(1)
            slots, made = slots[good], {name: value[good] for name, value in made.items()}
        self.load_rows(slots, made)
        return outputs

    def read_rows(self, slots: Slots, names: Iterable[str]) -> Arrays:
        return {name: self._rows[name].take(slots, axis=0) for name in names}

    def close(self) -> None: ...
