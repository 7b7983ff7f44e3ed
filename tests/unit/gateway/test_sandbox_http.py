"""The sandbox API beyond create and delete, over a real gateway and real machines."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tornado.httpclient import AsyncHTTPClient

from tests.gateways import RunningGateway
from tests.state.sandboxes import vmm_of
from tests.unit.gateway.client import KernelClient, request, stream_text

Json = Any


async def call(gateway: RunningGateway, method: str, path: str, body: object = None, *, status: int = 200) -> Json:
    """One request that must be answered with `status`; the answer's JSON."""
    response = await request(gateway, method, path, body)
    assert response.code == status, response.body
    return json.loads(response.body) if response.body else None


@pytest.fixture
async def sandbox(gateway: RunningGateway) -> AsyncIterator[str]:
    """The path of a sandbox of one's own."""
    created = await call(gateway, "POST", "/api/sandboxes", {"name": "mine", "notebook": "n.ipynb"}, status=201)
    path = f"/api/sandboxes/{created['id']}"
    yield path
    await request(gateway, "DELETE", path)


async def client_of(gateway: RunningGateway, path: str) -> KernelClient:
    return await KernelClient.connect(gateway, path.rpartition("/")[2])


async def test_what_is_asked_for_is_what_it_is(gateway: RunningGateway) -> None:
    kernel_id = str(uuid.uuid4())
    asked = {
        "name": "n", "kernel_id": kernel_id, "memory_mib": 512, "vcpus": 1, "idle_timeout_s": 60, "max_lifetime_s": 600,
        "checkpoints": "timer:5", "notebook": "a.ipynb",
    }  # fmt: skip
    made = await call(gateway, "POST", "/api/sandboxes", {**asked, "env": {"A": "1"}}, status=201)
    assert made["id"] == asked.pop("kernel_id")
    assert {name: made[name] for name in asked} == asked
    path = f"/api/sandboxes/{kernel_id}"
    changed = await call(gateway, "PATCH", path, {"name": None, "idle_timeout_s": 0, "max_lifetime_s": 60})
    assert (changed["name"], changed["idle_timeout_s"], changed["checkpoints"]) == (None, 0, "timer:5")
    assert 60 <= changed["max_lifetime_s"] < 600
    await call(gateway, "DELETE", path, status=204)


async def test_a_paused_machine_says_so_instead_of_not_answering(gateway: RunningGateway, sandbox: str) -> None:
    await call(gateway, "POST", f"{sandbox}/pause", {})
    refused = await call(gateway, "POST", f"{sandbox}/exec", {"command": "true"}, status=409)
    assert "resume it first" in refused["message"]
    await call(gateway, "POST", f"{sandbox}/resume", {})
    assert (await call(gateway, "POST", f"{sandbox}/exec", {"command": "true"}))["exit_code"] == 0


async def test_a_sandbox_from_a_snapshot_has_its_size_and_a_new_environment(
    gateway: RunningGateway, sandbox: str
) -> None:
    taken = await call(gateway, "POST", f"{sandbox}/checkpoints", {"name": f"s{uuid.uuid4().hex}"}, status=201)
    asked = {"snapshot": taken["id"], "env": {"HUE": "green"}}
    refused = await call(gateway, "POST", "/api/sandboxes", {**asked, "memory_mib": 333}, status=400)
    assert "not 333" in refused["message"]
    made = await call(gateway, "POST", "/api/sandboxes", asked, status=201)
    client = await client_of(gateway, f"/{made['id']}")
    assert stream_text(await client.run("import os; print(os.environ['HUE'])")) == "green\n"
    await client.close()
    await call(gateway, "DELETE", f"/api/sandboxes/{made['id']}", status=204)


async def test_checkpoints_leave_no_descriptors_in_the_vmm(gateway: RunningGateway, sandbox: str) -> None:
    pid = vmm_of(gateway, sandbox.rpartition("/")[2])

    def open_descriptors() -> int:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))

    await call(gateway, "POST", f"{sandbox}/checkpoints", {}, status=201)
    before = open_descriptors()
    for _ in range(5):
        await call(gateway, "POST", f"{sandbox}/checkpoints", {}, status=201)
    assert open_descriptors() <= before + 1


