"""The front door against its own OpenAPI document: whatever is sent, the answer is one that the document describes.

`tests/chaos/malformed.py` sends far more, by hand.
"""

from __future__ import annotations

import hypothesis
import schemathesis
from hypothesis import strategies
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cert_ray.serving.http import create_app
from tests.serving.front_doors import ScriptedBackend

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]

schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(ScriptedBackend()))
operations = [found.ok() for found in schema.get_all_operations()]
cases = strategies.one_of(
    operation.as_strategy(generation_mode=mode) for operation in operations for mode in GenerationMode
)
"""Requests as the document describes them, and requests that break it in one place."""


@hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(case=cases)
def test_every_answer_is_one_that_the_document_describes(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS)


def test_the_document_is_whole() -> None:
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
