"""Whether products in bfloat16 are worth their rounding on this processor. Without its instructions torch makes them one by one: on an
EPYC with avx2 alone they took sixty times as long as float32's."""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from typing import TypeVar

import torch

from training.config import RunConfig
from training.sequence_config import SequenceRunConfig

Run = TypeVar("Run", bound=RunConfig | SequenceRunConfig)

SLOW = 4.0
"""From so many times float32's time on a run is better off in float32. On a Xeon and on an EPYC that has the instructions it was
0.7 to about 1."""


def times_float32(size: int = 256, rounds: int = 3) -> float:
    """The time of a product in bfloat16 on the CPU over that of one in float32, medians."""
    medians = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype)
        matrix @ matrix  # the first call chooses a kernel
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            matrix @ matrix
            seconds.append(time.perf_counter() - began)
        medians.append(statistics.median(seconds))
    return medians[1] / medians[0]


def suited(run: Run, device: str) -> Run:
    """The run, in float32 where it asks for bfloat16 of a CPU that is slow at it; stderr says so."""
    if run.precision != "bf16-mixed" or device != "cpu" or (times := times_float32()) < SLOW:
        return run
    print(
        f"{run.name}: bfloat16 takes {times:.0f} times as long as float32 on this processor: trained in float32 (--precision bf16-mixed "
        "insists)",
        file=sys.stderr,
    )
    return replace(run, precision="32-true")
