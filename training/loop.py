"""Runs of static models: rows of images, for a Bernoulli drawn anew at every use, refined and learned from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from models.catalogue import LatentModel, build
from models.objective import Noise, elbo
from models.refinement import steps as refinement_states
from training.checkpoint import CheckpointError, load_static
from training.config import RunConfig
from training.data.batches import Batches
from training.data.binarise import observe
from training.data.images import Images
from training.data.masks import random_masks
from training.own_data import called
from training.run_loop import RunLoop, TrainingFailed
from training.step import Seen, fresh_noise
from training.update import Gradients

VALIDATION_SEED = 20180723


class Trainer(RunLoop):
    """One run of a static model. `batches` gives the rows of each update; `images`: the run's data, where they are read already.

    Raises:
        TrainingFailed: the run that this one begins from is not there, or of another size.
    """

    def __init__(self, run: RunConfig, folder: Path, fabric: Fabric, data_root: str | None = None, images: Images | None = None):
        self.run = run
        self.images = run.data.load(data_root) if images is None else images
        self.static: LatentModel = build(run.architecture, seed=run.seed)
        before = 0
        if run.parent is not None:
            before = take_weights(self.static, run, folder.parent / run.parent)
        super().__init__(run, folder, fabric, self.static, self.images.sha256)
        self.epochs_before = before
        self.train_x = self._resident(self.images.train[: run.train_rows])
        self.valid_x = self._resident(self.images.valid[: run.validation_rows])
        self.batches = Batches(self.train_x, min(run.batch_size, len(self.train_x)), self.generators["order"], drop_last=run.compiled)
        self.gradients = Gradients(
            self.static, run.refinement.steps, self._autocast, run.compiled, run.refinement.late, run.refinement.linked
        )

    def update(self, index: Tensor) -> dict[str, Tensor]:
        """Draws x, mask and noise, adds up the gradients, steps both optimisers. `index`: rows of the training set."""
        run = self.run
        x = observe(self.train_x[index], self.images.kind, run.architecture.generative.likelihood, self.generators["binarise"])
        mask = self._masks(len(x)) if run.data.mask_probability else torch.ones_like(x)
        trace = self.gradients(x, mask, self._noise(len(x)), run.kl_weight(self.batches.epoch))
        self.step_optimisers(len(x))
        return means(trace)

    def part(self, batch: Tensor) -> Tensor:
        return batch[self.fabric.global_rank :: self.fabric.world_size]

    def rows(self, batch: Tensor) -> int:
        return len(batch)

    def _noise(self, rows: int) -> list[Noise]:
        refinement, sizes = self.run.refinement, self.static.generative.latent_sizes
        draws = refinement.steps + 1 if self.static.inference.refines else 1
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

    def validate(self, rows_at_once: int = 1000) -> list[float]:
        """Mean validation ELBO after 0 … K steps in nats per row: fresh binarisation and noise, the same ones every epoch."""
        generator = torch.Generator(self.device).manual_seed(VALIDATION_SEED)
        sizes, refinement = self.static.generative.latent_sizes, self.run.refinement
        totals: list[float] = [0.0] * (refinement.steps + 1)
        for rows in self.valid_x.split(rows_at_once):
            x = observe(rows, self.images.kind, self.run.architecture.generative.likelihood, generator)
            mask = torch.ones_like(x)

            def draw(k: int, rows: int = len(x)) -> Noise:
                return fresh_noise(sizes, rows, refinement.samples, refinement.antithetic, self.device, generator)

            states = refinement_states(self.static.generative, self.static.inference, x, mask, refinement.steps, draw)
            for k, state in enumerate(states):
                with torch.no_grad():
                    measure = fresh_noise(sizes, len(x), 1, False, self.device, generator)
                    totals[k] += float(elbo(self.static.generative, state.q, x, mask, measure).elbo.sum())
        return [total / len(self.valid_x) for total in totals[: None if self.static.inference.refines else 1]]


def take_weights(model: LatentModel, run: RunConfig, folder: Path) -> int:
    """Gives the model the weights of the run's parent in `folder`; the epochs that they were trained for.

    Raises:
        TrainingFailed: there is no checkpoint in the folder, or one of other sizes.
    """
    try:
        parent, parent_run, facts = load_static(folder)
    except CheckpointError as exc:
        what = exc if folder.exists() else f"there is no {folder}"
        raise TrainingFailed(
            f"{run.name} begins with the weights of the run {run.parent}, looked for beside --output: {what}. "
            f"First comes `elbow-train train {_command(run)}`; or let --output lie beside it"
        ) from exc
    wanted, given = ({name: tuple(value.shape) for name, value in each.state_dict().items()} for each in (model, parent))
    if wanted != given:
        name = min(wanted.items() ^ given.items())[0]
        raise TrainingFailed(
            f"{run.name} begins with the weights of {parent_run.name} ({folder}), which has other sizes: {name} is "
            f"{given.get(name, 'absent')} there, {wanted.get(name, 'absent')} in {run.name}"
        )
    model.load_state_dict(parent.state_dict())
    return int(facts["epoch"])


def _command(run: RunConfig) -> str:
    """What `elbow-train train` is given to train the run's parent."""
    from training.runs import RUNS

    for name in RUNS:
        if run.parent == called(name, run.data.name):
            return f"{name} --on {shlex.quote(run.data.name)}"
    return str(run.parent)


def means(trace: list[Seen]) -> dict[str, Tensor]:
    """What an update saw after 0 … K steps, each the mean over the batch, (K + 1,)."""
    return {name: torch.stack([getattr(seen, name).mean() for seen in trace]) for name in ("elbo", "grad_mu", "grad_log_sigma")}
