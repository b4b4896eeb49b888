"""The front door against its own OpenAPI document: whatever is sent, the answer is one that the document describes.

`tests/chaos/malformed.py` sends far more, by hand.
"""

from __future__ import annotations

import hashlib
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cert_ray.serving.api_keys import ApiKey, KeyRing
from cert_ray.serving.http import create_app
from tests.serving.front_doors import ScriptedBackend

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

KEY = {"Authorization": "Bearer the-key"}
KEYS = KeyRing((ApiKey("test", hashlib.sha256(b"the-key").digest(), None),))


def cases_of(operations: list[Any]) -> strategies.SearchStrategy[schemathesis.Case]:
    """Requests as the document describes them, and requests that break it in one place."""
    return strategies.one_of(
        operation.as_strategy(generation_mode=mode) for operation in operations for mode in GenerationMode
    )


schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(ScriptedBackend()))
operations = [found.ok() for found in schema.get_all_operations()]
with_keys = schemathesis.openapi.from_asgi("/openapi.json", create_app(ScriptedBackend(), keys=KEYS), headers=KEY)
operations_with_keys = [found.ok() for found in with_keys.get_all_operations()]


@hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(case=cases_of(operations))
def test_every_answer_is_one_that_the_document_describes(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)


@hypothesis.settings(max_examples=15, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(case=cases_of(operations_with_keys), is_known=strategies.booleans())
def test_so_is_every_answer_where_keys_are_asked_for(case: schemathesis.Case, is_known: bool) -> None:
    response = case.call(headers=KEY if is_known else None)
    case.validate_response(response, checks=CHECKS)
    has_key = response.request.headers.get("Authorization") == KEY["Authorization"]  # cases have headers of their own
    assert (response.status_code == 401) == (not has_key and case.path != "/health")


def test_the_document_says_where_a_key_is_asked_for() -> None:
    assert "securitySchemes" not in schema.raw_schema["components"]
    (name, scheme), *others = with_keys.raw_schema["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"], others) == ("http", "bearer", [])
    for path, methods in with_keys.raw_schema["paths"].items():
        for method in methods.values():
            if path == "/health":
                assert "security" not in method
            else:
                assert method["security"] == [{name: []}]
                assert {"401", "429", "4XX", "5XX"} <= method["responses"].keys()


@pytest.mark.parametrize("operations", [operations, operations_with_keys], ids=["open", "keys"])
def test_the_document_is_whole(operations: list[Any]) -> None:
    assert {operation.label for operation in operations} == {
        "GET /health",
        "GET /v1/models",
        "GET /tabby/v1/health",
        "GET /tabby/v1beta/server_setting",
        "GET /v1/models/{name}",
        "POST /infill",
        "POST /tabby/v1/completions",
        "POST /tabby/v1/events",
        "POST /v1/completions",
    }
