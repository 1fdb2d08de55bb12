"""An artifact's TorchScript, made again by the torch that is installed here.

TorchScript written by a newer torch need not load in an older one (a GPU machine's, say). The card holds the run and
weights.safetensors the weights, so the programs can be traced anew without data and without training; curve, quantiles and
reference stay what they were, and every program is held to the reference again.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from models.artifact import WEIGHTS, Artifact, Signer, parity_error, write_card
from models.catalogue import FilterModel
from models.filter_programs import filter_programs
from models.programs import static_programs
from training.checkpoint import load_weights
from training.export_files import PARITY, ExportError, copy_files, new_version, run_torchscript
from training.tracing import to_torchscript, trace


def retrace(folder: Path, repository: Path, signer: Signer | None = None) -> Path:
    """Writes <repository>/<name>/<version>/ with the TorchScript of the artifact in `folder` made anew, and returns it.

    Raises:
        ExportError: a program does not agree with the reference. FileExistsError: that version is there already.
    """
    artifact = Artifact.open(folder)
    model, run, _ = load_weights(folder)
    served = filter_programs(model, run.refinement.steps) if isinstance(model, FilterModel) else static_programs(model)
    with new_version(repository, artifact.card.name, artifact.card.version) as (partial, target):
        copy_files(artifact, partial)
        reference, weights = artifact.reference(), load_file(folder / WEIGHTS)
        for name, program in served.programs.items():
            file = partial / artifact.card.programs[name].files["torchscript"]
            file.write_bytes(to_torchscript(*trace(model, program)))
            inputs, outputs = reference[name]
            made = run_torchscript(file, weights, [inputs[spec.name] for spec in program.inputs])
            for spec, value in zip(program.outputs, made, strict=True):
                error = parity_error(value, outputs[spec.name])
                if not error <= PARITY:
                    raise ExportError(f"{name}: output {spec.name} differs from the reference by {error:.1e} (limit {PARITY})")
        write_card(partial, artifact.card.model_copy(update={"files": {}}), signer)
    return target
