"""First calls: they are slow (code is compiled, memory allocated), so they happen before a model takes requests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from models.artifact import Arrays, ProgramSpec
from service.engine.base import Engine
from service.scheduler.cost import CostModel

CALLS = 3
_LARGEST = 64
_SLOT_FREE = ("decode", "prior_sample", "sample_x")
"""Programs that `Engine.run` calls on arrays of the caller; the others work on slots."""


def warm_up(engine: Engine, cost: CostModel, clock: Callable[[], float], capacity: int) -> None:
    """Runs every program `CALLS` times at batch sizes 1, 2, 4, … and notes the fastest run of each as its cost."""
    card = engine.card
    largest = min(_LARGEST, capacity)
    everything = np.arange(largest, dtype=np.intp)
    blank_x = np.zeros((largest, *card.x.shape), np.float32)
    engine.load_rows(everything, {"x": blank_x, "mask": np.ones_like(blank_x)})
    for program in sorted(card.programs, key=lambda name: name != "init"):  # the context of the others comes from `init`
        spec = card.programs[program]
        for size in (1 << bucket for bucket in range(largest.bit_length())):
            rows = everything[:size]
            arrays = _arrays(spec, size, 1 if program != "step" else card.samples)
            seconds = []
            for _ in range(CALLS):
                started = clock()
                if program in _SLOT_FREE:
                    engine.run(program, arrays)
                else:
                    engine.run_rows(program, rows, {name: value for name, value in arrays.items() if name.startswith("noise")})
                seconds.append(clock() - started)
            cost.seed(program, size, min(seconds))


def _arrays(spec: ProgramSpec, rows: int, samples: int) -> Arrays:
    """Zeros for every input of a program whose only axes without a size are rows and samples."""
    axes = {"rows": rows, "samples": samples}
    return {t.name: np.zeros([axes[size] if isinstance(size, str) else size for size in t.shape], t.dtype) for t in spec.inputs}
