"""Epochs, logging, validation, resume. The run's whole state is saved in time, so Ctrl-C or a kill loses at most a minute.

Everything random comes from four generators (order of rows, binarisation, masks, noise), whose states are saved beside
the weights: a resumed run ends with the same bits as one that was never interrupted.
"""

from __future__ import annotations

import json
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.catalogue import build
from models.objective import Noise, elbo
from models.refinement import steps as refinement_states
from training.checkpoint import LAST, load_last, load_weights, save_last, save_weights
from training.config import RunConfig
from training.data.batches import Batches
from training.data.binarise import observe
from training.data.catalogue import load
from training.data.images import Images
from training.data.masks import random_masks
from training.step import Seen, fresh_noise
from training.update import Gradients

SAVE_EVERY_S = 60.0
VALIDATION_SEED = 20180723
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


def fabric_for(device: str) -> Fabric:
    """Fabric for one or several processes. Gradients are averaged across them by `Trainer`, so the model is not wrapped."""
    accelerator = {"cuda": "gpu"}.get(device, device)
    return Fabric(accelerator=accelerator, devices="auto" if accelerator == "gpu" else 1)


class Trainer:
    """One run on one device (or one process of several)."""

    def __init__(self, run: RunConfig, folder: Path, fabric: Fabric, data_root: str | None = None):
        self.run, self.folder, self.fabric = run, folder, fabric
        self.device = fabric.device
        self.images: Images = load(run.data.name, data_root)
        train, valid = self.images.train, self.images.valid
        self.train_x = self._resident(train[: run.train_rows])
        self.valid_x = self._resident(valid[: run.validation_rows])
        self.model = build(run.architecture, seed=run.seed)
        self.epochs_before = 0
        if run.parent is not None:
            parent, _, facts = load_weights(folder.parent / run.parent)
            self.model.load_state_dict(parent.state_dict())
            self.epochs_before = int(facts["epoch"])
        self.model.to(self.device)
        self.parts = {"generative": self.model.generative, "inference": self.model.inference}
        self.optimisers = {
            name: torch.optim.Adam(part.parameters(), lr=run.optimiser.learning_rate, fused=True)
            for name, part in self.parts.items()
            if name not in run.frozen and any(True for _ in part.parameters())
        }
        self.generators = {name: torch.Generator("cpu" if name == "order" else self.device) for name in GENERATORS}
        self._seed_generators(0)
        self.batches = Batches(self.train_x, run.batch_size, self.generators["order"], drop_last=run.compiled)
        self.gradients = Gradients(self.model, run.refinement.steps, self._autocast, run.compiled, run.refinement.late)
        self.updates = 0
        self.best = -math.inf
        self.sums: dict[str, list[float]] = {}
        self.seen_batches = 0
        self._saved_at = time.monotonic()

    @property
    def alone(self) -> bool:
        """One process: its state is saved in mid-epoch too. Several processes start anew from the last epoch's end."""
        return bool(self.fabric.world_size == 1)

    def _seed_generators(self, epoch: int) -> None:
        """Generators of this process for what begins in `epoch`: other processes and epochs get other streams."""
        first = ((self.run.seed * 1000 + epoch) * self.fabric.world_size + self.fabric.global_rank) * len(GENERATORS)
        for i, generator in enumerate(self.generators.values()):
            generator.manual_seed(first + i)

    # one update ------------------------------------------------------------------------------------------------------

    def update(self, index: Tensor) -> list[Seen]:
        """Draws x, mask and noise, adds up the gradients, steps both optimisers."""
        run = self.run
        x = observe(self.train_x[index], self.images.kind, self.generators["binarise"])
        mask = self._masks(len(x)) if run.data.mask_probability else torch.ones_like(x)
        trace = self.gradients(x, mask, self._noise(len(x)), run.kl_weight(self.batches.epoch))
        for name, optimiser in self.optimisers.items():
            parameters = list(self.parts[name].parameters())
            for parameter in () if self.alone else parameters:
                parameter.grad = self.fabric.all_reduce(parameter.grad, reduce_op="mean")
            if run.optimiser.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, run.optimiser.clip_norm * len(x))
            for group in optimiser.param_groups:
                group["lr"] = run.optimiser.rate(self.batches.epoch, run.epochs)
            optimiser.step()
        self.model.zero_grad(set_to_none=True)
        self.updates += 1
        return trace

    def _noise(self, rows: int) -> list[Noise]:
        refinement, sizes = self.run.refinement, self.model.generative.latent_sizes
        draws = refinement.steps + 1 if self.model.inference.refines else 1
        return [
            fresh_noise(sizes, rows, refinement.samples, refinement.antithetic, self.device, self.generators["noise"]) for _ in range(draws)
        ]

    def _masks(self, rows: int) -> Tensor:
        height, width = self.images.shape
        return random_masks(rows, (height, width), self.generators["mask"], keep=1 - self.run.data.mask_probability)

    def _autocast(self) -> torch.autocast:
        # no weight cache: a cast cached under no_grad would be reused, without its gradient, by the passes that need one
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16-mixed", cache_enabled=False)

    def _resident(self, rows: Any) -> Tensor:
        return torch.as_tensor(rows).reshape(len(rows), -1).to(self.device)

    # epochs ----------------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the last epoch from wherever the folder says the run is.

        Raises:
            TrainingFailed: the objective was not finite; the last good checkpoint is kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        resumed = self.resume()
        line = self._logged()
        if self.fabric.global_rank == 0 and not resumed:
            description = {"run": self.run.to_dict(), "data_sha256": self.images.sha256, **machine()}
            (self.folder / "run.json").write_text(json.dumps(description, indent=1) + "\n")
        writer = SummaryWriter(str(self.folder / "tensorboard")) if self.fabric.global_rank == 0 else None
        total = self.run.epochs * len(self.batches)
        bar = tqdm(total=total, initial=self.updates, unit="update", dynamic_ncols=True, mininterval=1.0, smoothing=0.05)
        try:
            with deferred_interrupt() as interrupted:
                while self.batches.epoch < self.run.epochs:
                    began = time.monotonic()
                    if not self.alone:
                        self._seed_generators(self.batches.epoch)
                    for index in self.batches:
                        trace = self.update(index)
                        self._add_up(trace)
                        bar.update()
                        progress = f"epoch {self.batches.epoch + 1}/{self.run.epochs} ELBO {self._mean('elbo')[-1]:.2f} nats"
                        bar.set_postfix_str(progress, refresh=False)
                        stop = interrupted()
                        if self.alone and (stop or time.monotonic() - self._saved_at > SAVE_EVERY_S):
                            self.save()
                        if stop:
                            raise KeyboardInterrupt
                    line = self._finish_epoch(time.monotonic() - began)
                    bar.write(describe(line))
                    if writer is not None:
                        log_scalars(writer, line)
        except KeyboardInterrupt:
            bar.write(f"stopped after {self.updates} updates; the same command continues from {self.folder}")
            raise
        finally:
            bar.close()
            if writer is not None:
                writer.close()
        if self.fabric.global_rank == 0:
            save_weights(self.folder / "final", self.model, self.run, self._facts(line))
        return line

    def _finish_epoch(self, seconds: float) -> dict[str, Any]:
        valid = self.validate()
        line = {
            "epoch": self.batches.epoch,
            "updates": self.updates,
            "train_elbo": self._mean("elbo"),
            "grad_mu": self._mean("grad_mu"),
            "grad_log_sigma": self._mean("grad_log_sigma"),
            "valid_elbo": valid,
            "learning_rate": self.run.optimiser.rate(self.batches.epoch - 1, self.run.epochs),
            "seconds": seconds,
        }
        self.sums, self.seen_batches = {}, 0
        if self.fabric.global_rank == 0:
            if valid[-1] > self.best:
                self.best = valid[-1]
                save_weights(self.folder / "best", self.model, self.run, self._facts(line))
            with (self.folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        self.save()
        return line

    def validate(self, rows_at_once: int = 1000) -> list[float]:
        """Mean validation ELBO after 0 … K steps in nats per row: fresh binarisation and noise, the same ones every epoch."""
        generator = torch.Generator(self.device).manual_seed(VALIDATION_SEED)
        sizes, refinement = self.model.generative.latent_sizes, self.run.refinement
        totals: list[float] = [0.0] * (refinement.steps + 1)
        for rows in self.valid_x.split(rows_at_once):
            x = observe(rows, self.images.kind, generator)
            mask = torch.ones_like(x)

            def draw(k: int, rows: int = len(x)) -> Noise:
                return fresh_noise(sizes, rows, refinement.samples, refinement.antithetic, self.device, generator)

            states = refinement_states(self.model.generative, self.model.inference, x, mask, refinement.steps, draw)
            for k, state in enumerate(states):
                with torch.no_grad():
                    measure = fresh_noise(sizes, len(x), 1, False, self.device, generator)
                    totals[k] += float(elbo(self.model.generative, state.q, x, mask, measure).elbo.sum())
        return [total / len(self.valid_x) for total in totals[: None if self.model.inference.refines else 1]]

    def _add_up(self, trace: list[Seen]) -> None:
        names = ("elbo", "grad_mu", "grad_log_sigma")
        means = {name: torch.stack([getattr(seen, name).mean() for seen in trace]).tolist() for name in names}
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
        """The line of the last finished epoch, or {}. Lines of later epochs, from a run killed before it saved, are dropped."""
        log = self.folder / "log.jsonl"
        if not log.exists():
            return {}
        lines = log.read_text().splitlines(keepends=True)[: self.batches.epoch]
        if self.fabric.global_rank == 0:
            partial = log.with_suffix(".partial")
            partial.write_text("".join(lines))
            partial.replace(log)
        return dict(json.loads(lines[-1])) if lines else {}

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
                    "run": json.dumps(self.run.to_dict()),
                    "data_sha256": self.images.sha256,
                    "model": self.model.state_dict(),
                    "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
                    "generators": {name: generator.get_state() for name, generator in self.generators.items()},
                    "batches": dict(self.batches.state_dict()),
                    "updates": self.updates,
                    "best": self.best,
                    "sums": self.sums,
                    "seen_batches": self.seen_batches,
                },
            )

    def resume(self) -> bool:
        """Continues the run in the folder, if there is one.

        Raises:
            TrainingFailed: the folder holds another run, or one on other data.
        """
        state = load_last(self.folder, self.device)
        if state is None:
            return False
        if RunConfig.from_dict(json.loads(state["run"])) != self.run:
            raise TrainingFailed(f"{self.folder} holds a run with another configuration: choose another --output, or remove it")
        if state.get("data_sha256", self.images.sha256) != self.images.sha256:
            raise TrainingFailed(f"{self.folder} was trained on another {self.run.data.name}: give the same --data, or another --output")
        self.model.load_state_dict(state["model"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.batches.load_state_dict(state["batches"])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name].cpu())
        self.updates, self.best = state["updates"], state["best"]
        self.sums, self.seen_batches = state["sums"], state["seen_batches"]
        return True

    def _facts(self, line: dict[str, Any]) -> dict[str, Any]:
        epoch = self.epochs_before + self.batches.epoch
        return {"epoch": epoch, "valid_elbo": line.get("valid_elbo"), "data_sha256": self.images.sha256, **machine()}


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
    for name in ("train_elbo", "valid_elbo", "grad_mu", "grad_log_sigma"):
        for k, value in enumerate(line[name]):
            writer.add_scalar(f"{name}/step_{k}", value, line["epoch"])
    writer.add_scalar("learning_rate", line["learning_rate"], line["epoch"])


