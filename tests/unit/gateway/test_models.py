"""Requests are checked once; the document says what is checked."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from pydantic import ValidationError

from gateway.app import all_endpoints
from gateway.errors import ApiError
from gateway.handlers.kernels import create_request
from gateway.models import CreateKernel, NewSandbox, timestamp


def test_times_are_as_jupyter_server_parses_them() -> None:
    whole_second = datetime(2026, 1, 2, 4, 4, 5, tzinfo=timezone(timedelta(hours=1)))
    assert timestamp(whole_second) == "2026-01-02T03:04:05.000000Z"
    assert datetime.strptime(timestamp(datetime.now(UTC)), "%Y-%m-%dT%H:%M:%S.%fZ")


def test_resources_come_from_the_environment_or_by_name() -> None:
    env = {"KERNEL_MEMORY_MIB": "1024", "KERNEL_VCPUS": "2", "KERNEL_WORKING_DIR": "/data"}
    request = CreateKernel(env=env, resources={"vcpus": 3}).to_create("python3")  # type: ignore[arg-type]
    assert (request.template, request.memory_mib, request.vcpus, request.disk_mib) == ("python3", 1024, 3, None)
    assert (request.cwd, request.env) == ("/data", env)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "lots", "9" * 10, "1024 "])
def test_resources_must_be_numbers(text: str) -> None:
    with pytest.raises(ApiError, match="KERNEL_MEMORY_MIB must be a positive number"):
        create_request(CreateKernel(env={"KERNEL_MEMORY_MIB": text}), "python3")


@pytest.mark.parametrize(
    "body",
    [
        {"env": {"A=B": "x"}},
        {"env": {"": "x"}},
        {"env": {"A": "x\0"}},
        {"env": {"A": 1}},
        {"env": {str(i): "" for i in range(600)}},
        {"env": {"A": "x" * 40_000, "B": "x" * 40_000}},
        {"kernel_id": "../../etc"},
        {"name": 5},
        {"resources": {"memory_mib": -1}},
        {"resources": {"colour": "red"}},
        [],
    ],
)
def test_wrong_requests_are_refused(body: object) -> None:
    with pytest.raises(ValidationError):
        CreateKernel.model_validate_json(json.dumps(body))


def test_jupyter_may_say_more_and_sandboxes_may_not() -> None:
    CreateKernel.model_validate_json('{"name": "python3", "clientId": "x"}')
    with pytest.raises(ValidationError):
        NewSandbox.model_validate_json('{"colour": "red"}')


def test_the_document_names_every_path_and_every_name_once() -> None:
    endpoints = all_endpoints()
    operations = [operation for endpoint in endpoints for operation in endpoint.operations.values()]
    assert len({operation.name for operation in operations}) == len(operations)
    assert len({endpoint.path for endpoint in endpoints}) == len(endpoints)
    for endpoint in endpoints:
        assert set(endpoint.parameters) == {part[1:-1] for part in endpoint.path.split("/") if part.startswith("{")}
