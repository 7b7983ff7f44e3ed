"""Requests are checked once; the document says what is checked."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from pydantic import ValidationError

from gateway.app import all_endpoints
from gateway.errors import ApiError
from gateway.handlers.kernels import create_request
from gateway.models import CreateKernel, timestamp
from gateway.sandbox_models import NewSandbox, SandboxChanges, SandboxesQuery
from kernels.models import Sandbox, SandboxState


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


def test_variables_that_are_no_text_become_it() -> None:
    body = {"env": {"A": 1, "B": True, "C": None, "D": ["x"], "E": "text"}}
    assert CreateKernel.model_validate_json(json.dumps(body)).env == {
        "A": "1", "B": "true", "C": "null", "D": '["x"]', "E": "text",
    }  # fmt: skip
    assert CreateKernel.model_validate_json('{"env": null}').env == {}


def test_jupyter_may_say_more_and_sandboxes_may_not() -> None:
    CreateKernel.model_validate_json('{"name": "python3", "clientId": "x"}')
    with pytest.raises(ValidationError):
        NewSandbox.model_validate_json('{"colour": "red"}')


def test_the_document_names_every_path_and_every_name_once() -> None:
    endpoints = all_endpoints()
    operations = [operation for endpoint in endpoints for operation in endpoint.operations.values()]
    assert len({operation.name for operation in operations}) == len(operations)
    assert len({endpoint.path for endpoint in endpoints}) == len(endpoints)


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
        {"on_timeout": "explode"},
        {"tags": {"a,b": "c"}},
        {"tags": {"a": "b,c"}},
        {"tags": {"a": 1}},
        {"tags": {str(number): "" for number in range(33)}},
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
        ({"tags": {"a": "b"}, "on_timeout": "sleep"}, {"tags": {"a": "b"}, "on_timeout": "sleep"}),
        ({"tags": None, "on_timeout": None}, {}),
        ({"max_lifetime_s": 60, "name": "n"}, {"max_lifetime_s": 160.0, "name": "n"}),
        ({"max_lifetime_s": 0, "idle_timeout_s": None}, {"max_lifetime_s": None, "idle_timeout_s": 0.0}),
        ({"checkpoints": None}, {}),
        ({"checkpoints": "off"}, {"checkpoints": "off"}),
    ],
)
def test_changes_of_a_sandbox(body: object, changes: dict[str, object]) -> None:
    assert SandboxChanges.model_validate_json(json.dumps(body)).changes(age_s=100.0) == changes


def _sandbox(number: int, **fields: Any) -> Sandbox:
    made = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number // 2)  # two at a time
    known: dict[str, Any] = {
        "id": str(UUID(int=number)), "state": SandboxState.RUNNING, "driver": "d", "template": "python3",
        "parent_id": None, "name": None, "owner": "local", "created_at": made, "last_activity": made,
        "execution_state": "idle", "reason": None, "memory_mib": 1, "vcpus": 1, "disk_mib": 1,
    }  # fmt: skip
    return Sandbox(**{**known, **fields})


def test_pages_of_sandboxes() -> None:
    sandboxes = [_sandbox(number, tags={"n": str(number % 2), "all": ""}) for number in range(7)]
    found: list[Sandbox] = []
    query: dict[str, Any] = {"limit": 3, "tags": "all"}
    while page := SandboxesQuery.model_validate(query).select([*reversed(sandboxes)]):
        found += page
        query["after"] = f"{timestamp(page[-1].created_at)},{page[-1].id}"
    assert found == sandboxes


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"tags": "k"}, [1, 2]),
        ({"tags": "k=v"}, [1]),
        ({"tags": "k=w,m=x"}, [2]),
        ({"tags": "k=w,m=y"}, []),
        ({"states": "asleep,paused"}, [3]),
        ({"name": "n", "template": "python3"}, [0]),
    ],
)
def test_sandboxes_are_found(query: dict[str, Any], numbers: list[int]) -> None:
    sandboxes = [
        _sandbox(0, name="n"),
        _sandbox(1, tags={"k": "v"}),
        _sandbox(2, tags={"k": "w", "m": "x"}),
        _sandbox(3, state=SandboxState.ASLEEP),
    ]
    assert SandboxesQuery.model_validate(query).select(sandboxes) == [sandboxes[number] for number in numbers]


@pytest.mark.parametrize("query", [{"states": "awake"}, {"limit": 0}, {"limit": 1001}, {"after": "x"}, {"owner": "me"}])
def test_wrong_queries_are_refused(query: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SandboxesQuery.model_validate(query)
