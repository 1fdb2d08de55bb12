"""Steps and seconds to the ELBO that the best conventional optimiser has after 300 steps.

    python benchmarks/optimisers.py [--artifact checkpoints/mnist-iterative/1] [--data FOLDER] [--threads 1]

The package must be installed with its `train` extra (`make bench` does); the data set is found as by `elbow-train`
(ELBOW_DATA, or --data).

1. SGD, momentum, RMSProp and Adam ascend the ELBO of the trained decoder from the prior, each at the learning rate of
   RATES that ends highest on 100 validation rows of its own. Level: the highest mean over 500 other rows after 300 steps.
2. For the learned refiner, the best optimiser and Adam: the step from which the mean over the 500 rows is at or above the
   level for 3 steps in a row (the optimiser whose level it is: 300 at the latest). Means are measured with 100 fresh
   samples a row that no method refines by, and are not timed. Rows are independent, so these steps hold at any batch.
3. Wall-clock from x to there, at batch 1 and 64, in turn, medians: the learned refiner's programs through the service's
   ONNX engine; the best optimiser exported the same way, through the same engine; and Adam in eager PyTorch
   (`torch.optim.Adam`, fused, or its few lines by hand, whichever is faster; gradient by `torch.autograd.grad`).

Every method gets fresh noise at every step, with the S and the antithetic pairs of the card. Noise is drawn beforehand:
its time counts for nobody.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _model import PlainEager, eager_model
from _report import artifact_name, keep, table
from safetensors.torch import save_file
from torch import Tensor

from models.architecture import OptimiserArchitecture
from models.artifact import WEIGHTS, Arrays, Artifact, ProgramSpec, write_card, write_reference
from models.catalogue import LatentModel, infer_with
from models.gaussian import LOG_SIGMA_LIMIT, Posterior
from models.programs import Program, static_programs
from models.refinement import steps
from service.engine.onnx import OnnxEngine
from training.data.binarise import observe
from training.data.catalogue import load
from training.evaluate import measured
from training.step import fresh_noise
from training.tracing import safetensors_offsets, to_onnx, trace

ARTIFACT = Path(__file__).parents[1] / "checkpoints" / "mnist-iterative" / "1"
KINDS = ("sgd", "momentum", "rmsprop", "adam")
RATES = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
STEPS, STAYS, SAMPLES = 300, 3, 100
MEASURED_ROWS, TUNING_ROWS = 500, 100
BATCHES = (1, 64)
ROUNDS = {1: 15, 64: 3}


class Race:
    """Refines rows and measures them, all methods with noise of the same size and pairing."""

    def __init__(self, model: LatentModel, samples: int, antithetic: bool):
        self.generative, self.samples, self.antithetic = model.generative, samples, antithetic

    def noise(self, rows: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return fresh_noise(self.generative.latent_sizes, rows, self.samples, self.antithetic, torch.device("cpu"), generator)

    def path(self, inference: Any, x: Tensor, count: int) -> list[Posterior]:
        """λ after 0 … count steps."""
        generator = torch.Generator().manual_seed(1)
        states = steps(self.generative, inference, x, torch.ones_like(x), count, lambda k: self.noise(len(x), generator))
        return [state.q for state in states]

    def mean(self, q: Posterior, x: Tensor, seed: int) -> float:
        """Mean ELBO over rows by fresh samples, nats."""
        return float(measured(self.generative, q, x, SAMPLES, torch.Generator().manual_seed(1_000_000 + seed)).mean())

    def tuned(self, kind: str, x: Tensor) -> OptimiserArchitecture:
        """The rate that ends highest on rows x."""
        candidates = [OptimiserArchitecture(kind=kind, learning_rate=rate) for rate in RATES]  # type: ignore[arg-type]
        ends = [self.mean(self.path(infer_with(self.generative, c), x, STEPS)[-1], x, 0) for c in candidates]
        best = int(np.argmax(np.nan_to_num(ends, nan=-np.inf)))
        print(f"  {kind}: rate {RATES[best]} ends at {ends[best]:.2f} on the tuning rows", flush=True)
        return candidates[best]

    def steps_to(self, level: float, path: list[Posterior], x: Tensor) -> tuple[int | None, dict[int, float]]:
        """The first step from which the mean is at or above `level` for STAYS steps in a row, and every mean it took.

        Any STAYS steps in a row hold one multiple of STAYS, so the others are measured only around one that is high enough.
        """
        means: dict[int, float] = {}

        def high(k: int) -> bool:
            if k not in means:
                means[k] = self.mean(path[k], x, k)
            return means[k] >= level

        for k in range(0, len(path), STAYS):
            if high(k):
                for first in range(max(0, k - STAYS + 1), min(k, len(path) - STAYS) + 1):
                    if all(high(step) for step in range(first, first + STAYS)):
                        return first, means
        return None, means


def export_optimiser(artifact: Artifact, model: LatentModel, folder: Path) -> Artifact:
    """An artifact of `model`'s init and step as ONNX, with the card of `artifact`, for the very same engine."""
    served = static_programs(model)
    programs = {name: served.programs[name] for name in ("init", "step")}
    save_file({name: value.detach().contiguous() for name, value in model.named_parameters()}, folder / WEIGHTS)
    offsets = safetensors_offsets(folder / WEIGHTS)
    reference: dict[str, tuple[Arrays, Arrays]] = {}
    known: dict[str, Tensor] = {"x": torch.ones(2, *artifact.card.x.shape), "mask": torch.ones(2, *artifact.card.x.shape)}
    known |= {spec.name: torch.ones(2, 2, int(spec.shape[-1])) for spec in programs["step"].inputs if spec.name.startswith("noise")}
    for name, program in programs.items():
        graph, used = trace(model, program)
        (folder / f"{name}.onnx").write_bytes(to_onnx(graph, used, model, program, offsets))
        reference[name] = _reference(program, known)
    write_reference(folder, reference)
    specs = {name: ProgramSpec(inputs=p.inputs, outputs=p.outputs, files={"onnx": f"{name}.onnx"}) for name, p in programs.items()}
    changed = {"programs": specs, "carry": served.carry, "context": served.context, "precisions": {}, "files": {}}
    write_card(folder, artifact.card.model_copy(update=changed))
    return Artifact.open(folder)


