"""A further precision beside an artifact's float32: the programs that choose λ in int8, measured in nats before they are offered.

`init` and `step` are changed, `score` and everything after it are not: an ELBO that is reported is that of the λ returned. Only
static models: a filter's frame measures, and hands on a state, in the same program in which it chooses.

Shapes: R rows, K steps, S samples, D latent size, X size of x.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from models.artifact import MAX_COST_NATS, Array, Arrays, Artifact, Card, PrecisionSpec, Signer, write_card, write_elbo_reference
from models.catalogue import LatentModel
from models.gaussian import Posterior
from models.objective import Noise, elbo
from models.programs import as_posterior
from models.refinement import begin, refine_once
from training.checkpoint import data_of, load_static
from training.config import RunConfig
from training.data.binarise import observe
from training.evaluate import BINARISE_SEED, MEASURE_SEED, REFINE_SEED, measured
from training.export_files import ExportError, copy_files, new_version
from training.quantise import NotQuantisable, in_float32, to_int8
from training.step import fresh_noise

CHOOSING = ("init", "step")
"""The programs that choose λ."""
REFERENCE_ROWS, REFERENCE_SAMPLES = 32, 8
ROWS_AT_ONCE = 250

Runner = Callable[[Arrays], Arrays]
"""Inputs by name -> outputs by name."""


def offer_int8(
    folder: Path,
    card: Card,
    model: LatentModel,
    run: RunConfig,
    *,
    rows: int = 5000,
    samples: int = 20,
    data_root: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Card:
    """Writes the int8 programs and what they are held to into `folder`, beside its ONNX programs, and gives the card that offers them.

    Args:
        rows: validation rows that the cost is measured on. samples: of the ELBO of each.

    Raises:
        ExportError: it costs more than MAX_COST_NATS, or there is nothing to change. DataError: the data are not those of `facts`.
    """
    files = _write_programs(folder, card)
    images = data_of(run, facts or {}, data_root)
    generator = torch.Generator().manual_seed(BINARISE_SEED)
    x = observe(torch.as_tensor(images.valid[:rows]), images.kind, run.architecture.generative.likelihood, generator)
    plain = {program: card.programs[program].files["onnx"] for program in CHOOSING if program in card.programs}
    float32, int8 = (nats(card, runners_of(folder, card, each, exact=True), model, x, samples) for each in (plain, plain | files))
    cost = (float32 - int8).double()
    if not float(cost.mean()) <= MAX_COST_NATS:
        raise ExportError(f"int8 costs {float(cost.mean()):.3f} nats on {len(x)} validation rows, more than {MAX_COST_NATS}: not offered")
    write_elbo_reference(folder, *_reference(model, card, x[:REFERENCE_ROWS]))
    spec = PrecisionSpec(
        cost_nats=float(cost.mean()),
        cost_std=float(cost.std(correction=min(1, len(cost) - 1))),
        rows=len(x),
        samples=samples,
        programs={program: {"onnx": file} for program, file in files.items()},
    )
    return card.model_copy(update={"precisions": {"int8": spec}})


def quantise(
    folder: Path, repository: Path, *, rows: int = 5000, samples: int = 20, data_root: str | None = None, signer: Signer | None = None
) -> Path:
    """Writes <repository>/<name>/<version>/, the artifact in `folder` with int8 offered beside float32, and returns it.

    Raises:
        ExportError: as `offer_int8`. CheckpointError: it is no static model. FileExistsError: that version is there already.
    """
    artifact = Artifact.open(folder)
    model, run, facts = load_static(folder)
    with new_version(repository, artifact.card.name, artifact.card.version) as (partial, target):
        copy_files(artifact, partial)
        card = artifact.card.model_copy(update={"files": {}})
        offered = offer_int8(partial, card, model, run, rows=rows, samples=samples, data_root=data_root, facts=facts)
        write_card(partial, offered, signer)
    return target


def nats(card: Card, runners: Mapping[str, Runner], model: LatentModel, x: Tensor, samples: int) -> Tensor:
    """Each row's ELBO, (R,), after the trained steps by these `init` and `step`; measured by `model`, in float32."""
    refine, measure = (torch.Generator().manual_seed(seed) for seed in (REFINE_SEED, MEASURE_SEED))
    parts = ((rows, refined(card, runners, rows, refine)) for rows in x.split(ROWS_AT_ONCE))
    return torch.cat([measured(model.generative, q, rows, samples, measure) for rows, q in parts])


