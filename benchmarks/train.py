"""Updates per second of training, against the same update in plain eager PyTorch.

    python benchmarks/train.py [--device cpu] [--cases mnist jsb-avf1 jsb-avf5 …] [--threads 1 2] [--seconds 10] [--rounds 3]

The package must be installed with its `train` extra (`make bench` does); no data set is needed: speed does not depend on the
values, so x is random and the models are new, their last layer drawn at random so that no gradient is zero.

`ours` is what `elbow-train` runs (training/update.py, training/sequence_update.py, compiled); `plain` is benchmarks/_plain_updates.py.
The same batch, noise (drawn beforehand: its time counts for nobody), precision and fused AdamW on both sides. Gradients of
both are compared first, and nothing is timed if they differ. Then each side at each number of threads, each in a fresh process,
in turn; the median of `--rounds` such sets of processes; a side counts with its best number of threads. In float32 the gradients
must agree to 1e-3 of a parameter's own norm. bfloat16 is autocast, and both sides are held to the float32 gradient: ours may be off
by as much as plain, and half of that again.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from _contenders import time_in_processes
from _plain_updates import plain_sequence_update, plain_static_update
from _report import keep, table
from torch import Tensor, nn

from models.architecture import IterativeArchitecture, SRNNArchitecture
from models.catalogue import FilterModel, LatentModel, build, build_filter
from training.runs import RUNS
from training.sequence_config import SequenceRunConfig
from training.sequence_step import Chunk
from training.sequence_update import SIGHTINGS, SequenceGradients
from training.step import fresh_noise
from training.update import Gradients

Update = Callable[[], object]
"""Puts the gradients of one update on a model's parameters."""

FLOAT32_LIMIT, BFLOAT16_SLACK = 1e-3, 1.5
CALLS_TO_COMPILE = SIGHTINGS
"""A chunk's shape is compiled when it comes for the second time."""


@dataclass(frozen=True)
class Case:
    """A run's update: `ours` and `plain` put its gradients on the model they are given."""

    model: LatentModel | FilterModel
    ours: Callable[[Any], Update]
    plain: Callable[[Any], Update]


CASES = {
    "mnist": ("mnist-iterative", None),
    "mnist-bf16": ("mnist-iterative", torch.bfloat16),
    "jsb-avf1": ("jsb-avf1", None),
    "jsb-avf5": ("jsb-avf5", None),
    "jsb-avf1-bf16": ("jsb-avf1", torch.bfloat16),
    "jsb-avf5-bf16": ("jsb-avf5", torch.bfloat16),
}
"""Row of the table -> name of the run, and the precision of its matrix products (None: float32)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case")
    parser.add_argument("--rounds", type=int, default=3, help="sets of fresh processes")
    parser.add_argument("--tiny", action="store_true", help="small models and batches, to see that everything runs")
    parser.add_argument("--keep", default="train", help="results/<KEEP>.json; nothing: not kept")
    args = parser.parse_args()
    device = torch.device(args.device)
    differ = {name: difference_of_sides(name, device, args.tiny) for name in args.cases}
    print("the gradients agree, now to the timing", flush=True)
    results = [measure(name, differ[name], args) for name in args.cases]
    columns = ["update", "plain/s", "threads", "ours/s", "threads", "ratio", "gradients differ"]
    keys = ["update", "plain_per_s", "plain_threads", "ours_per_s", "ours_threads", "ratio", "gradients_differ"]
    print(table(columns, [[row[key] for key in keys] for row in results]))
    if args.keep:
        print(f"\nkept in {keep(args.keep, {'device': args.device, 'tiny': args.tiny, 'updates': results})}")


def difference_of_sides(name: str, device: torch.device, tiny: bool) -> float:
    """How far the gradients of the two sides differ (`compare`)."""
    run, precision = CASES[name]
    return compare(case_of(run, precision, device, tiny), case_of(run, None, device, tiny) if precision is not None else None)


def measure(name: str, differ: float, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the table."""
    makes = {
        f"{side} {count}": (contender, (name, side, count, args.device, args.tiny)) for side in ("plain", "ours") for count in args.threads
    }
    us = time_in_processes(makes, args.seconds, args.rounds)
    best = {side: min(args.threads, key=lambda count: us[f"{side} {count}"]) for side in ("plain", "ours")}
    per_s = {side: 1e6 / us[f"{side} {count}"] for side, count in best.items()}
    return {
        "update": name,
        "plain_per_s": per_s["plain"],
        "plain_threads": best["plain"],
        "ours_per_s": per_s["ours"],
        "ours_threads": best["ours"],
        "ratio": per_s["ours"] / per_s["plain"],
        "gradients_differ": differ,
        "us": us,
    }


def contender(name: str, side: str, threads: int, device: str, tiny: bool) -> Update:
    """One side of a row, on so many threads for good, compiled."""
    torch.set_num_threads(threads)
    case = case_of(*CASES[name], torch.device(device), tiny)
    update = whole_update(case.model, {"plain": case.plain, "ours": case.ours}[side])
    for _ in range(CALLS_TO_COMPILE):
        update()
    return update


def whole_update(model: LatentModel | FilterModel, make: Callable[[Any], Update]) -> Update:
    """Gradients and both optimisers; done when it returns."""
    gradients = make(model)
    optimisers = [torch.optim.AdamW(part.parameters(), lr=1e-5, fused=True) for part in (model.generative, model.inference)]
    cuda = next(model.parameters()).is_cuda

    def update() -> None:
        gradients()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if cuda:
            torch.cuda.synchronize()

    return update


