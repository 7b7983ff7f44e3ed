"""schemathesis on the gateway's own description: what it describes is what it answers, whatever it is asked."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import response_schema_conformance

from tests.gateways import GatewayAddress

# A short run: enough to see every operation with odd values, not a search for rare ones.
EXAMPLES = 15

# Each example of these would start a machine.
STARTING_MACHINES = {("POST", "/api/kernels"), ("POST", "/api/sandboxes"), ("POST", "/api/sessions")}


def test_every_operation_answers_as_described(gateway: GatewayAddress) -> None:
    headers = {"Authorization": f"token {gateway.token}"}
    schema = schemathesis.openapi.from_url(f"{gateway.url}/api/openapi.json", headers=headers)
    tried = 0
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        if (operation.method.upper(), operation.path) in STARTING_MACHINES:
            continue

        @given(case=operation.as_strategy())
        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def answers_as_described(case: schemathesis.Case[Any]) -> None:
            case.call_and_validate(headers=headers, checks=[not_a_server_error, response_schema_conformance])

        answers_as_described()
        tried += 1
    assert tried > 0
