"""What a run leaves on disk.

    runs/<name>/
        run.json            the RunConfig, versions, machine
        last.pt             resumable state: weights, optimisers, every generator, position in the epoch. Never served
        best/               weights.safetensors + checkpoint.json, of the best validation ELBO
        final/              the same, after the last epoch
        log.jsonl           one line an epoch
        tensorboard/        the same curves for TensorBoard

Every file is written beside its place and moved there, so a kill at any moment leaves the previous one whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from models.artifact import CARD, WEIGHTS, Artifact
from models.catalogue import FILTERS, FilterModel, LatentModel, build, build_filter
from training.config import RunConfig
from training.sequence_config import SequenceRunConfig

Loaded = tuple[LatentModel, RunConfig, dict[str, Any]] | tuple[FilterModel, SequenceRunConfig, dict[str, Any]]

LAST = "last.pt"


class CheckpointError(Exception):
    """The folder holds no checkpoint, or one of another run."""


def save_last(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes the resumable state."""
    partial = folder / (LAST + ".partial")
    torch.save(dict(state), partial)
    os.replace(partial, folder / LAST)


def load_last(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The resumable state, or None if the run has not saved one yet. Loaded without unpickling code."""
    file = folder / LAST
    return torch.load(file, map_location=device, weights_only=True) if file.exists() else None


def save_weights(folder: Path, model: LatentModel | FilterModel, run: RunConfig | SequenceRunConfig, facts: Mapping[str, Any]) -> None:
    """Writes weights and what is needed to rebuild the model around them. `facts`: epoch, validation ELBO and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / WEIGHTS
    partial = weights.with_suffix(".partial")
    save_file({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, partial)
    os.replace(partial, weights)
    description = folder / "checkpoint.json"
    partial = description.with_suffix(".partial")
    partial.write_text(json.dumps({"run": run.to_dict(), **facts}, indent=1) + "\n")
    os.replace(partial, description)


def load_weights(folder: Path) -> Loaded:
    """Rebuilds a model from its architecture and loads its weights strictly. The kind of the run says which kind of model it is.

    Args:
        folder: one that `save_weights` wrote; or a run's folder (then its `best`, else its `final`); or an exported artifact.

    Raises:
        CheckpointError: there is none. ArtifactError: the artifact is not whole.
    """
    if (folder / CARD).exists():
        provenance = Artifact.open(folder).card.provenance
        return _rebuild(folder, provenance["run"], {"epoch": provenance.get("epoch")})
    for candidate in (folder, folder / "best", folder / "final"):
        if (candidate / "checkpoint.json").exists() and (candidate / WEIGHTS).exists():
            facts = json.loads((candidate / "checkpoint.json").read_text())
            return _rebuild(candidate, facts.pop("run"), facts)
    raise CheckpointError(f"{folder}: no checkpoint here (checkpoint.json, {WEIGHTS}): train one with `elbow-train train`")


def load_static(folder: Path) -> tuple[LatentModel, RunConfig, dict[str, Any]]:
    """`load_weights` where only a static model will do.

    Raises:
        CheckpointError: it is a sequence model.
    """
    model, run, facts = load_weights(folder)
    if not isinstance(model, LatentModel) or not isinstance(run, RunConfig):
        raise CheckpointError(f"{folder}: holds a sequence model ({run.name}); a static one is needed here")
    return model, run, facts


def load_filter(folder: Path) -> tuple[FilterModel, SequenceRunConfig, dict[str, Any]]:
    """`load_weights` where only a sequence model will do.

    Raises:
        CheckpointError: it is a static model.
    """
    model, run, facts = load_weights(folder)
    if not isinstance(model, FilterModel) or not isinstance(run, SequenceRunConfig):
        raise CheckpointError(f"{folder}: holds a static model ({run.name}); a sequence model is needed here")
    return model, run, facts


def _rebuild(folder: Path, run: Mapping[str, Any], facts: dict[str, Any]) -> Loaded:
    weights = load_file(folder / WEIGHTS)
    if run["architecture"]["generative"]["kind"] in FILTERS:
        sequence_run = SequenceRunConfig.from_dict(run)
        filters = build_filter(sequence_run.architecture)
        # beside its weights an exported filter keeps its first state
        filters.load_state_dict({name: value for name, value in weights.items() if not name.startswith("begin.")}, strict=True)
        return filters.eval().requires_grad_(False), sequence_run, facts
    static_run = RunConfig.from_dict(run)
    model = build(static_run.architecture)
    model.load_state_dict(weights, strict=True)
    return model.eval().requires_grad_(False), static_run, facts
