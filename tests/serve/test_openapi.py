"""The OpenAPI document of the server against the server, by schemathesis."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="chat templates need the models extra")
pytest.importorskip("fastapi", reason="the server needs the serve extra")
pytest.importorskip("uvicorn", reason="the server needs the serve extra")
pytest.importorskip("httpx", reason="clients of the tests")
pytest.importorskip("openai", reason="clients of the tests")
pytest.importorskip("schemathesis", reason="schemathesis makes requests of the OpenAPI document")

import hypothesis
import schemathesis
from hypothesis import HealthCheck
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from tests.serve.test_api import PATIENCE_S, serving

from tilewright.serve.engine import LLM

OPERATIONS = {
    ("GET", "/health"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/{wanted}"),
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"),
}  # fmt: skip
CASES = [(method, path, GenerationMode.POSITIVE) for method, path in sorted(OPERATIONS)]
CASES += [(m, path, GenerationMode.NEGATIVE) for m, path in sorted(OPERATIONS) if m == "POST"]
CHECKS = (
    not_a_server_error, status_code_conformance, content_type_conformance,
    response_schema_conformance, negative_data_rejection, unsupported_method,
)  # fmt: skip


@pytest.fixture(scope="module")
def document(runnable_path: Path) -> Iterator[Any]:
    with serving(LLM(runnable_path)) as (url, _):
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_the_document_is_complete(document: Any):
    found = {(o.ok().method.upper(), o.ok().path) for o in document.get_all_operations()}
    assert found == OPERATIONS


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_requests_of_the_document(document: Any, method: str, path: str, mode: GenerationMode):
    """No answer is a server's error; each has a documented status, type and shape, an error that of
    OpenAI; what the document does not allow is refused."""
    operation = document[path][method]

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=300 if os.environ.get("TILEWRIGHT_LONG_TESTS") else 6,
        deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )  # fmt: skip
    def ask(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=PATIENCE_S)

    ask()