async def test_a_renamed_notebook_takes_its_kernel_along(gateway: RunningGateway) -> None:
    old = await call(
        gateway, "POST", "/api/sessions", {"notebook": {"path": "old.ipynb"}, "kernel": {"name": "Python"}}, status=201
    )
    assert (old["path"], old["type"], old["kernel"]["name"]) == ("old.ipynb", "notebook", "python3")
    session, sandbox = f"/api/sessions/{old['id']}", f"/api/sandboxes/{old['kernel']['id']}"
    assert (await call(gateway, "PATCH", session, {"path": "new.ipynb"}))["path"] == "new.ipynb"
    assert (await call(gateway, "GET", sandbox))["notebook"] == "new.ipynb"
    await call(gateway, "POST", f"{sandbox}/sleep", {})
    changed = await call(gateway, "PATCH", session, {"kernel": {"name": "python3"}})
    assert changed["kernel"]["id"] != old["kernel"]["id"]
    await call(gateway, "GET", sandbox, status=404)
    await call(gateway, "DELETE", f"/api/sandboxes/{changed['kernel']['id']}", status=204)


async def test_life_time_ends_a_sandbox(gateway: RunningGateway, sandbox: str) -> None:
    await call(gateway, "PATCH", sandbox, {"max_lifetime_s": 0.5})
    followed = Events(gateway, f"{sandbox}/events")
    await asyncio.wait_for(followed.done, 30)
    assert (await request(gateway, "GET", sandbox)).code == 404


async def test_sleep_wake_pause_and_what_it_takes(gateway: RunningGateway, sandbox: str) -> None:
    assert (await call(gateway, "GET", f"{sandbox}/metrics"))["memory_unique_bytes"] > 1 << 20
    for _ in range(2):  # the second changes nothing
        asleep = await call(gateway, "POST", f"{sandbox}/sleep")
        assert asleep["state"] == "asleep"
        assert asleep["snapshot_id"]
    assert (await call(gateway, "GET", f"{sandbox}/metrics"))["memory_unique_bytes"] == 0
    assert (await call(gateway, "POST", f"{sandbox}/pause", status=409))["code"] == "wrong_state"
    kernel = await call(gateway, "GET", sandbox.replace("sandboxes", "kernels"))
    assert kernel["execution_state"] == "idle"
    for _ in range(2):
        assert (await call(gateway, "POST", f"{sandbox}/wake"))["state"] == "running"
    for operation, state in (("pause", "paused"), ("pause", "paused"), ("resume", "running"), ("resume", "running")):
        assert (await call(gateway, "POST", f"{sandbox}/{operation}"))["state"] == state
    client = await client_of(gateway, sandbox)
    assert stream_text(await client.run("print('still here')")) == "still here\n"
    await client.close()


async def test_back_to_a_checkpoint_and_forth(gateway: RunningGateway, sandbox: str) -> None:
    client = await client_of(gateway, sandbox)
    await client.run("x = 1")
    first = await call(gateway, "POST", f"{sandbox}/checkpoints", status=201)
    await client.run("x = 2")
    named = await call(gateway, "POST", f"{sandbox}/checkpoints", {"name": "two"}, status=201)
    assert (first["name"], named["name"]) == (None, "two")
    assert {first["id"], named["id"]} <= {each["id"] for each in await call(gateway, "GET", f"{sandbox}/checkpoints")}
    for target, value in ((first["id"][:8], "1"), ("two", "2"), (first["id"], "1")):
        assert (await call(gateway, "POST", f"{sandbox}/goto", {"target": target}))["state"] == "running"
        assert stream_text(await client.run("print(x)")) == f"{value}\n"
    refused = await call(gateway, "POST", f"{sandbox}/goto", {"target": "nothing"}, status=404)
    assert refused["code"] == "snapshot_not_found"
    await client.close()
    snapshots = {each["id"]: each for each in await call(gateway, "GET", "/api/snapshots?owner=local")}
    assert (snapshots[named["id"]]["name"], snapshots[named["id"]]["sandbox_id"]) == ("two", sandbox.rpartition("/")[2])
    assert await call(gateway, "GET", "/api/snapshots?owner=nobody") == []
    await call(gateway, "DELETE", f"/api/snapshots/{named['id']}", status=204)
    await call(gateway, "DELETE", f"/api/snapshots/{named['id']}", status=404)
    needed = (await call(gateway, "GET", sandbox))["snapshot_id"]
    assert (await call(gateway, "DELETE", f"/api/snapshots/{needed}", status=409))["code"] == "snapshot_in_use"


async def test_a_sandbox_from_a_snapshot(gateway: RunningGateway, sandbox: str) -> None:
    client = await client_of(gateway, sandbox)
    await client.run("x = 'from the snapshot'")
    await client.close()
    name = f"s-{uuid.uuid4()}"
    await call(gateway, "POST", f"{sandbox}/checkpoints", {"name": name}, status=201)
    made = await call(gateway, "POST", "/api/sandboxes", {"snapshot": name}, status=201)
    client = await KernelClient.connect(gateway, made["id"])
    assert stream_text(await client.run("print(x)")) == "from the snapshot\n"
    await client.close()
    await call(gateway, "DELETE", f"/api/sandboxes/{made['id']}", status=204)
    unknown = await call(gateway, "POST", "/api/sandboxes", {"snapshot": "nothing"}, status=404)
    assert unknown["code"] == "snapshot_not_found"


