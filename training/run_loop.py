"""Epochs, logging, validation, resume: what every kind of run shares. Its whole state is saved in time, so Ctrl-C or a kill
loses at most a minute.

Several processes share out the rows of each batch and add up their gradients, so a run is the same whatever their number: as many
updates, of as many rows each, with the noise of the process that has the row.

Everything random comes from generators whose states are saved beside the weights: a resumed run ends with the same bits
as one that was never interrupted. What one update is, and what validation measures, the kinds of runs say (training/loop.py,
training/sequence_loop.py).
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.catalogue import FilterModel, LatentModel
from training.checkpoint import LAST, load_last, save_last, save_weights
from training.config import RunConfig
from training.data.errors import reason
from training.data.same import refuse_other_data
from training.records import read_epochs, write_text
from training.sequence_config import SequenceRunConfig

SAVE_EVERY_S = 60.0
GENERATORS = ("order", "binarise", "mask", "noise")


class TrainingFailed(Exception):
    """The run cannot go on; the message names the step and the checkpoint to return to."""


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C becomes a question the loop asks between updates, where the state is whole; a second one stops at once.

    Stopped within an update, the batch and its noise would be drawn but not learnt from, and the run no longer the same.
    """
    asked = False
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    # only the main thread may set handlers, and only it is interrupted
    main = threading.current_thread() is threading.main_thread()
    if main:
        signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def fabric_for(device: str, processes: int | None = None) -> Fabric:
    """Fabric for so many processes, one per card; None = all cards, and one on the CPU. `RunLoop` adds up their gradients, so the model
    is not wrapped.

    Raises:
        TrainingFailed: this machine has no such device, or fewer.
    """
    if device == "cpu":
        return Fabric(accelerator="cpu", devices=processes or 1)
    if device != "cuda":
        raise TrainingFailed(f"--device {device}: cpu or cuda")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cards < (processes or 1):
        asked = "" if processes is None else f", --processes {processes}"
        raise TrainingFailed(f"--device cuda{asked}: torch sees {cards} CUDA devices on this machine: ask for fewer, or leave it out")
    return Fabric(accelerator="gpu", devices=processes or "auto")


class Epochs(Protocol):
    """Batches of one epoch per `for` loop, resumable in its midst."""

    epoch: int

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


