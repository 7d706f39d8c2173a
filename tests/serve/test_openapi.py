"""The OpenAPI document of the server against the server, by schemathesis."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck

pytest.importorskip("fastapi", reason="the server needs the serve extra")
pytest.importorskip("uvicorn", reason="the server needs the serve extra")
pytest.importorskip("prometheus_client", reason="the server needs the serve extra")
pytest.importorskip("openai", reason="clients of the tests")

from tests.serve.test_api import PATIENCE_S, serving

from tilewright.serve.engine import LLM

schemathesis: Any = pytest.importorskip(
    "schemathesis", reason="schemathesis makes requests of the OpenAPI document"
)
checks: Any = pytest.importorskip("schemathesis.specs.openapi.checks")

OPERATIONS = {
    ("GET", "/health"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/{wanted}"),
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"),
}  # fmt: skip
CASES = [(method, path, "POSITIVE") for method, path in sorted(OPERATIONS)]
CASES += [(method, path, "NEGATIVE") for method, path in sorted(OPERATIONS) if method == "POST"]
CHECKS = (
    schemathesis.checks.not_a_server_error, checks.status_code_conformance,
    checks.content_type_conformance, checks.response_schema_conformance,
    checks.negative_data_rejection, checks.unsupported_method,
)  # fmt: skip


@pytest.fixture(scope="module")
def document(runnable_path: Path) -> Iterator[Any]:
    with serving(LLM(runnable_path)) as (url, _):
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_the_document_is_complete(document: Any):
    found = {(o.ok().method.upper(), o.ok().path) for o in document.get_all_operations()}
    assert found == OPERATIONS


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_requests_of_the_document(document: Any, method: str, path: str, mode: str):
    """No answer is a server's error; each has a documented status, type and shape, an error that of
    OpenAI; what the document does not allow is refused."""
    operation = document[path][method]

    @hypothesis.given(case=operation.as_strategy(schemathesis.GenerationMode[mode]))
    @hypothesis.settings(
        max_examples=300 if os.environ.get("TILEWRIGHT_LONG_TESTS") else 6,
        deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )  # fmt: skip
    def ask(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=PATIENCE_S)

    ask()
