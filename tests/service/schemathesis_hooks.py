"""What a schema cannot say, and a run of schemathesis may therefore overlook: nothing else is excused, and no check is loosened.

    504   the request named a deadline, and the reply says that it could not be met: an announced refusal (docs/serving.md)
    422   lists that belong together have different lengths (`seed`, `mask` or `posterior` beside the rows), or a string that only a
          reply can give (`state`, a posterior's `carry`) came from nowhere, or count x frames, each within its own bound, are more frames
          than a request may have. JSON Schema ties no two fields together and knows no signature.

Loaded by schemathesis through its `hooks` setting (test_schemathesis.py).
"""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import Case, HookContext, Response
from schemathesis.core.failures import Failure, ServerError
from schemathesis.openapi.checks import RejectedPositiveData


@schemathesis.hook
def filter_failure(context: HookContext, failure: Failure, case: Case, response: Response) -> bool:
    """False drops the failure."""
    if not isinstance(case.body, dict):
        return True
    if isinstance(failure, ServerError):
        return not (response.status_code == 504 and _named_a_deadline(case.body) and response.json()["code"] == "deadline_exceeded")
    if isinstance(failure, RejectedPositiveData) and response.status_code == 422:
        return not (_lengths_differ(case.body) or _invented(case.body, response.json()) or _too_many_frames(case.body, response.json()))
    return True


def _named_a_deadline(body: dict[str, Any]) -> bool:
    return "deadline_ms" in body or "deadline_ms" in body.get("parameters", {})


def _lengths_differ(body: dict[str, Any]) -> bool:
    lists = [body.get(name) for name in ("inputs", "frames", "mask", "posterior", "seed")]
    return len({len(value) for value in lists if isinstance(value, list)}) > 1


def _too_many_frames(body: dict[str, Any], problem: dict[str, Any]) -> bool:
    said = [error["message"] for error in problem.get("errors", ()) if error["field"] == "frames"]
    return {"count", "frames"} <= body.keys() and any("over all sequences" in message for message in said)


def _invented(body: dict[str, Any], problem: dict[str, Any]) -> bool:
    if isinstance(body.get("state"), str):
        return bool(problem["code"] == "token_refused")
    carried = any("carry" in entry for entry in body.get("posterior") or body.get("between") or [])
    return carried and any(error["field"].endswith(".carry") for error in problem.get("errors", ()))
