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

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from models.artifact import CARD, WEIGHTS, Artifact
from models.catalogue import FILTERS, FilterModel, LatentModel, build, build_filter
from training.config import RunConfig
from training.data.errors import reason
from training.data.images import Images
from training.data.same import refuse_other_data
from training.data.sequences import Sequences
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

    Returns:
        The model, its run, and the facts that were saved with it; `weights_sha256` besides.

    Raises:
        CheckpointError: there is none, or it is damaged or of another version. ArtifactError: the artifact is not whole.
    """
    if (folder / CARD).exists():
        provenance = Artifact.open(folder).card.provenance
        data_sha256 = provenance.get("data", {}).get("sha256")
        return _rebuild(folder, {"run": provenance.get("run"), "epoch": provenance.get("epoch"), "data_sha256": data_sha256})
    for candidate in (folder, folder / "best", folder / "final"):
        if (candidate / "checkpoint.json").exists() and (candidate / WEIGHTS).exists():
            try:
                facts = dict(json.loads((candidate / "checkpoint.json").read_text()))
            except (ValueError, TypeError) as exc:
                raise CheckpointError(f"{candidate / 'checkpoint.json'}: damaged: {reason(exc)}") from exc
            return _rebuild(candidate, facts)
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


@overload
def data_of(run: RunConfig, facts: Mapping[str, Any], root: str | None = None) -> Images: ...
@overload
def data_of(run: SequenceRunConfig, facts: Mapping[str, Any], root: str | None = None) -> Sequences: ...
def data_of(run: RunConfig | SequenceRunConfig, facts: Mapping[str, Any], root: str | None = None) -> Images | Sequences:
    """The data of a checkpoint's run, if they are those that it was trained on; `facts` as `load_weights` gives them.

    Raises:
        DataError: they are others, or cannot be read.
    """
    data = run.data.load(root)
    refuse_other_data(run.name, run.data.name, facts.get("data_sha256"), data.sha256)
    return data


def _rebuild(folder: Path, facts: dict[str, Any]) -> Loaded:
    # read once, so that the sha256 is that of these weights even where a run goes on meanwhile
    content = (folder / WEIGHTS).read_bytes()
    facts["weights_sha256"] = hashlib.sha256(content).hexdigest()
    try:
        return _around(load(content), facts.pop("run"), facts)
    except SafetensorError as exc:
        raise CheckpointError(f"{folder / WEIGHTS}: damaged: {reason(exc)}") from exc
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise CheckpointError(f"{folder}: the run of this checkpoint is of another version of Elbow, or damaged: {reason(exc)}") from exc
    except RuntimeError as exc:
        first = " ".join(str(exc).split())[:200]
        raise CheckpointError(f"{folder}: the weights are not those of the run beside them: {first}") from exc


def _around(weights: Mapping[str, Tensor], run: Mapping[str, Any], facts: dict[str, Any]) -> Loaded:
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
