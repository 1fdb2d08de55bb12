"""checkpoint -> artifact: programs as TorchScript and ONNX, reference outputs, measured curve, quantiles, provenance.

What ships is checked here the way an engine will check it: both formats are loaded again and compared with the float64
eager model on real rows, and an artifact that disagrees is not written.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.architecture import FilterArchitecture, SRNNArchitecture, VRNNArchitecture
from models.artifact import Card, Signer, write_card, write_reference
from models.catalogue import FilterModel, LatentModel, build_filter
from training.checkpoint import load_weights
from training.commit import git
from training.config import RunConfig
from training.export_files import Description, ExportError, check_parity, check_version, new_version, program_spec, write_programs
from training.export_filter import describe_filter
from training.export_static import describe_static
from training.precision import offer_int8
from training.run_loop import machine
from training.sequence_config import SequenceRunConfig


def export(
    checkpoint: Path,
    repository: Path,
    name: str,
    version: str,
    *,
    rows: int = 5000,
    samples: int = 20,
    likelihood: str | None = None,
    int8: bool = False,
    data_root: str | None = None,
    signer: Signer | None = None,
    quiet: bool = False,
) -> Path:
    """Writes <repository>/<name>/<version>/ and returns it.

    Args:
        rows, samples: of the validation curve and of the training quantiles; of a sequence model rows are frames.
        likelihood: serve a sequence model with this one: "quantised_gaussian" takes the weights of a "gaussian" as they are.
        int8: offer int8 beside float32 (training/precision.py).

    Raises:
        ExportError: a program's TorchScript or ONNX form disagrees with the float64 model, the likelihood does not fit, int8 costs
            too much, or name or version is none.
        DataError: the data are not those that the checkpoint was trained on.
        FileExistsError: that version is there already: versions never change.
    """
    check_version(repository, name, version)
    model, run, facts = load_weights(checkpoint)
    if likelihood is not None:
        model, run = _with_likelihood(model, run, likelihood)
    if int8 and not isinstance(model, LatentModel):
        raise ExportError("--int8: a filter's frame measures in the program in which it chooses: only static models have int8")
    described = _describe(model, run, facts, rows, samples, data_root, quiet)
    with new_version(repository, name, version) as (partial, target):
        write_programs(partial, model, described.programs, described.constants)
        write_reference(partial, described.reference)
        check_parity(partial, described.programs, described.reference)
        refines = model.inference.refines
        card = Card(
            name=name,
            version=version,
            encoding=model.inference.encodings,
            trained_steps=run.refinement.steps if refines else 0,
            samples=run.refinement.samples,
            antithetic=run.refinement.antithetic,
            programs={name: program_spec(name, program) for name, program in described.programs.items()},
            metrics=_metrics(checkpoint, facts),
            provenance=_provenance(run, facts, described),
            **described.card,
        )
        if int8:
            assert isinstance(model, LatentModel)
            assert isinstance(run, RunConfig)
            card = offer_int8(partial, card, model, run, rows=rows, samples=samples, data_root=data_root, facts=facts)
        write_card(partial, card, signer)
    return target


def _describe(
    model: LatentModel | FilterModel,
    run: RunConfig | SequenceRunConfig,
    facts: Mapping[str, Any],
    rows: int,
    samples: int,
    data_root: str | None,
    quiet: bool,
) -> Description:
    if isinstance(model, FilterModel):
        assert isinstance(run, SequenceRunConfig)
        return describe_filter(model, run, rows, data_root, facts)
    assert isinstance(run, RunConfig)
    return describe_static(model, run, rows, samples, data_root, quiet, facts)


def _with_likelihood(
    model: LatentModel | FilterModel, run: RunConfig | SequenceRunConfig, likelihood: str
) -> tuple[FilterModel, SequenceRunConfig]:
    """The same weights under another likelihood of the same heads.

    Raises:
        ExportError: there is no such pair.
    """
    generative = run.architecture.generative
    if not isinstance(generative, VRNNArchitecture | SRNNArchitecture) or not isinstance(run, SequenceRunConfig):
        raise ExportError("--likelihood: only sequence models can change theirs")
    if not {generative.likelihood, likelihood} <= {"gaussian", "quantised_gaussian"}:
        raise ExportError(f"--likelihood: a model trained with {generative.likelihood} cannot serve {likelihood}")
    architecture = FilterArchitecture(replace(generative, likelihood=likelihood), run.architecture.inference)
    changed = build_filter(architecture)
    changed.load_state_dict(model.state_dict(), strict=True)
    return changed.eval().requires_grad_(False), replace(run, architecture=architecture)


def _metrics(checkpoint: Path, facts: Mapping[str, Any]) -> dict[str, float]:
    """Figures of evaluation.json, if they are of these weights; else says so on stderr."""
    file = checkpoint / "evaluation.json"
    if not file.exists():
        return {}
    try:
        known = json.loads(file.read_text())
        figures = {key: float(known[key]) for key in ("log_px", "optimum", "seed_spread") if known.get(key) is not None}
        measured = dict(known.get("facts", {}))
    except (ValueError, TypeError, AttributeError):
        print(f"{file}: not an evaluation: left out of the card", file=sys.stderr)
        return {}
    if figures and measured.get("weights_sha256") != facts["weights_sha256"]:
        of = f"epoch {measured['epoch']}" if "epoch" in measured else "it does not say which"
        print(f"{file}: not of the weights exported ({of}): its figures are left out of the card; evaluate them again", file=sys.stderr)
        return {}
    return {key: value for key, value in figures.items() if math.isfinite(value)}


def _provenance(run: RunConfig | SequenceRunConfig, facts: Mapping[str, Any], described: Description) -> dict[str, Any]:
    name, sha256 = described.data
    return {
        "commit": git("rev-parse", "HEAD") or "unknown",
        "seed": run.seed,
        "run": run.to_dict(),
        "epoch": facts.get("epoch"),
        "data": {"name": name, "sha256": facts.get("data_sha256") or sha256},
        "libraries": machine(),
    }
