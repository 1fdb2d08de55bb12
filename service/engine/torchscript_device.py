"""TorchScript programs on an accelerator, with rows that stay there.

    load_rows ──upload──► slots (x, mask, context, carry, state) ◄─ gather ─┐
    run_rows: slot numbers, noise keys ──upload──► [ gather, draw noise, program, guard, scatter ] ──► per-row scalars
    read_rows ◄─download─ slots                     one CUDA graph per (program, bucket)

A batch of R rows is padded to the next power of two; padding rows compute on a slot of their own, which belongs to nobody.
With device "cpu" there are no graphs and no copies, and all else is the same: that is how it is tested without a GPU.

Shapes: R rows, N rows of a bucket (N ≥ R), S samples, D latent size, X size of x.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.artifact import WEIGHTS, Arrays, Artifact, ArtifactError, TensorSpec
from service.engine.base import Given, Outputs, Slots
from service.engine.memory import DeviceMemory
from service.engine.parity import verify_parity
from service.engine.torch_noise import normals
from service.engine.torch_transfers import Fetch, Launch, transfers_of
from service.engine.torchscript import load_programs
from service.noise import Keys

LARGEST_BUCKET = 8192
_PER_ROW_SCALARS = 16
"""An output with at most so many numbers per row is downloaded at once; a larger one when somebody looks at it."""
_LARGEST_GRAPH = 2 * LARGEST_BUCKET
"""Rows × samples of a batch beyond which its kernels are long, and launching them one by one costs nothing that matters."""
_SLOT = 0
_SEED, _FIRST, _FRAME, _WORDS = range(4)
"""Columns of what is uploaded for a batch: the slot, then for each drawn input its seed, first sample, frame and words."""


@dataclass(frozen=True)
class _Drawn:
    """An input of noise that is drawn on the device: where its keys stand, and what `Keys` says of it beyond them."""

    column: int
    uses: int
    samples: int
    size: int
    shape: tuple[int, ...]
    antithetic: bool


_Source = str | int | _Drawn
"""Where an input comes from: the slots (by name), the arrays given (by index), or the generator."""


class TorchScriptDeviceEngine:
    """An artifact's TorchScript programs on one device.

    Args:
        artifact: verified; every program of its card must have a TorchScript file.
        device: "cuda", "cuda:1", …; "cpu" for tests.
        memory: the device's budget, shared with the other engines on it.
        threads: threads per operator on the CPU.

    Raises:
        ArtifactError: there is no such device, the budget is spent, a file does not fit, or parity fails.
    """

    name, precision = "torchscript", "float32"

    def __init__(self, artifact: Artifact, device: str = "cuda", memory: DeviceMemory | None = None, threads: int = 1):
        self.card, self.begin = artifact.card, artifact.begin()
        self.draws_noise, self.warm_up_rows = True, 0
        torch.set_num_threads(threads)
        self._place, self._memory = _place(device), memory or DeviceMemory()
        _discover(self._place, self._memory)
        self._transfers = transfers_of(self._place)
        self._rows: dict[str, Tensor] = {}
        self._launches: dict[Any, _Batch] = {}
        self._modules: dict[str, torch.jit.ScriptModule] = {}
        self._what = f"{artifact.card.name}/{artifact.card.version}"
        self._memory.take(self, artifact.file(WEIGHTS).stat().st_size, f"{self._what}: its weights")
        try:
            self._modules = load_programs(artifact, self._place)
            self.parity = verify_parity(self, artifact)
        except torch.OutOfMemoryError as exc:
            self.close()
            raise ArtifactError(f"{artifact.path}: {self._place} has not enough memory to load it: {exc}") from exc
        except BaseException:
            self.close()
            raise

    @property
    def slot_bytes(self) -> int:
        """Memory of one row."""
        return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self._kept().values())

    def allocate(self, capacity: int) -> int:
        capacity = self._memory.slots(self, min(capacity, LARGEST_BUCKET), self.slot_bytes, self._what)
        try:
            self._rows = {
                name: torch.zeros((capacity + 1, *shape), dtype=getattr(torch, dtype), device=self._place)
                for name, (shape, dtype) in self._kept().items()
            }
        except torch.OutOfMemoryError as exc:
            self.close()
            raise ArtifactError(f"{self._what}: {self._place} has no memory for {capacity} rows: {exc}") from exc
        self._rows["mask"].fill_(1.0)
        self._launches.clear()  # bodies hold the arrays of the slots
        if self._transfers.graphs:
            torch.cuda.synchronize(self._place)
            self.warm_up_rows = capacity
        self._spare = capacity
        return capacity

    def load_rows(self, slots: Slots, arrays: Mapping[str, NDArray[Any]]) -> None:
        index = self._transfers.upload(slots.astype(np.int64))
        for name, value in arrays.items():
            shape, dtype = self._kept()[name]
            uploaded = self._transfers.upload(np.broadcast_to(value, (len(slots), *shape)).astype(dtype, copy=False))
            with self._transfers.compute(), torch.inference_mode():
                self._rows[name].index_copy_(0, index, uploaded)

    def read_rows(self, slots: Slots, names: Iterable[str]) -> Arrays:
        index = self._transfers.upload(slots.astype(np.int64))
        with self._transfers.compute(), torch.inference_mode():
            gathered = {name: self._rows[name].index_select(0, index) for name in names}
        fetches = {name: self._transfers.fetch(value) for name, value in gathered.items()}
        return {name: fetch() for name, fetch in fetches.items()}

    def run(self, program: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        return dict(self._run(program, None, arrays, None))

    def run_rows(self, program: str, slots: Slots, noise: Given, guard: str | None = None) -> Outputs:
        return self._run(program, slots, noise, guard)

    def close(self) -> None:
        self._launches.clear()
        self._rows = {}
        self._modules.clear()
        self._memory.give_back(self)
        if self._transfers.graphs:
            torch.cuda.empty_cache()

    def _kept(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape (without the row axis) and type of everything a slot holds."""
        card = self.card
        kept = {name: (tuple(card.x.shape), "float32") for name in ("x", "mask")}
        return kept | {t.name: (tuple(map(int, t.shape[1:])), t.dtype) for t in (*card.context, *card.carry, *card.state)}

    def _run(self, program: str, slots: Slots | None, given: Given, guard: str | None) -> Outputs:
        inputs = [tensor.name for tensor in self.card.programs[program].inputs]
        given = {name: given[name] for name in inputs if name in given}
        rows = len(next(iter(given.values()))) if slots is None else len(slots)
        if rows <= LARGEST_BUCKET:
            return self._batch(program, rows, slots, given, guard)
        parts: list[Outputs] = []
        for start in range(0, rows, LARGEST_BUCKET):
            which = slice(start, min(rows, start + LARGEST_BUCKET))
            few = {name: value.part(which) if isinstance(value, Keys) else value[which] for name, value in given.items()}
            parts.append(dict(self._batch(program, which.stop - start, None if slots is None else slots[which], few, guard)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _batch(self, program: str, rows: int, slots: Slots | None, given: Given, guard: str | None) -> Outputs:
        bucket = bucket_of(rows)
        key = (program, bucket, slots is None, guard, *(_kind(name, value) for name, value in given.items()))
        batch = self._launches.get(key)
        try:
            if batch is None:
                batch = self._launches[key] = self._plan(program, bucket, slots is None, given, guard)
            outputs = batch.launch(batch.pack(rows, slots, given))
        except torch.OutOfMemoryError as exc:
            self._launches.pop(key, None)
            torch.cuda.empty_cache()
            raise MemoryError(f"{self._place} has no memory for {program} on {rows} rows: raise ELBOW_DEVICE_MEMORY_MB") from exc
        return _DeviceOutputs(batch, outputs, rows)

    def _plan(self, program: str, bucket: int, free: bool, given: Given, guard: str | None) -> _Batch:
        spec = self.card.programs[program]
        dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in spec.inputs}
        arrays = [name for name, value in given.items() if not isinstance(value, Keys)]
        sources: dict[str, _Source] = {}
        columns = 1
        for name in dtypes:
            value = given.get(name)
            if isinstance(value, Keys):
                uses = value.words.shape[1]
                sources[name] = _Drawn(columns, uses, value.samples, value.size, value.shape, value.antithetic)
                columns += _WORDS + uses
            else:
                sources[name] = name if value is None else arrays.index(name)
        missing = [name for name, source in sources.items() if source == name and (free or name not in self._rows)]
        if missing:
            raise KeyError(f"{program}: the input {missing[0]!r} was not given")
        body = _Body(self._modules[program], list(sources.values()), spec.outputs, {} if free else self._rows, guard)
        shapes = [(name, given[name].shape[1:], dtypes[name]) for name in arrays]
        batch = _Batch(bucket, columns, 0 if free else self._spare, shapes, sources, body.returned)
        samples = max([source.samples for source in sources.values() if isinstance(source, _Drawn)] + [_samples(spec.inputs, given)])
        batch.launch = self._transfers.launch(body, batch.pack(0, None, {}), bucket * samples <= _LARGEST_GRAPH)
        return batch


class _Body:
    """What runs on the device for one batch: gather, draw, program, guard, scatter."""

    def __init__(
        self,
        module: torch.jit.ScriptModule,
        sources: Sequence[_Source],
        outputs: Sequence[TensorSpec],
        rows: Mapping[str, Tensor],
        guard: str | None,
    ):
        self._module, self._sources, self._rows, self._guard = module, sources, rows, guard
        self._names = [tensor.name for tensor in outputs]
        self.returned = [name for name in self._names if name not in rows]

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        keys, *arrays = tensors
        slots = keys[:, _SLOT].contiguous()
        made = self._module(*(self._input(source, keys, slots, arrays) for source in self._sources))
        outputs = dict(zip(self._names, (made,) if isinstance(made, Tensor) else made, strict=True))
        good = None if self._guard is None else torch.isfinite(outputs[self._guard]).reshape(len(keys), -1).all(1)
        for name in self._rows.keys() & outputs.keys():
            kept, new = self._rows[name], outputs[name]
            if good is not None:
                new = torch.where(good.view(-1, *(1,) * (new.ndim - 1)), new, kept.index_select(0, slots))
            kept.index_copy_(0, slots, new)
        return tuple(outputs[name] for name in self.returned)

    def _input(self, source: _Source, keys: Tensor, slots: Tensor, arrays: Sequence[Tensor]) -> Tensor:
        if isinstance(source, str):
            return self._rows[source].index_select(0, slots)
        if isinstance(source, int):
            return arrays[source]
        own = keys[:, source.column :]
        words = own[:, _WORDS : _WORDS + source.uses]
        drawn = normals(own[:, _SEED], words, own[:, _FIRST], own[:, _FRAME], source.samples, source.size, source.antithetic)
        return drawn.reshape(len(keys), *source.shape)


class _Batch:
    """All batches of one program, bucket and kind of inputs: how they are packed, and what launches them.

    Attributes:
        returned: the outputs that have no place in the slots, in order. launch: set once `pack` can make a blank batch.
    """

    launch: Launch

    def __init__(
        self,
        bucket: int,
        columns: int,
        spare: int,
        arrays: Sequence[tuple[str, tuple[int, ...], np.dtype[Any]]],
        sources: Mapping[str, _Source],
        returned: list[str],
    ):
        self._bucket, self._columns, self._spare, self._arrays, self.returned = bucket, columns, spare, arrays, returned
        self._drawn = {name: source for name, source in sources.items() if isinstance(source, _Drawn)}

    def pack(self, rows: int, slots: Slots | None, given: Given) -> list[NDArray[Any]]:
        """The keys and the given arrays, padded to the bucket with zeros and the spare slot. New ones each time: uploads read them late."""
        keys = np.zeros((self._bucket, self._columns), np.int64)
        keys[:, _SLOT] = self._spare
        if slots is not None:
            keys[:rows, _SLOT] = slots
        packed: list[NDArray[Any]] = [keys]
        for name, drawn in self._drawn.items():
            value = given.get(name)
            if isinstance(value, Keys):
                own = keys[:rows, drawn.column :]
                own[:, _SEED], own[:, _FIRST], own[:, _FRAME] = value.seeds.view(np.int64), value.first, value.frames
                own[:, _WORDS : _WORDS + drawn.uses] = value.words.view(np.int64)
        for name, shape, dtype in self._arrays:
            array = np.zeros((self._bucket, *shape), dtype)
            if name in given:
                array[:rows] = given[name]
            packed.append(array)
        return packed


class _DeviceOutputs(Mapping[str, NDArray[Any]]):
    """Outputs of a batch: the small ones are on their way to the host, the others are fetched when looked at."""

    def __init__(self, batch: _Batch, outputs: tuple[Tensor, ...], rows: int):
        self._launch = batch.launch
        self._tensors = {name: tensor[:rows] for name, tensor in zip(batch.returned, outputs, strict=True)}
        self._fetches = {name: self._launch.fetch(t) for name, t in self._tensors.items() if t.numel() <= rows * _PER_ROW_SCALARS}
        self._arrays: Arrays = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            fetch: Fetch | None = self._fetches.get(name)
            self._arrays[name] = (fetch or self._launch.fetch(self._tensors[name]))()
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def bucket_of(rows: int) -> int:
    """The batch that so many rows are padded to: 1, 2, 4, … 8,192."""
    return 1 << max(0, rows - 1).bit_length()


def _kind(name: str, value: NDArray[Any] | Keys) -> tuple[Any, ...]:
    """What two batches must share to be one launch."""
    if isinstance(value, Keys):
        return (name, "keys", value.words.shape[1], value.samples, value.shape, value.antithetic)
    return (name, "array", value.shape[1:])


def _samples(inputs: Sequence[TensorSpec], given: Given) -> int:
    """The largest number of samples among the arrays given, 1 if there is none."""
    found = [
        given[tensor.name].shape[tensor.shape.index("samples")]
        for tensor in inputs
        if "samples" in tensor.shape and tensor.name in given and not isinstance(given[tensor.name], Keys)
    ]
    return max(found, default=1)


def _place(device: str) -> torch.device:
    place = torch.device(device)
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ArtifactError(f"ELBOW_DEVICE is {device!r}, and torch {torch.__version__} finds no CUDA device here: set it to cpu")
        if (place.index or 0) >= torch.cuda.device_count():
            raise ArtifactError(f"ELBOW_DEVICE is {device!r}, and there are {torch.cuda.device_count()} CUDA devices here")
        return torch.device("cuda", place.index or 0)
    return place


def _discover(place: torch.device, memory: DeviceMemory) -> None:
    """Tells the budget what the device has, and the allocator what the budget is."""
    if place.type != "cuda":
        memory.discover(2**40)
        return
    free, total = torch.cuda.mem_get_info(place)
    memory.discover(int(0.9 * free))
    assert memory.total_bytes is not None
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory.total_bytes / total), place)