class RunLoop(ABC):
    """One run on one device (or one process of several).

    A subclass sets `batches` and says how an update is made of one of them and how the model is validated.
    """

    batches: Epochs
    validate_every = 1
    """Epochs from one validation, line of the log and possible best checkpoint to the next."""

    def __init__(
        self, run: RunConfig | SequenceRunConfig, folder: Path, fabric: Fabric, model: LatentModel | FilterModel, data_sha256: str
    ):
        if run.batch_size < fabric.world_size:
            raise TrainingFailed(f"{run.name}: a batch of {run.batch_size} rows has not one for each of {fabric.world_size} processes")
        self.config, self.folder, self.fabric, self.data_sha256 = run, folder, fabric, data_sha256
        self.device = fabric.device
        self.parts = {"generative": model.generative, "inference": model.inference}
        self.model = model.to(self.device)
        self.optimisers = {
            name: torch.optim.AdamW(part.parameters(), lr=run.optimiser.learning_rate, weight_decay=run.optimiser.weight_decay, fused=True)
            for name, part in self.parts.items()
            if name not in run.frozen and any(True for _ in part.parameters())
        }
        self.generators = {name: torch.Generator("cpu" if name == "order" else self.device) for name in GENERATORS}
        self.generators["order"].manual_seed(run.seed * 1000 * len(GENERATORS))
        self._seed_generators(0)
        self.epochs_before = 0
        self.updates = 0
        self._share = 1.0
        """Of the last batch's rows or frames, what this process had."""
        self.spent_s = 0.0
        self.uncounted = False
        """Set by an update that compiled: its time is not training's."""
        self.best = -math.inf
        self.sums: dict[str, list[float]] = {}
        self.seen_batches = 0
        self._saved_at = time.monotonic()

    @abstractmethod
    def update(self, batch: Any) -> Mapping[str, Tensor]:
        """Adds up the gradients of a batch and steps the optimisers; what it saw, by name, (K + 1,) each: "elbo" and others."""

    @abstractmethod
    def part(self, batch: Any) -> Any:
        """The rows of a batch that are this process's share: every so-manieth, none if there are fewer rows than processes."""

    @abstractmethod
    def rows(self, batch: Any) -> int:
        """How many rows a batch has."""

    @abstractmethod
    def validate(self) -> list[float]:
        """Mean validation ELBO after 0 … K steps, nats: the same draws every time."""

    @property
    def progress(self) -> float:
        """How much of the run is done, in epochs of `epochs`: what the learning rate follows."""
        return self.batches.epoch

    @property
    def over(self) -> bool:
        return self.batches.epoch >= self.config.epochs

    @property
    def alone(self) -> bool:
        """One process: its state is saved in mid-epoch too. Several processes start anew from the last epoch's end."""
        return bool(self.fabric.world_size == 1)

    def _seed_generators(self, epoch: int) -> None:
        """Generators of this process for what begins in `epoch`: other processes and epochs get other streams. The order of the rows is
        one for all processes, and goes on from epoch to epoch."""
        first = ((self.config.seed * 1000 + epoch) * self.fabric.world_size + self.fabric.global_rank) * len(GENERATORS)
        for i, (name, generator) in enumerate(self.generators.items()):
            if name != "order":
                generator.manual_seed(first + i)

    def step_optimisers(self, weight: float) -> None:
        """Adds up the gradients of all processes, clips them per unit of `weight` (rows or frames of this one), and steps."""
        optimiser_config = self.config.optimiser
        gradients = [parameter.grad for name in self.optimisers for parameter in self.parts[name].parameters()]
        own, weight = weight, self._add_over_processes([gradient for gradient in gradients if gradient is not None], weight)
        self._share = own / weight
        for name, optimiser in self.optimisers.items():
            parameters = list(self.parts[name].parameters())
            if optimiser_config.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, optimiser_config.clip_norm * weight)
            for group in optimiser.param_groups:
                group["lr"] = optimiser_config.rate(self.progress, self.config.epochs)
            optimiser.step()
        self.model.zero_grad(set_to_none=True)
        self.updates += 1

    def _add_over_processes(self, tensors: list[Tensor], number: float) -> float:
        """Puts the sum over processes into each tensor, and gives that of `number`: one exchange for all of them."""
        if self.alone:
            return number
        joined = torch.cat([*(tensor.reshape(-1) for tensor in tensors), torch.tensor([number], device=self.device)])
        added = self.fabric.all_reduce(joined, reduce_op="sum")
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, part in zip(tensors, added[:-1].split(sizes), strict=True):
            tensor.copy_(part.view_as(tensor))
        return float(added[-1])

    def _agree(self, seen: Mapping[str, Tensor], stop: bool) -> tuple[Mapping[str, Tensor], bool]:
        """What all processes saw, each weighed by its share of the rows or frames; whether any of them was told to stop. They have one
        clock from then on: the mean of theirs."""
        if self.alone:
            return seen, stop
        own = [value.double().reshape(-1) * self._share for value in seen.values()]
        clock = torch.tensor([self.spent_s / self.fabric.world_size, stop], dtype=torch.float64, device=self.device)
        added = self.fabric.all_reduce(torch.cat([*own, clock]), reduce_op="sum")
        self.spent_s = float(added[-2])
        means = added[:-2].split([len(value) for value in own])
        return dict(zip(seen, means, strict=True)), float(added[-1]) > 0

    # epochs ----------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the last epoch from wherever the folder says the run is.

        Raises:
            TrainingFailed: the objective was not finite (the last good checkpoint is kept), or as `resume`. DataError: as `resume`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        resumed = self.resume()
        line = self._logged()
        if self.fabric.global_rank == 0 and not resumed:
            description = {"run": self.config.to_dict(), "data_sha256": self.data_sha256, **machine()}
            (self.folder / "run.json").write_text(json.dumps(description, indent=1) + "\n")
        writer = SummaryWriter(str(self.folder / "tensorboard")) if self.fabric.global_rank == 0 else None
        total = self.config.epochs * len(self.batches)
        first = self.fabric.global_rank == 0
        bar = tqdm(total=total, initial=self.updates, unit="update", dynamic_ncols=True, mininterval=1.0, smoothing=0.05, disable=not first)
        try:
            with deferred_interrupt() as interrupted:
                began = time.monotonic()
                while not self.over:
                    if not self.alone:
                        self._seed_generators(self.batches.epoch)
                    self._epoch(bar, interrupted)
                    if self.over or self.batches.epoch % self.validate_every == 0:
                        line = self._finish_epoch(time.monotonic() - began)
                        began = time.monotonic()
                        if writer is not None:
                            bar.write(describe(line))
                            log_scalars(writer, line)
        except KeyboardInterrupt:
            if first:
                bar.write(f"stopped after {self.updates} updates; the same command continues from {self.folder}")
            raise
        finally:
            bar.close()
            if writer is not None:
                writer.close()
        if self.fabric.global_rank == 0:
            save_weights(self.folder / "final", self.model, self.config, self._facts(line))
        return line

    def _epoch(self, bar: tqdm[Any], interrupted: Callable[[], bool]) -> None:
        """What is left of an epoch, an update per batch.

        Raises:
            KeyboardInterrupt: asked to stop; the state is whole, and saved where this process is alone.
        """
        for batch in self.batches:
            if self.rows(batch) < self.fabric.world_size:
                continue  # the last one: not a row for everyone
            seen, stop = self._agree(self._timed(self.part(batch)), interrupted())
            self._add_up(seen)
            bar.update()
            progress = f"epoch {self.batches.epoch + 1}/{self.config.epochs} ELBO {self._mean('elbo')[-1]:.2f} nats"
            bar.set_postfix_str(progress, refresh=False)
            if self.alone and (stop or time.monotonic() - self._saved_at > SAVE_EVERY_S):
                self.save()
            if stop:
                raise KeyboardInterrupt

    def _timed(self, batch: Any) -> Mapping[str, Tensor]:
        # with one CPU thread the processor's time: what else runs on the machine then costs the run nothing
        clock = time.process_time if self.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        seen = self.update(batch)
        if not self.uncounted:
            self.spent_s += clock() - began
        return seen

    def _finish_epoch(self, seconds: float) -> dict[str, Any]:
        valid = self.validate() if self.fabric.global_rank == 0 else [math.nan]
        line = {
            "epoch": self.batches.epoch,
            "updates": self.updates,
            "train_elbo": self._mean("elbo"),
            **{name: self._mean(name) for name in self.sums if name != "elbo"},
            "valid_elbo": valid,
            "learning_rate": self.config.optimiser.rate(max(0, self.progress - 1), self.config.epochs),
            "seconds": seconds,
            "training_seconds": self.spent_s,
        }
        self.sums, self.seen_batches = {}, 0
        if self.fabric.global_rank == 0:
            if valid[-1] > self.best:
                self.best = valid[-1]
                save_weights(self.folder / "best", self.model, self.config, self._facts(line))
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        self.save()
        return line

    def _add_up(self, seen: Mapping[str, Tensor]) -> None:
        means = {name: value.tolist() for name, value in seen.items()}
        if not all(math.isfinite(value) for values in means.values() for value in values):
            raise self._failed("the ELBO or its gradient")
        for name, values in means.items():
            before = self.sums.get(name, [0.0] * len(values))
            self.sums[name] = [a + b for a, b in zip(before, values, strict=True)]
        self.seen_batches += 1

    def _mean(self, name: str) -> list[float]:
        return [value / max(1, self.seen_batches) for value in self.sums.get(name, [math.nan])]

    def _failed(self, what: str) -> TrainingFailed:
        kept = f"The last good checkpoint is {self.folder / LAST}" if (self.folder / LAST).exists() else "No checkpoint was saved yet"
        return TrainingFailed(
            f"update {self.updates} (epoch {self.batches.epoch + 1}): {what} is not finite. {kept}; "
            "train with a lower learning rate or clip_norm into another folder."
        )

    def _logged(self) -> dict[str, Any]:
        """The line of the last finished epoch, or {}. Lines that a kill cut short, or of later epochs, from a run killed before it saved,
        are dropped."""
        log = self.folder / "log.jsonl"
        lines = [entry for entry in read_epochs(log) if entry["epoch"] <= self.batches.epoch]
        if self.fabric.global_rank == 0 and log.exists():
            write_text(log, "".join(json.dumps(line) + "\n" for line in lines))
        return lines[-1] if lines else {}

    # state -----------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the resumable state. Of several processes the first one writes it, between epochs (`_seed_generators`).

        Raises:
            TrainingFailed: a weight is not finite; the state saved before stays.
        """
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise self._failed("a weight")
        self._saved_at = time.monotonic()
        if self.fabric.global_rank == 0:
            save_last(
                self.folder,
                {
                    "run": json.dumps(self.config.to_dict()),
                    "data_sha256": self.data_sha256,
                    "model": self.model.state_dict(),
                    "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
                    "generators": {name: generator.get_state() for name, generator in self.generators.items()},
                    "batches": dict(self.batches.state_dict()),
                    "updates": self.updates,
                    "spent_s": self.spent_s,
                    "best": self.best,
                    "sums": self.sums,
                    **self.extra_state(),
                    "seen_batches": self.seen_batches,
                },
            )

    def resume(self) -> bool:
        """Continues the run in the folder, if there is one.

        Raises:
            TrainingFailed: the folder holds another run, or a damaged one. DataError: the run was trained on other data.
        """
        state = self._last()
        if state is None:
            return False
        known, asked = json.loads(state["run"]), self.config.data.name
        try:
            saved = type(self.config).from_dict(known)
        except (LookupError, TypeError, ValueError, AttributeError):  # of another kind, or of a version with other fields
            saved = None
        if saved is not None and saved.data.name != asked:
            again = f"--on {shlex.quote(saved.data.name)}"
            raise TrainingFailed(
                f"{self.folder} was trained on {saved.data.name}, not on {asked}: resume it with {again}, or choose another --output"
            )
        # the size of x follows from the data: where they changed, the configuration did too
        if known.get("data", {}).get("name") == asked:
            refuse_other_data(f"the run in {self.folder}", asked, state.get("data_sha256"), self.data_sha256)
        if saved != self.config:
            raise TrainingFailed(
                f"{self.folder} holds a run with another configuration: give its options again, choose another --output, or remove it"
            )
        self.model.load_state_dict(state["model"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.batches.load_state_dict(state["batches"])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name].cpu())
        self.updates, self.best, self.spent_s = state["updates"], state["best"], state.get("spent_s", 0.0)
        self.sums, self.seen_batches = state["sums"], state["seen_batches"]
        self.load_extra_state(state)
        return True

    def _last(self) -> dict[str, Any] | None:
        try:
            state = load_last(self.folder, self.device)
            if state is not None:
                state["run"]
        except Exception as exc:  # torch.load can fail with anything
            raise TrainingFailed(
                f"{self.folder / LAST} is damaged ({reason(exc).splitlines()[0]}): put a copy of it back, or train into another --output"
            ) from exc
        return state

    def extra_state(self) -> dict[str, Any]:
        """What this kind of run needs besides to go on exactly."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what `extra_state` gave."""
        return

    def _facts(self, line: dict[str, Any]) -> dict[str, Any]:
        epoch = self.epochs_before + self.batches.epoch
        return {"epoch": epoch, "valid_elbo": line.get("valid_elbo"), "data_sha256": self.data_sha256, **machine()}


def machine() -> dict[str, str]:
    """Versions that a figure depends on."""
    return {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine()}


def describe(line: dict[str, Any]) -> str:
    """An epoch in one line of text."""
    valid = line["valid_elbo"]
    return (
        f"epoch {line['epoch']:4d}  train {line['train_elbo'][-1]:8.2f}  valid {valid[-1]:8.2f} nats"
        f"  (start {valid[0]:.1f}, 1 step {valid[min(1, len(valid) - 1)]:.2f})  {line['seconds']:.1f} s"
    )


def log_scalars(writer: SummaryWriter, line: dict[str, Any]) -> None:
    """The epoch's figures, one curve per refinement step."""
    for name, values in line.items():
        for k, value in enumerate(values if isinstance(values, list) else ()):
            writer.add_scalar(f"{name}/step_{k}", value, line["epoch"])
    writer.add_scalar("learning_rate", line["learning_rate"], line["epoch"])
