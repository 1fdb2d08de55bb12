"""First calls: they are slow (code is compiled, memory allocated), so they happen before a model takes requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from models.artifact import Arrays, ProgramSpec
from service.engine.base import Engine
from service.noise import Purpose
from service.scheduler.cost import CostModel
from service.scheduler.noise_ahead import SLOT_FREE, Noise

CALLS = 3
_LARGEST = 64


def warm_up(engine: Engine, cost: CostModel, clock: Callable[[], float], capacity: int) -> None:
    """Runs every program `CALLS` times at batch sizes 1, 2, 4, … and notes the fastest run of each as its cost."""
    card = engine.card
    largest = min(max(_LARGEST, engine.warm_up_rows), capacity)
    noise = Noise(card, engine.draws_noise)
    everything = np.arange(largest, dtype=np.intp)
    blank_x = np.zeros((largest, *card.x.shape), np.float32)
    engine.load_rows(everything, {"x": blank_x, "mask": np.ones_like(blank_x)})
    for program in sorted(card.programs, key=lambda name: name != "init"):  # the context of the others comes from `init`
        spec = card.programs[program]
        for size in (1 << bucket for bucket in range(largest.bit_length())):
            rows = everything[:size]
            arrays = _arrays(spec, size, 1 if program != "step" else card.samples)
            given: dict[str, Any] = {name: value for name, value in arrays.items() if name.startswith("noise")}
            if engine.draws_noise and program not in SLOT_FREE:
                given = noise.draw(program, np.zeros(size, np.uint64), Purpose.REFINE, (0, 1 if program != "step" else card.samples))
                if program == "step" and card.antithetic:
                    given = {name: replace(keys, antithetic=True) for name, keys in given.items()}
            seconds = []
            for _ in range(CALLS):
                started = clock()
                if program in SLOT_FREE:
                    engine.run(program, arrays)
                else:
                    for output in engine.run_rows(program, rows, given).values():
                        np.asarray(output)  # waits for the device
                seconds.append(clock() - started)
            cost.seed(program, size, min(seconds))


def _arrays(spec: ProgramSpec, rows: int, samples: int) -> Arrays:
    """Zeros for every input of a program whose only axes without a size are rows and samples."""
    axes = {"rows": rows, "samples": samples}
    return {t.name: np.zeros([axes[size] if isinstance(size, str) else size for size in t.shape], t.dtype) for t in spec.inputs}
