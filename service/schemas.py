"""Request bodies: which fields there are, their types and bounds. Unknown fields are refused, nothing is coerced.

Large numbers (`inputs`, `mask`, `posterior`) stay untouched here: arrays.py and posterior.py turn them into numpy arrays in
one go. Bounds that depend on the model or the server (steps, rows, samples) are checked in jobs.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from service.body import describe, whole
from service.errors import InvalidInput

Count = Annotated[int, Field(ge=0), BeforeValidator(whole)]
AtLeastOne = Annotated[int, Field(ge=1), BeforeValidator(whole)]
Seed = Annotated[int, Field(ge=0, lt=2**64), BeforeValidator(whole)]
Part = Literal["posterior", "elbo", "trace", "reconstruction", "z", "carry"]
StreamPart = Literal["elbo", "surprise", "posterior", "log_likelihood", "kl", "reconstruction", "prediction"]
DEFAULT_STREAM_PARTS: tuple[StreamPart, ...] = ("elbo", "surprise")
DEFAULT_PARTS: tuple[Part, ...] = ("posterior", "elbo")


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Budgeted(Body):
    """What bounds the thinking (service/scheduler/job.py: Budget), and the seed of its noise."""

    steps: Count | None = Field(None, description="refinement steps; without any budget: the trained number")
    deadline_ms: float | None = Field(None, gt=0, description="time from the arrival of the request to its reply, milliseconds")
    tolerance: float | None = Field(
        None, gt=0, description="stop when the best ELBO rose by less than this many nats in total over the last 4 steps"
    )
    elastic: bool | None = Field(
        None, description="whether fewer steps are acceptable under load; null: yes with a deadline or a tolerance, else no"
    )
    seed: Any = Field(0, description="an integer for all rows, or a list with one integer per row")


class EncodeBody(_Budgeted):
    """Infer the posterior of each row, in as many steps as you choose."""

    inputs: Any = Field(description="one list of numbers per row, flat or nested to the shape of x")
    mask: Any = Field(None, description="same shape as inputs: 1 = observed, 0 = hidden; null: all observed")
    samples: AtLeastOne = Field(1, description="samples that measure the ELBO, and samples of z if z is asked for")
    parts: list[Part] = Field(
        default_factory=lambda: list(DEFAULT_PARTS),
        alias="return",
        description="what each result holds",
        json_schema_extra={"default": list(DEFAULT_PARTS)},
    )


class RefineBody(EncodeBody):
    """Go on from the posteriors of an earlier reply."""

    posterior: Any = Field(description="one posterior per row, exactly as a reply returned it")


class ReconstructBody(_Budgeted):
    """The parameters of p(x|z) at the posterior: inferred from inputs, or given."""

    inputs: Any = Field(None, description="rows to encode first; or give posterior")
    mask: Any = Field(None, description="same shape as inputs: 1 = observed, 0 = hidden; null: all observed")
    posterior: Any = Field(None, description="posteriors of an earlier reply; or give inputs")
    samples: Count = Field(0, description="draws of x per row, besides the mean")


class ScoreBody(_Budgeted):
    """Importance-weighted log p(x), in nats, and the quantile of the ELBO among training rows."""

    inputs: Any = Field(description="one list of numbers per row, flat or nested to the shape of x")
    mask: Any = Field(None, description="same shape as inputs: 1 = observed, 0 = hidden; null: all observed")
    samples: AtLeastOne = Field(100, description="importance samples")


class GenerateBody(Body):
    """Draws from the prior, or points between two posteriors."""

    count: AtLeastOne = Field(1, description="how many to generate")
    seed: Seed = Field(0, description="each of the `count` draws has noise of its own, derived from the seed")
    between: Any = Field(None, description="two posteriors of earlier replies: `count` points on the line between their means")
    samples: Count = Field(0, description="draws of x per result, besides the mean")


class DreamBody(Body):
    """Sequences drawn from the model, each frame from its prediction: from the beginning, or on from a state."""

    count: AtLeastOne = Field(1, description="how many sequences")
    frames: AtLeastOne = Field(1, description="of each; count x frames is bounded like rows")
    seed: Seed | None = Field(
        None, description="each sequence has noise of its own, derived from the seed; default: that of the state's sequence, else 0"
    )
    state: str | None = Field(None, description="the state of an earlier reply, or a stream's token: what all sequences go on from")


class FilterBody(Body):
    """Filter some frames of a sequence: from its beginning, or on from the state of an earlier reply."""

    frames: Any = Field(description="one list of numbers per frame, in order")
    mask: Any = Field(None, description="same shape as frames: 1 = observed, 0 = missing; null: all observed")
    state: str | None = Field(None, description="the state of an earlier reply; null: a fresh sequence")
    steps: Count | None = Field(None, description="refinement steps per frame; default: those of the state, else the trained number")
    elastic: bool | None = Field(None, description="fewer steps are acceptable under load; null: no")
    seed: Seed | None = Field(None, description="of all noise of the sequence; with a state: that of its sequence; default 0")
    parts: list[StreamPart] = Field(
        default_factory=lambda: list(DEFAULT_STREAM_PARTS),
        alias="return",
        description="what each result holds",
        json_schema_extra={"default": list(DEFAULT_STREAM_PARTS)},
    )


BodyT = TypeVar("BodyT", bound=Body)


def read_body_fields(kind: type[BodyT], parsed: dict[str, Any]) -> BodyT:
    """`parsed` as a body of this kind.

    Raises:
        InvalidInput: naming every field that does not fit, and what would.
    """
    try:
        return kind.model_validate(parsed)
    except ValidationError as exc:
        fields = [_explain(kind, error) for error in exc.errors(include_url=False)]
    raise InvalidInput("; ".join(f"{path}: {message}" for path, message in fields[:5]), fields=fields)


def _explain(kind: type[Body], error: Any) -> tuple[str, str]:
    """pydantic's error in this service's words: (path, message)."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    return path, _message(kind, error["type"], error["input"], error.get("ctx", {}), error["msg"])


def _message(kind: type[Body], fault: str, given: object, context: dict[str, Any], otherwise: str) -> str:
    if fault == "missing":
        return "is required"
    if fault == "extra_forbidden":
        known = ", ".join(field.alias or name for name, field in kind.model_fields.items())
        return f"is not a field of this call, which takes {known}"
    wanted = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true, false or null",
        "list_type": "a list",
        "literal_error": f"one of {context.get('expected', '')}",
        "greater_than": f"greater than {context.get('gt')}",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than": f"less than {context.get('lt')}",
    }.get(fault)
    return f"must be {wanted}, not {describe(given)}" if wanted else f"{otherwise}, got {describe(given)}"