def refined(card: Card, runners: Mapping[str, Runner], x: Tensor, generator: torch.Generator) -> Posterior:
    """λ of each row after the trained steps."""
    arrays = {"x": x.numpy(), "mask": np.ones_like(x.numpy())}
    arrays |= runners["init"](arrays)
    for noise in _refining(card, len(x), generator):
        arrays |= {f"noise{level}": part.numpy() for level, part in enumerate(noise)}
        arrays |= runners["step"](arrays)
    names = [level.parameters[part] for level in card.levels for part in ("mu", "log_sigma")]
    return as_posterior([torch.from_numpy(arrays[name]) for name in names])


def runners_of(folder: Path, card: Card, files: Mapping[str, str], exact: bool = False) -> dict[str, Runner]:
    """Programs in ONNX Runtime from their files in `folder`, with as many threads as torch has.

    exact: products of int8 as they are meant, also on a processor where they saturate.
    """
    return {program: _runner(folder / file, card, program, exact) for program, file in files.items()}


def _runner(file: Path, card: Card, program: str, exact: bool) -> Runner:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if exact:
        proto = onnx.load(str(file), load_external_data=False)
        in_float32(proto)
        options.log_severity_level = 3  # constants that only the int8 form needs
        file = file.with_suffix(".exact")  # beside the weights that it points to
        file.write_bytes(proto.SerializeToString())
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    if exact:
        file.unlink()
    spec, names = card.programs[program], [node.name for node in session.get_inputs()]

    def run(arrays: Arrays) -> Arrays:
        feeds = {name: arrays[given.name] for name, given in zip(names, spec.inputs, strict=True)}
        return dict(zip((output.name for output in spec.outputs), session.run(None, feeds), strict=True))

    return run


def _write_programs(folder: Path, card: Card) -> dict[str, str]:
    """The programs that have products to change, in int8; program -> file."""
    files = {}
    for program in CHOOSING:
        if program in card.programs:
            proto = onnx.load(str(folder / card.programs[program].files["onnx"]), load_external_data=False)
            try:
                products = to_int8(proto)
            except NotQuantisable as exc:
                raise ExportError(f"{program}: {exc}") from exc
            if products:
                files[program] = f"{program}.int8.onnx"
                (folder / files[program]).write_bytes(proto.SerializeToString())
    if not files:
        raise ExportError(f"{card.name}: neither init nor step multiplies by weights: there is nothing to change")
    return files


def _refining(card: Card, rows: int, generator: torch.Generator) -> Iterator[Noise]:
    sizes = tuple(level.size for level in card.levels)
    for _ in range(card.trained_steps):
        yield fresh_noise(sizes, rows, card.samples, card.antithetic, torch.device("cpu"), generator)


def _reference(model: LatentModel, card: Card, x: Tensor) -> tuple[Arrays, Array]:
    """What `Artifact.elbo_reference` gives: rows, their noise, and their ELBO in float64."""
    exact, generator, mask = copy.deepcopy(model).double(), torch.Generator().manual_seed(7), torch.ones_like(x).double()
    refining = list(_refining(card, len(x), generator))
    measuring = fresh_noise(tuple(level.size for level in card.levels), len(x), REFERENCE_SAMPLES, False, torch.device("cpu"), generator)
    with torch.no_grad():
        state, context = begin(exact.generative, exact.inference, x.double(), mask)
        for noise in refining:
            fresh = tuple(part.double() for part in noise)
            state, _ = refine_once(exact.generative, exact.inference, x.double(), mask, context, state, fresh)
        found = elbo(exact.generative, state.q, x.double(), mask, tuple(part.double() for part in measuring)).elbo
    arrays = {f"refine{level}": torch.stack(parts).numpy() for level, parts in enumerate(zip(*refining, strict=True))}
    arrays |= {f"measure{level}": part.numpy() for level, part in enumerate(measuring)}
    return {"x": x.numpy(), **arrays}, found.numpy()
