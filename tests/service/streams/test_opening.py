"""Numbers in the query of a stream are whole and small enough to be read; everything else is named."""

import numpy as np
import pytest

from models.artifact import Artifact
from service.errors import InvalidInput
from service.streams.opening import from_query
from tests.service.streams.conftest import FRAME, sound


@pytest.mark.parametrize("text", ["-1", "1.5", "", "²", "9" * 21, "9" * 5000])
@pytest.mark.parametrize("name", ["steps", "seed", "sample_rate", "token_every"])
def test_what_is_no_whole_number_of_at_most_twenty_digits_is_refused_by_name(name, text):
    with pytest.raises(InvalidInput, match=f"{name}: must be a whole number of at least 0 and at most 20 digits"):
        from_query({name: text})


def test_numbers_booleans_and_lists_are_read_as_the_json_they_stand_for():
    given = from_query({"seed": str(2**64 - 1), "elastic": "true", "return": "elbo,kl,", "encoding": "mulaw"})
    assert given == {"seed": 2**64 - 1, "elastic": True, "return": ["elbo", "kl"], "encoding": "mulaw"}


def test_the_card_of_a_speech_model_has_the_statistics_it_standardises_by(artifact: Artifact) -> None:
    heard = np.concatenate([sound(seed, 4000)[: 4000 // FRAME * FRAME] for seed in range(6)]) / 32768
    assert artifact.card.x.std == pytest.approx(heard.std(), rel=0.2)  # some of the six sounds are for validation
    assert artifact.card.x.mean == pytest.approx(heard.mean(), abs=0.1 * heard.std())
