"""The schema that /openapi.json tells, tried by Schemathesis: whatever fits it, or does not, is answered in its form."""

# ruff: noqa: F401, F811 (fixtures are imported)

from typing import Any

import pytest
from serving import Running, running, served_mixture, start

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed; pip install schemathesis"
)
pytestmark = pytest.mark.slow
EXAMPLES = 40  # of each path


def test_every_path_keeps_to_the_schema(running: Running) -> None:
    """No 5xx, no undocumented status or content type, errors as OpenAI's clients expect them."""
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance  # values are judged, too: 400

    schema = schemathesis.openapi.from_url(running.url + "/openapi.json")
    tried = set()
    for operation in (result.ok() for result in schema.get_all_operations()):
        tried.add((operation.method.upper(), operation.path))

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            if isinstance(case.body, dict):  # what random text makes of a random model need not be long
                for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                    if name in case.body or name == "max_tokens":
                        case.body[name] = 2
            response = case.call()
            case.validate_response(response, excluded_checks=[positive_data_acceptance])
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        ask()
    assert ("POST", "/v1/chat/completions") in tried
    assert len(tried) >= 12
    assert running.idle()