def compare(case: Case, exact: Case | None) -> float:
    """The largest difference of the two sides' gradients, in norms of the parameter's own.

    Args:
        exact: the same case in float32, if this one is not.

    Raises:
        SystemExit: it is too large, so the two are not the same update.
    """
    ours, plain = gradients_of(case.model, case.ours), gradients_of(case.model, case.plain)
    if exact is None:
        differ, limit = difference(ours, plain), FLOAT32_LIMIT
    else:
        truth = gradients_of(exact.model, exact.plain)
        differ, limit = difference(ours, truth), BFLOAT16_SLACK * difference(plain, truth)
    if not differ <= limit:
        raise SystemExit(f"gradients differ by {differ:.1e} of their norm (limit {limit:.1e}): not the same update, so nothing is timed")
    return differ


def gradients_of(model: LatentModel | FilterModel, make: Callable[[Any], Update]) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    update = make(model)
    for _ in range(CALLS_TO_COMPILE):
        model.zero_grad(set_to_none=True)
        update()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def difference(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    if some.keys() != others.keys():
        raise SystemExit(f"only one side has a gradient for {sorted(some.keys() ^ others.keys())}")
    norm = torch.linalg.vector_norm
    return max(float(norm(some[name] - other) / norm(other)) for name, other in others.items())


def case_of(name: str, precision: torch.dtype | None, device: torch.device, tiny: bool) -> Case:
    run = RUNS[name]()
    generator = torch.Generator(device).manual_seed(0)
    if isinstance(run, SequenceRunConfig):
        return _sequence_case(_tiny_sequence(run) if tiny else run, precision, device, generator)
    if tiny:
        architecture = run.architecture
        small = replace(architecture.generative, x_size=12, latent=3, hidden=(8,)), _tiny_refiner(architecture.inference)
        run = replace(run, batch_size=4, architecture=replace(architecture, generative=small[0], inference=small[1]))

    model = build(run.architecture, seed=0)
    _awaken(model)
    model.to(device)
    steps, samples, antithetic = run.refinement.steps, run.refinement.samples, run.refinement.antithetic
    x = _bits((run.batch_size, model.generative.x_size), 0.13, generator)
    mask = torch.ones_like(x)
    noise = [fresh_noise(model.generative.latent_sizes, len(x), samples, antithetic, device, generator) for _ in range(steps + 1)]

    def ours(model: LatentModel) -> Update:
        # cache_enabled as in training/loop.py
        gradients = Gradients(model, steps, lambda: _autocast(device, precision, cache=False), compiled=True)
        return lambda: gradients(x, mask, noise, 1.0)

    def plain(model: LatentModel) -> Update:
        def update() -> Tensor:
            with _autocast(device, precision, cache=True):
                return plain_static_update(model, x, [draw[0] for draw in noise])

        return update

    return Case(model, ours, plain)


def _sequence_case(run: SequenceRunConfig, precision: torch.dtype | None, device: torch.device, generator: torch.Generator) -> Case:
    model = build_filter(run.architecture, seed=0)
    _awaken(model)
    model.to(device)
    rows, frames, steps = run.batch_size, run.data.frames, run.refinement.steps
    x = _bits((rows, frames, model.generative.x_size), 0.05, generator)
    mask, weights = torch.ones_like(x), torch.ones(rows, frames, device=device)
    (latent,) = model.generative.latent_sizes
    noise = torch.randn(frames, steps + 1, rows, run.refinement.samples, latent, device=device, generator=generator)
    chunk = Chunk(x, mask, weights, noise)

    def ours(model: FilterModel) -> Update:
        gradients = SequenceGradients(model, precision)
        return lambda: gradients(chunk, 1.0)

    def plain(model: FilterModel) -> Update:
        def update() -> Tensor:
            with _autocast(device, precision, cache=True):
                return plain_sequence_update(model, x, weights, noise)

        return update

    return Case(model, ours, plain)


def _tiny_sequence(run: SequenceRunConfig) -> SequenceRunConfig:
    small = SRNNArchitecture(x_size=6, latent=3, hidden=5, prior_hidden=(7,), decoder_hidden=(7, 7))
    architecture = replace(run.architecture, generative=small, inference=_tiny_refiner(run.architecture.inference))
    return replace(run, batch_size=3, architecture=architecture, data=replace(run.data, frames=4))


def _tiny_refiner(architecture: Any) -> IterativeArchitecture:
    assert isinstance(architecture, IterativeArchitecture)
    return replace(architecture, hidden=(8, 8))


def _awaken(model: LatentModel | FilterModel) -> None:
    """A refiner's last layer starts at zero, and no gradient passes it."""
    heads = model.inference.heads
    assert isinstance(heads, nn.Linear)
    nn.init.normal_(heads.weight, std=0.05, generator=torch.Generator().manual_seed(1))


def _bits(shape: tuple[int, ...], share: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, device=generator.device, generator=generator) < share).float()


def _autocast(device: torch.device, precision: torch.dtype | None, cache: bool) -> AbstractContextManager[object]:
    return torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None, cache_enabled=cache)


if __name__ == "__main__":
    main()
