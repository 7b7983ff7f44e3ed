"""Requests are checked once; the document says what is checked."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from pydantic import ValidationError

from gateway.app import all_endpoints
from gateway.errors import ApiError
from gateway.handlers.kernels import create_request
from gateway.models import CreateKernel, timestamp
from gateway.sandbox_models import NewSandbox, SandboxChanges


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


def test_sandboxes_say_sizes_and_times() -> None:
    body = '{"memory_mib": 512, "idle_timeout_s": 60, "max_lifetime_s": 0, "checkpoints": "timer:5", "notebook": "a"}'
    request = NewSandbox.model_validate_json(body).to_create("python3")
    assert (request.memory_mib, request.idle_timeout_s, request.max_lifetime_s) == (512, 60.0, None)
    assert (request.checkpoints, request.notebook) == ("timer:5", "a")


@pytest.mark.parametrize(
    "body",
    [
        {"idle_timeout_s": -1},
        {"checkpoints": "often"},
        {"checkpoints": "timer:0"},
        {"kernel_id": "x"},
        {"memory_mib": 0},
    ],
)
def test_wrong_sandboxes_are_refused(body: object) -> None:
    with pytest.raises(ValidationError):
        NewSandbox.model_validate_json(json.dumps(body))


@pytest.mark.parametrize(
    ("body", "changes"),
    [
        ({}, {}),
        ({"name": None}, {"name": None}),
        ({"max_lifetime_s": 60, "name": "n"}, {"max_lifetime_s": 160.0, "name": "n"}),
        ({"max_lifetime_s": 0, "idle_timeout_s": None}, {"max_lifetime_s": None, "idle_timeout_s": 0.0}),
        ({"checkpoints": None}, {}),
        ({"checkpoints": "off"}, {"checkpoints": "off"}),
    ],
)
def test_changes_of_a_sandbox(body: object, changes: dict[str, object]) -> None:
    assert SandboxChanges.model_validate_json(json.dumps(body)).changes(age_s=100.0) == changes
