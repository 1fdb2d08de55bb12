"""Numbers in the query of a stream are whole and small enough to be read; everything else is named."""

import pytest

from service.errors import InvalidInput
from service.streams.opening import from_query


@pytest.mark.parametrize("text", ["-1", "1.5", "", "²", "9" * 21, "9" * 5000])
@pytest.mark.parametrize("name", ["steps", "seed", "sample_rate", "token_every"])
def test_what_is_no_whole_number_of_at_most_twenty_digits_is_refused_by_name(name, text):
    with pytest.raises(InvalidInput, match=f"{name}: must be a whole number of at least 0 and at most 20 digits"):
        from_query({name: text})


def test_numbers_booleans_and_lists_are_read_as_the_json_they_stand_for():
    given = from_query({"seed": str(2**64 - 1), "elastic": "true", "return": "elbo,kl,", "encoding": "mulaw"})
    assert given == {"seed": 2**64 - 1, "elastic": True, "return": ["elbo", "kl"], "encoding": "mulaw"}
