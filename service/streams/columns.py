"""What filtered frames hold, as named arrays with one row per frame; beside service/columns.py, which has those of static calls.

A value is made from the JSON results of the frames (service/streams/results.py), so both say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Card
from service.columns import TEXT, Column, level_arrays
from service.repository import ServedModel

Results = Sequence[Mapping[str, Any]]


def frame_columns(card: Card) -> tuple[Column, ...]:
    """The columns of frames, those a client gets without naming any in front."""
    levels = [(number, shown) for number, level in enumerate(card.levels) for shown in level.parameters]
    return (
        Column("elbo", (), _nats("elbo"), part="elbo"),
        Column("surprise", (), _nats("surprise"), part="surprise"),
        Column("surprise_quantile", (), _nats("surprise_quantile"), part="surprise"),
        Column("log_likelihood", (), _nats("log_likelihood"), part="log_likelihood"),
        Column("kl", (), _nats("kl"), part="kl"),
        Column("frame", (), lambda _, results: np.array([result["frame"] for result in results], np.int64), "int64"),
        Column("steps_used", (), lambda _, results: np.array([result["steps_used"] for result in results], np.int64), "int64"),
        Column("stop_reason", (), lambda _, results: np.array([result.get("stop_reason", "steps") for result in results]), TEXT),
        *(
            Column(name, (size,), _posterior(number, shown), part="posterior", on_request=True)
            for (name, (_, size)), (number, shown) in zip(level_arrays(card).items(), levels, strict=True)
        ),
        *_decoded(card, "reconstruction", "advance"),
        *_decoded(card, "prediction", "predict"),
    )


def _decoded(card: Card, part: Any, program: str) -> tuple[Column, ...]:
    """The mean of p(x|z), and its standard deviation where the model has one."""
    names = {spec.name for spec in card.programs[program].outputs} if program in card.programs else set()
    mean = Column(part, card.x.shape, _shown(part, "mean"), part=part, on_request=True)
    if "log_sigma" not in names:
        return (mean,)
    return mean, Column(f"{part}_std", card.x.shape, _shown(part, "std"), part=part, on_request=True)


def _nats(name: str) -> Callable[[ServedModel, Results], NDArray[Any]]:
    """NaN where a frame has no finite value."""
    return lambda _, results: np.array([np.nan if result[name] is None else result[name] for result in results], np.float32)


def _posterior(level: int, shown: str) -> Callable[[ServedModel, Results], NDArray[Any]]:
    return lambda _, results: np.array([result["posterior"]["levels"][level][shown] for result in results], np.float32)


def _shown(part: str, name: str) -> Callable[[ServedModel, Results], NDArray[Any]]:
    def value(model: ServedModel, results: Results) -> NDArray[Any]:
        return np.array([result[part][name] for result in results], np.float32).reshape(len(results), *model.card.x.shape)

    return value