def _reference(program: Program, known: dict[str, Tensor]) -> tuple[Arrays, Arrays]:
    inputs = {spec.name: known[spec.name] for spec in program.inputs}
    with torch.no_grad():
        outputs = dict(zip((spec.name for spec in program.outputs), program.function(*inputs.values()), strict=True))
    known.update(outputs)
    return {n: v.numpy() for n, v in inputs.items()}, {n: v.double().numpy() for n, v in outputs.items()}


def through_engine(engine: OnnxEngine, x: Tensor, count: int, noise: list[tuple[Tensor, ...]]) -> Callable[[], object]:
    """`init` and `count` steps through the service's engine, numpy in and out."""
    given = {"x": x.numpy(), "mask": np.ones_like(x.numpy())}
    drawn = [{f"noise{level}": part.numpy() for level, part in enumerate(parts)} for parts in noise]

    def run() -> Arrays:
        arrays = {**given, **engine.run("init", given)}
        for k in range(count):
            arrays.update(drawn[k])
            arrays.update(engine.run("step", arrays))
        return arrays

    return run


def eager_adams(plain: PlainEager, x: Tensor, count: int, rate: float, noise: list[tuple[Tensor, ...]]) -> dict[str, Callable[[], object]]:
    """`count` steps of Adam on λ in eager PyTorch, from the prior: two ways to write it."""
    mask, size = torch.ones_like(x), noise[0][0].shape[-1]

    def library() -> object:
        q = torch.zeros(2, len(x), size)
        adam = torch.optim.Adam([q], lr=rate, maximize=True, fused=True)
        for k in range(count):
            q.grad = torch.stack(plain.gradient(q[0], q[1], x, mask, noise[k][0]))
            adam.step()
        return q

    def by_hand() -> object:
        q, first, second = (torch.zeros(2, len(x), size) for _ in range(3))
        for k in range(count):
            grad = torch.stack(plain.gradient(q[0], q[1], x, mask, noise[k][0]))
            first.lerp_(grad, 1 - 0.9)
            second.mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
            step = k + 1
            q.addcdiv_(first, (second / (1 - 0.999**step)).sqrt_().add_(1e-8), value=rate / (1 - 0.9**step))
            q[1].clamp_(-LOG_SIGMA_LIMIT, LOG_SIGMA_LIMIT)
        return q

    return {"torch.optim.Adam": library, "by hand": by_hand}


