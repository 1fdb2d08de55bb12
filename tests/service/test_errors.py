"""The tree of errors: each has a status and a code of its own."""

from __future__ import annotations

import pytest

from service import errors
from service.errors import STATUS, ElbowError, InvalidInput, Overloaded, RetryLater, problem


def every(kind=ElbowError):
    for child in kind.__subclasses__():
        yield child
        yield from every(child)


def test_every_error_that_can_be_raised_has_a_status():
    assert {kind for kind in every() if not kind.__subclasses__()} == STATUS.keys()


def test_codes_are_distinct():
    assert len({kind.code for kind in STATUS}) == len(STATUS)


@pytest.mark.parametrize("kind", STATUS)
def test_every_error_is_drawn_in_the_tree_with_its_status(kind):
    (line,) = [line for line in errors.__doc__.splitlines() if f" {kind.__name__} " in line]
    assert str(STATUS[kind]) in line


def test_a_problem_has_the_members_of_the_rfc_and_ours():
    document = problem(InvalidInput.at("steps", "must be at least 0"), instance="/v1", request_id="r")
    assert document == {
        "type": "urn:elbow:problem:invalid_input",
        "title": document["title"],
        "status": 422,
        "detail": "steps: must be at least 0",
        "instance": "/v1",
        "error": "steps: must be at least 0",
        "code": "invalid_input",
        "request_id": "r",
        "errors": [{"field": "steps", "message": "must be at least 0"}],
    }


def test_what_time_cures_says_when_to_come_back():
    assert issubclass(Overloaded, RetryLater)
    assert problem(Overloaded("full", retry_after_s=1.5), instance="/", request_id="r")["retry_after_s"] == 1.5
