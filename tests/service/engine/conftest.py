"""Two tiny untrained models, exported as the real exporter does: what an engine reads, in a second."""

import warnings
from pathlib import Path

import pytest

from models.artifact import Artifact, Card, Curve, LevelSpec, LikelihoodSpec, Quantiles, XSpec, write_card, write_reference
from tests.made_once import made_once

X_SIZE, LATENT = 20, 4


def export_tiny(folder, kind):
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from models.architecture import Architecture, DirectArchitecture, IterativeArchitecture, VAEArchitecture
    from models.catalogue import build
    from models.programs import level_names, static_programs
    from training.export_files import program_spec, write_programs
    from training.export_static import reference as _reference

    inference = DirectArchitecture(hidden=(16,)) if kind == "direct" else IterativeArchitecture(hidden=(16,), recurrent=True)
    model = build(Architecture(VAEArchitecture(x_size=X_SIZE, latent=LATENT, hidden=(16, 16)), inference), seed=0)
    served = static_programs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_programs(folder, model, served.programs)
    x = torch.bernoulli(torch.full((4, X_SIZE), 0.4), generator=torch.Generator().manual_seed(0))
    write_reference(folder, _reference(model, x))
    card = Card(
        name=kind,
        version="1",
        family="static",
        x=XSpec(shape=(X_SIZE,), minimum=0, maximum=1),
        likelihood=LikelihoodSpec(name="bernoulli", parameters=model.generative.likelihood.HEADS),
        levels=(LevelSpec(name="q0", size=LATENT, parameters=level_names(0)),),
        carry=served.carry,
        context=served.context,
        trained_steps=3,
        max_steps=128,
        samples=2,
        antithetic=True,
        programs={name: program_spec(name, program) for name, program in served.programs.items()},
        curve=Curve(steps=(0,), elbo=(0.0,), elbo_std=(0.0,), rows=1, samples=1),
        quantiles=Quantiles(probabilities=(0.5,), steps=(0,), elbo=((0.0,),)),
    )
    write_card(folder, card)
    return folder


def exported_once(factory: pytest.TempPathFactory, kind: str) -> Path:
    """A repository with the model `kind`/1, the same for all workers."""

    def make(repository: Path) -> None:
        (repository / kind / "1").mkdir(parents=True)
        export_tiny(repository / kind / "1", kind)

    return made_once(factory, f"tiny-{kind}", make)


@pytest.fixture(scope="session", params=["iterative", "direct"])
def artifact(request, tmp_path_factory):
    return Artifact.open(exported_once(tmp_path_factory, request.param) / request.param / "1")
