"""The OpenAPI document speaks of the models that are loaded, with their exact lengths."""

from __future__ import annotations

import pytest
from jsonschema import Draft202012Validator


@pytest.fixture
def document(service):
    return service.get("/openapi.json").json()


def body_of(document, path):
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]


def test_every_model_call_and_version_has_a_path_of_its_own(document):
    for call in ("encode", "refine", "reconstruct", "score", "generate"):
        for prefix in ("digits", "digits/versions/1", "digits/versions/2", "images", "direct"):
            assert f"/v1/models/{prefix}/{call}" in document["paths"]
    assert not any("{" in path for path in document["paths"])


def test_inputs_have_the_exact_length_and_range_of_the_model(document):
    fields = body_of(document, "/v1/models/digits/encode")["schema"]["properties"]
    row = fields["inputs"]["items"]
    assert (row["minItems"], row["maxItems"]) == (784, 784)
    assert (row["items"]["minimum"], row["items"]["maximum"]) == (0.0, 1.0)
    assert (fields["inputs"]["minItems"], fields["inputs"]["maxItems"]) == (1, 20)
    assert fields["steps"]["anyOf"][0] == {"type": "integer", "minimum": 0, "maximum": 64}
    assert fields["samples"]["maximum"] == 16
    assert "return" in fields
    assert "parts" not in fields


def test_nested_models_take_flat_and_nested_rows(document):
    flat, nested = body_of(document, "/v1/models/images/encode")["schema"]["properties"]["inputs"]["items"]["anyOf"]
    assert flat["maxItems"] == 784
    assert (nested["maxItems"], nested["items"]["maxItems"]) == (28, 28)


def test_the_examples_are_accepted_by_the_service(service, document):
    for call in ("encode", "refine", "reconstruct", "score", "generate"):
        for model in ("digits", "images", "direct"):
            example = body_of(document, f"/v1/models/{model}/{call}")["example"]
            assert service.post(f"{model}/{call}", example).status_code == 200


def test_error_bodies_are_described(document):
    responses = document["paths"]["/v1/models/digits/encode"]["post"]["responses"]
    assert {"200", "400", "401", "403", "404", "408", "413", "415", "422", "429", "431", "500", "503", "504"} == responses.keys()
    assert responses["422"]["content"].keys() == {"application/problem+json"}
    assert "overloaded" in document["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/digits", "/v1/models/direct", "/v1/models/digits/versions/1/curve", "/livez", "/readyz"]
)
def test_replies_to_get_are_what_the_document_says(service, document, path):
    schema = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    reply = service.get(path).json()
    validator = Draft202012Validator({**schema, "components": document["components"]})
    validator.validate(reply)
    name = schema["$ref"].rpartition("/")[2]
    described = document["components"]["schemas"][name]["properties"]
    assert reply.keys() == described.keys()
    assert not any(validator.is_valid(other) for other in ({}, dict.fromkeys(reply, "?")))
