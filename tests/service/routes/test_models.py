"""What is served, as clients read it."""

from __future__ import annotations


def test_the_list_names_the_newest_version_of_every_model(service):
    models = service.get("/v1/models").json()["models"]
    assert [(model["name"], model["version"], model["versions"]) for model in models] == [
        ("digits", "2", ["1", "2"]),
        ("direct", "1", ["1"]),
        ("images", "1", ["1"]),
        ("recurrent", "1", ["1"]),
    ]
    assert models[0]["iterative"] is True


def test_a_card_is_shown_with_what_the_server_adds(service):
    card = service.get("/v1/models/digits").json()
    assert card["x"]["shape"] == [784]
    assert card["levels"][0]["size"] == 4
    assert card["engine"] == "fake"
    assert (card["precision"], card["precision_cost_nats"]) == ("float32", 0.0)
    assert len(card["sha256"]) == 64
    assert "files" not in card
    assert service.get("/v1/models/digits/versions/1").json()["version"] == "1"


def test_the_curve_has_validated_nats_and_measured_milliseconds(service):
    curve = service.get("/v1/models/digits/curve").json()
    assert (curve["steps"], curve["elbo"]) == ([0, 1, 5], [-200.0, -110.0, -95.0])
    assert curve["ms"].keys() == {"1", "8", "64"}
    assert curve["ms"]["1"] == [1.5, 1.75, 2.75]
