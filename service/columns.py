"""What a result holds, as named arrays: one table per call, for replies that are tensors and not JSON.

A column has one row per row of the request. ELBOs and their parts are in nats per row, float32.

Shapes: R rows, D latent size, L levels, S samples, X shape of x; −1 where the request decides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact import Card
from service.carry import pack
from service.errors import InvalidInput
from service.posterior import beyond_lambda
from service.replies import elbo_quantile
from service.repository import ServedModel
from service.scheduler.job import JobResult
from service.schemas import Part, StreamPart

TEXT = "text"
"""The dtype of a column of strings."""


@dataclass(frozen=True)
class Column:
    """One array of a reply.

    Attributes:
        shape: without the row axis. dtype: numpy's name, or TEXT.
        part: what of `return` computes it; None: it is there in any case.
        on_request: left out unless it is named.
        value: from what the call resulted in (here a JobResult; of frames, service/streams/columns.py), (R, *shape).
    """

    name: str
    shape: tuple[int, ...]
    value: Callable[[ServedModel, Any], NDArray[Any]]
    dtype: str = "float32"
    part: Part | StreamPart | None = None
    on_request: bool = False


def columns_of(call: str, card: Card) -> tuple[Column, ...]:
    """The columns of a static model's call, those a client gets without naming any in front."""
    return _COLUMNS[call](card)


def chosen(columns: Sequence[Column], names: Collection[str], path: str) -> list[Column]:
    """The named columns in that order, or without names those that are not `on_request`.

    Raises:
        InvalidInput: at `path`, a name that is none of them.
    """
    if not names:
        return [column for column in columns if not column.on_request]
    known = {column.name: column for column in columns}
    for index, name in enumerate(names):
        if name not in known:
            raise InvalidInput.at(f"{path}[{index}]", f'there is no "{name[:40]}" here: known are {", ".join(known)}')
    return [known[name] for name in names]


def parts_of(columns: Sequence[Column]) -> list[str]:
    """What `return` has to say for these columns."""
    return list(dict.fromkeys(column.part for column in columns if column.part is not None))


def level_arrays(card: Card) -> dict[str, tuple[str, int]]:
    """λ as clients name it -> (array of the carry, D): `mu`, or `z1.mu` where there are several levels."""
    several = len(card.levels) > 1
    return {
        (f"{level.name}.{shown}" if several else shown): (array, level.size)
        for level in card.levels
        for shown, array in level.parameters.items()
    }


def _encode(card: Card) -> tuple[Column, ...]:
    x = card.x.shape
    several = len(card.levels) > 1
    return (
        *(Column(name, (size,), _carried(array), part="posterior") for name, (array, size) in level_arrays(card).items()),
        Column("elbo", (), lambda _, result: _floats(result.elbo), part="elbo"),
        Column("log_likelihood", (), lambda _, result: _floats(result.log_likelihood), part="elbo"),
        Column("kl", (len(card.levels),), lambda _, result: _floats(result.kl), part="elbo"),
        *_progress(),
        Column("step", (), lambda _, result: result.step, "int64"),
        Column("trace", (-1,), _trace, part="trace", on_request=True),
        Column("reconstruction", x, _mean, part="reconstruction", on_request=True),
        *(
            Column(f"{level.name}.z" if several else "z", (-1, level.size), _drawn_z(level.name), part="z", on_request=True)
            for level in card.levels
        ),
        *((Column("carry", (), _carry, TEXT, part="carry"),) if beyond_lambda(card) else ()),
    )


def _reconstruct(card: Card) -> tuple[Column, ...]:
    return (Column("reconstruction", card.x.shape, _mean), _samples(card), *_progress())


def _score(card: Card) -> tuple[Column, ...]:
    return (
        Column("log_px", (), _log_px),
        Column("elbo", (), lambda _, result: _floats(result.elbo)),
        Column("elbo_quantile", (), _quantiles),
        *_progress(),
    )


def _generate(card: Card) -> tuple[Column, ...]:
    return (Column("mean", card.x.shape, _mean), _samples(card))


_COLUMNS: dict[str, Callable[[Card], tuple[Column, ...]]] = {
    "encode": _encode,
    "refine": _encode,
    "reconstruct": _reconstruct,
    "score": _score,
    "generate": _generate,
}


def _progress() -> tuple[Column, Column]:
    return (
        Column("steps_used", (), lambda _, result: result.steps_used, "int64"),
        Column("stop_reason", (), lambda _, result: np.array([reason.value for reason in result.stop_reason]), TEXT),
    )


def _samples(card: Card) -> Column:
    """Draws of x; none where the call asked for none."""
    return Column("samples", (-1, *card.x.shape), _drawn_x)


def _floats(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, np.float32)


def _carried(array: str) -> Callable[[ServedModel, JobResult], NDArray[Any]]:
    return lambda _, result: _floats(result.carry[array])


def _drawn_z(level: str) -> Callable[[ServedModel, JobResult], NDArray[Any]]:
    def value(_: ServedModel, result: JobResult) -> NDArray[Any]:
        assert result.z is not None, "the job asked for z"
        return _floats(result.z[level])

    return value


def _mean(model: ServedModel, result: JobResult) -> NDArray[Any]:
    assert result.mean is not None, "the job asked for the mean"
    return _floats(result.mean).reshape(-1, *model.card.x.shape)


def _drawn_x(model: ServedModel, result: JobResult) -> NDArray[Any]:
    rows = len(result.stop_reason)
    if result.x is None:
        return np.zeros((rows, 0, *model.card.x.shape), np.float32)
    return _floats(result.x).reshape(rows, result.x.shape[1], *model.card.x.shape)


def _log_px(_: ServedModel, result: JobResult) -> NDArray[Any]:
    assert result.log_px is not None, "the job asked for importance samples"
    return _floats(result.log_px)


def _quantiles(model: ServedModel, result: JobResult) -> NDArray[Any]:
    found = (elbo_quantile(model.card.quantiles, steps, elbo) for steps, elbo in zip(result.steps_used, result.elbo, strict=True))
    return np.array([np.nan if quantile is None else quantile for quantile in found], np.float32)


def _trace(_: ServedModel, result: JobResult) -> NDArray[Any]:
    """(R, longest): rows that ended earlier are filled with NaN."""
    assert result.trace is not None, "the job asked for the trace"
    table = np.full((len(result.trace), max(map(len, result.trace))), np.nan, np.float32)
    for row, values in zip(table, result.trace, strict=True):
        row[: len(values)] = values
    return table


def _carry(model: ServedModel, result: JobResult) -> NDArray[Any]:
    kept = beyond_lambda(model.card)
    rows = range(len(result.stop_reason))
    return np.array([pack({tensor.name: result.carry[tensor.name][row] for tensor in kept}, model.sha256) for row in rows])
