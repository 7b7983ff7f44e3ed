"""The HTTP API, over a real gateway."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
from tornado import web
from tornado.httpclient import HTTPResponse

from gateway.endpoint import Call, EndpointHandler, Routes
from gateway.listener import listening
from gateway.metrics import Metrics
from gateway.settings import GatewaySettings
from gateway.state import Gateway
from tests.gateways import RunningGateway
from tests.unit.gateway.client import request


async def test_kernels_from_birth_to_end(gateway: RunningGateway) -> None:
    kernel_id = str(uuid.uuid4())
    created = await request(gateway, "POST", "/api/kernels", {"kernel_id": kernel_id, "env": {"KERNEL_USERNAME": "u"}})
    assert created.code == 201, created.body
    assert created.headers["Location"] == f"/api/kernels/{kernel_id}"
    model = json.loads(created.body)
    assert (model["id"], model["connections"]) == (kernel_id, 0)
    assert datetime.strptime(model["last_activity"], "%Y-%m-%dT%H:%M:%S.%fZ")
    assert kernel_id in [kernel["id"] for kernel in json.loads((await request(gateway, "GET", "/api/kernels")).body)]
    again = await request(gateway, "POST", "/api/kernels", {"kernel_id": kernel_id})
    assert (again.code, json.loads(again.body)["code"]) == (409, "sandbox_exists")
    sandbox = json.loads((await request(gateway, "GET", f"/api/sandboxes/{kernel_id}")).body)
    assert (sandbox["state"], sandbox["template"]) == ("running", model["name"])
    connection = json.loads((await request(gateway, "GET", f"/api/sandboxes/{kernel_id}/connection")).body)
    assert connection["transport"] == "ipc"
    assert (await request(gateway, "DELETE", f"/api/kernels/{kernel_id}")).code == 204
    gone = await request(gateway, "GET", f"/api/kernels/{kernel_id}")
    assert (gone.code, json.loads(gone.body)["message"]) == (404, f"Kernel does not exist: {kernel_id}")


async def test_sessions_by_jupyter_servers_rules(gateway: RunningGateway) -> None:
    path = f"{uuid.uuid4()}.ipynb"
    created = await request(gateway, "POST", "/api/sessions", {"path": path, "type": "notebook", "name": "n"})
    assert created.code == 201, created.body
    session = json.loads(created.body)
    assert created.headers["Location"] == f"/api/sessions/{session['id']}"
    same = await request(gateway, "POST", "/api/sessions", {"path": path, "type": "notebook"})
    assert json.loads(same.body)["id"] == session["id"]
    patched = await request(
        gateway, "PATCH", f"/api/sessions/{session['id']}", {"path": f"moved-{path}", "kernel": {"name": None}}
    )
    assert json.loads(patched.body)["path"] == f"moved-{path}"
    assert json.loads(patched.body)["kernel"]["id"] == session["kernel"]["id"]
    changed = await request(
        gateway, "PATCH", f"/api/sessions/{session['id']}", {"kernel": {"name": session["kernel"]["name"]}}
    )
    new_kernel_id = json.loads(changed.body)["kernel"]["id"]
    assert new_kernel_id != session["kernel"]["id"]
    assert (await request(gateway, "GET", f"/api/kernels/{session['kernel']['id']}")).code == 404
    assert (await request(gateway, "DELETE", f"/api/sessions/{session['id']}")).code == 204
    assert (await request(gateway, "GET", f"/api/kernels/{new_kernel_id}")).code == 404
    assert (await request(gateway, "GET", f"/api/sessions/{session['id']}")).code == 404


async def test_a_session_takes_the_id_that_its_client_gives_a_kernel(gateway: RunningGateway) -> None:
    kernel_id = str(uuid.uuid4())

    async def create(**kernel: str) -> HTTPResponse:
        body = {"path": f"{uuid.uuid4()}.ipynb", "type": "notebook", "kernel": kernel}
        return await request(gateway, "POST", "/api/sessions", body)

    answers = sorted(await asyncio.gather(create(id=kernel_id), create(id=kernel_id)), key=lambda answer: answer.code)
    assert [answer.code for answer in answers] == [201, 409]
    assert json.loads(answers[0].body)["kernel"]["id"] == kernel_id
    assert json.loads(answers[1].body)["code"] == "sandbox_exists"
    # One that is there is the session's.
    again = await create(id=kernel_id)
    assert (again.code, json.loads(again.body)["kernel"]["id"]) == (201, kernel_id)
    refused = await create(name="bad")
    assert (refused.code, json.loads(refused.body)["code"]) == (404, "kernelspec_not_found")
    sessions = json.loads((await request(gateway, "GET", "/api/sessions")).body)
    assert [session["kernel"]["id"] for session in sessions if session["kernel"]["id"] == kernel_id] == [kernel_id] * 2


async def test_a_body_may_be_null_as_in_jupyter_server(gateway: RunningGateway) -> None:
    created = await request(gateway, "POST", "/api/kernels", b"null")
    assert created.code == 201, created.body
    policy = "frame-ancestors 'self'; report-uri /api/security/csp-report; default-src 'none'"
    assert created.headers["Content-Security-Policy"] == policy
    assert (await request(gateway, "POST", "/api/sessions", b"null")).code == 400


async def test_kernelspecs_and_their_logos(gateway: RunningGateway) -> None:
    specs = json.loads((await request(gateway, "GET", "/api/kernelspecs")).body)
    default = specs["kernelspecs"][specs["default"]]
    assert json.loads((await request(gateway, "GET", f"/api/kernelspecs/{default['name']}")).body) == default
    logo = await request(gateway, "GET", default["resources"]["logo-64x64"])
    assert (logo.code, logo.headers["Content-Type"]) == (200, "image/png")
    assert logo.body.startswith(b"\x89PNG")
    assert (await request(gateway, "GET", f"/kernelspecs/{default['name']}/..%2f__init__.py")).code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nothing", None, 404, "not_found"),
        ("PUT", "/api/kernels", None, 405, "method_not_allowed"),
        ("TRACE", "/api/kernels", None, 405, "method_not_allowed"),
        ("POST", "/api/kernels", b"{", 400, "invalid_json"),
        ("POST", "/api/kernels", {"name": 1}, 400, "invalid_request"),
        ("POST", "/api/kernels", {"name": "nothing"}, 404, "kernelspec_not_found"),
        ("POST", "/api/kernels", {"env": {"KERNEL_MEMORY_MIB": "999999999"}}, 403, "limit_exceeded"),
        ("POST", "/api/sandboxes", {"colour": "red"}, 400, "invalid_request"),
        ("POST", "/api/sandboxes", b" " * 2_000_000, 413, "body_too_large"),
        ("GET", "/api/sandboxes/nothing", None, 404, "sandbox_not_found"),
        ("GET", "/api/kernels/nothing/channels", None, 400, "not_a_websocket"),
    ],
)
async def test_every_error_says_what_is_wrong(
    gateway: RunningGateway, method: str, path: str, body: object, status: int, code: str
) -> None:
    response = await request(gateway, method, path, body)
    answer = json.loads(response.body)
    assert (response.code, answer["code"]) == (status, code)
    assert set(answer) == {"reason", "message", "code"}
    if status == 405:
        assert "GET" in response.headers["Allow"]


@pytest.mark.parametrize(
    ("headers", "query", "status"),
    [
        ({"Authorization": "token {token}"}, "", 200),
        ({"Authorization": "Bearer {token}"}, "", 200),
        ({}, "?token={token}", 200),
        ({}, "", 401),
        ({"Authorization": "token wrong"}, "", 401),
        ({"Authorization": "token {token}", "Host": "evil.example"}, "", 403),
    ],
)
async def test_the_door(gateway: RunningGateway, headers: dict[str, str], query: str, status: int) -> None:
    filled = {name: value.format(token=gateway.token) for name, value in headers.items()}
    response = await request(gateway, "GET", "/api/status" + query.format(token=gateway.token), headers=filled)
    assert response.code == status


async def test_a_proxy_gets_no_connection_file(gateway: RunningGateway) -> None:
    headers = {"Authorization": f"token {gateway.token}", "X-Forwarded-For": "203.0.113.1"}
    response = await request(gateway, "GET", f"/api/sandboxes/{uuid.uuid4()}/connection", headers=headers)
    assert response.code == 403


async def test_what_is_open_and_what_is_counted(gateway: RunningGateway) -> None:
    for path in ("/api", "/healthz", "/api/openapi.json"):
        assert (await request(gateway, "GET", path, headers={})).code == 200
    assert (await request(gateway, "GET", "/metrics", headers={})).code == 401
    numbers = (await request(gateway, "GET", "/metrics")).body.decode()
    assert "hypercell_flattening_failing 0.0" in numbers
    assert "hypercell_flattening_failures_total 0.0" in numbers
    for name in ("sandbox_start_seconds_bucket", "pool_ready", "websockets", "back_pressure_seconds_total"):
        assert f"hypercell_{name}" in numbers


async def test_a_client_that_leaves_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked, left, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    routes = Routes()

    @routes("GET /slow", public=True)
    async def slow(call: Call) -> dict[str, str]:
        """Slow."""
        asked.set()
        await left.wait()
        return {}

    class Handler(EndpointHandler):
        def on_connection_close(self) -> None:
            super().on_connection_close()
            left.set()

        def on_finish(self) -> None:
            super().on_finish()
            done.set()

    gateway = Gateway(
        settings=GatewaySettings(state_dir=tmp_path),
        url="",
        token="t",
        service=cast(Any, None),
        sessions=cast(Any, None),
        clients=cast(Any, None),
        metrics=Metrics(states=list, pool_ready=int),
    )
    async with listening(host="127.0.0.1", port=0) as listener:
        listener.application = web.Application(
            [("/slow", Handler, {"gateway": gateway, "endpoint": next(iter(routes))})], gateway=gateway
        )
        _, writer = await asyncio.open_connection(*listener.url.removeprefix("http://").split(":"))
        writer.write(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.wait_for(asked.wait(), 20)
        writer.close()
        await asyncio.wait_for(done.wait(), 20)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