def medians_in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each run, all in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if round_:  # the first warms up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(kept) for name, kept in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=ARTIFACT)
    parser.add_argument("--data", help="folder of data sets (default: as elbow-train finds them)")
    parser.add_argument("--threads", type=int, default=1, help="for everything that is timed")
    args = parser.parse_args()
    artifact = Artifact.open(args.artifact)
    card, model = artifact.card, eager_model(artifact)
    images = load(card.provenance["run"]["data"]["name"], args.data)
    pixels = torch.as_tensor(images.valid[: MEASURED_ROWS + TUNING_ROWS])
    x = observe(pixels, images.kind, card.likelihood.name, torch.Generator().manual_seed(1))
    x, tuning = x[:MEASURED_ROWS], x[MEASURED_ROWS:]
    race = Race(model, card.samples, card.antithetic)

    print(f"rates of {len(RATES)} for {', '.join(KINDS)}, {STEPS} steps each", flush=True)
    tuned = {kind: race.tuned(kind, tuning) for kind in KINDS}
    inferences = {kind: infer_with(model.generative, architecture) for kind, architecture in tuned.items()}
    paths = {kind: race.path(inference, x, STEPS + STAYS - 1) for kind, inference in inferences.items()}
    ends = {kind: race.mean(path[STEPS], x, STEPS) for kind, path in paths.items()}
    best = max(ends, key=lambda kind: ends[kind])
    level = ends[best]
    print(
        f"level: {level:.2f} nats, {best} after {STEPS} steps; " + ", ".join(f"{kind} {end:.2f}" for kind, end in ends.items()), flush=True
    )

    found = {"level": level, "best": best, "ends": ends, "rates": {kind: a.learning_rate for kind, a in tuned.items()}}
    learned, curve = race.steps_to(level, race.path(model.inference, x, card.max_steps), x)
    found |= {"artifact": artifact_name(args.artifact), "learned_curve": curve}
    if learned is None:
        kept = keep("optimisers", {**found, "steps": {"learned": None}})
        raise SystemExit(f"the learned refiner is not at {level:.3f} nats for {STAYS} of {card.max_steps} steps: {curve}; kept in {kept}")
    counts = {kind: race.steps_to(level, paths[kind], x)[0] or STEPS for kind in {best, "adam"}}
    counts = {kind: min(count, STEPS) for kind, count in counts.items()}

    torch.set_num_threads(args.threads)
    rows, results = [], {}
    with tempfile.TemporaryDirectory() as folder:
        rival = export_optimiser(artifact, LatentModel(model.generative, inferences[best]), Path(folder))
        engines = {"learned": OnnxEngine(artifact, args.threads), best: OnnxEngine(rival, args.threads)}
        for batch in BATCHES:
            generator = torch.Generator().manual_seed(5)
            noise = [race.noise(batch, generator) for _ in range(STEPS)]
            runs = {
                "learned, engine": through_engine(engines["learned"], x[:batch], learned, noise),
                f"{best}, engine": through_engine(engines[best], x[:batch], counts[best], noise),
            }
            runs |= {
                f"adam, eager, {way}": run
                for way, run in eager_adams(PlainEager(model), x[:batch], counts["adam"], tuned["adam"].learning_rate, noise).items()
            }
            seconds = medians_in_turn(runs, ROUNDS[batch])
            eager = min((name for name in seconds if "eager" in name), key=lambda name: seconds[name])
            for name, steps_done in (("learned, engine", learned), (f"{best}, engine", counts[best]), (eager, counts["adam"])):
                ratio = seconds[name] / seconds["learned, engine"]
                rows.append((batch, name, steps_done, 1e3 * seconds[name], steps_done / learned, ratio))
            results[batch] = {name: 1e3 * value for name, value in seconds.items()}

    print(f"to {level:.2f} nats, mean over {MEASURED_ROWS} rows of {args.artifact}; {args.threads} thread(s); noise not timed")
    print(table(("batch", "method", "steps", "ms", "× steps", "× time"), rows))
    found |= {"steps": {"learned": learned, **counts}, "threads": args.threads, "ms": results}
    print(f"kept in {keep('optimisers', found)}")


if __name__ == "__main__":
    main()