async def test_a_fork_and_its_tree(gateway: RunningGateway, sandbox: str) -> None:
    client = await client_of(gateway, sandbox)
    await client.run("x = 'shared'")
    answer = await call(gateway, "POST", f"{sandbox}/fork", {"count": 2, "name": "child"}, status=201)
    children = answer["children"]
    assert [(child["state"], child["index"], child["name"]) for child in children] == [
        ("running", 0, "child"), ("running", 1, "child"),
    ]  # fmt: skip
    for child in children:
        theirs = await KernelClient.connect(gateway, child["id"])
        assert stream_text(await theirs.run("print(x); x = None")) == "shared\n"
        await theirs.close()
    assert stream_text(await client.run("print(x)")) == "shared\n"
    await client.close()
    tree = await call(gateway, "GET", f"/api/sandboxes/{children[1]['id']}/tree")
    assert tree["root"] == sandbox.rpartition("/")[2]
    assert [node["parent_id"] for node in tree["nodes"]] == [None, tree["root"], tree["root"]]
    assert (await call(gateway, "POST", f"{sandbox}/fork", {"count": 1000}, status=403))["code"] == "limit_exceeded"
    for child in children:
        await call(gateway, "DELETE", f"/api/sandboxes/{child['id']}", status=204)


class Events:
    """Server-Sent Events of a path as they come."""

    def __init__(self, gateway: RunningGateway, path: str) -> None:
        self._text = ""
        self._more = asyncio.Event()
        self.done = asyncio.ensure_future(
            AsyncHTTPClient().fetch(
                gateway.url + path,
                headers={"Authorization": f"token {gateway.token}"},
                streaming_callback=self._take,
                request_timeout=0,
            )
        )

    def _take(self, chunk: bytes) -> None:
        self._text += chunk.decode()
        self._more.set()

    async def until(self, text: str) -> None:
        async with asyncio.timeout(60):
            while text not in self._text:
                await self.more()

    async def more(self) -> None:
        self._more.clear()
        await self._more.wait()

    def events(self) -> list[Json]:
        return [json.loads(line[6:]) for line in self._text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("what", ["create", "fork"])
async def test_what_nobody_was_told_of_is_not_left(gateway: RunningGateway, sandbox: str, what: str) -> None:
    events = Events(gateway, "/api/sandboxes/events")
    await events.until(": ready\n\n")
    path, body = ("/api/sandboxes", b"{}") if what == "create" else (f"{sandbox}/fork", b'{"count": 2}')
    url = urlsplit(gateway.url)
    _, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: token {gateway.token}\r\n".encode())
    writer.write(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    writer.close()
    count = 1 if what == "create" else 2
    await events.until('"kind":"created"')
    async with asyncio.timeout(60):
        while [event["kind"] for event in events.events()].count("deleted") < count:
            await events.more()
    made = {event["sandbox_id"] for event in events.events() if event["kind"] == "created"}
    assert len(made) == count
    assert not made & {each["id"] for each in await call(gateway, "GET", "/api/sandboxes")}
    events.done.cancel()


async def test_events_as_they_happen(gateway: RunningGateway, sandbox: str) -> None:
    one, all_ = Events(gateway, f"{sandbox}/events"), Events(gateway, "/api/sandboxes/events")
    for stream in (one, all_):
        await stream.until(": ready\n\n")
    other = await call(gateway, "POST", "/api/sandboxes", {}, status=201)
    await call(gateway, "POST", f"{sandbox}/sleep")
    await call(gateway, "DELETE", f"/api/sandboxes/{other['id']}", status=204)
    await call(gateway, "DELETE", sandbox, status=204)
    response = await one.done  # ends with the sandbox
    assert response.headers["Content-Type"] == "text/event-stream"
    mine = sandbox.rpartition("/")[2]
    assert [(event["kind"], event["data"].get("state")) for event in one.events() if event["kind"] != "checkpoint"] == [
        ("state", "asleep"), ("deleted", "gone"),
    ]  # fmt: skip
    assert {event["sandbox_id"] for event in one.events()} == {mine}
    await all_.until('"kind":"deleted","data":{"state":"gone","parent_id":null}}\n\nevent: deleted')
    assert {event["sandbox_id"] for event in all_.events()} == {mine, other["id"]}
    assert (await request(gateway, "GET", f"{sandbox}/events")).code == 404
    assert (await request(gateway, "HEAD", "/api/sandboxes/events")).code == 200
    all_.done.cancel()
