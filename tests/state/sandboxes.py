"""Sandboxes as the tests of state and forks use them: REST calls, a client of a kernel, and what may be left of none.

Test code only. A client's cells must succeed, and a call must answer what is expected, or the test fails.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.gateways import RunningGateway
from tests.unit.gateway.client import KernelClient, Message, request, stream_text

# Emulated and on a busy host; what is waited for comes within a second or two.
WAIT_S = 60.0


class Api:
    """A gateway's REST API: answers as parsed JSON."""

    def __init__(self, gateway: RunningGateway) -> None:
        self.gateway = gateway

    async def call(self, method: str, path: str, body: object = None, *, status: int | None = None) -> Any:
        """status: what must be answered; else any 2xx."""
        if body is None and method in ("POST", "PATCH"):
            body = {}
        answer = await request(self.gateway, method, path, body)
        right = answer.code == status if status is not None else 200 <= answer.code < 300
        log = self.gateway.log.read_text()[-4000:] if answer.code == 500 else ""
        assert right, f"{method} {path}: {answer.code} {answer.body!r}\n{log}"
        return json.loads(answer.body) if answer.body else None

    async def create(self, **fields: object) -> str:
        """A new sandbox's id."""
        sandbox_id: str = (await self.call("POST", "/api/sandboxes", fields))["id"]
        return sandbox_id

    async def sandbox(self, sandbox_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = await self.call("GET", f"/api/sandboxes/{sandbox_id}")
        return answer

    async def do(self, sandbox_id: str, what: str, body: object = None, *, status: int | None = None) -> Any:
        """POST /api/sandboxes/{id}/{what}."""
        return await self.call("POST", f"/api/sandboxes/{sandbox_id}/{what}", body, status=status)

    async def delete(self, sandbox_id: str) -> None:
        await self.call("DELETE", f"/api/sandboxes/{sandbox_id}", status=204)

    async def until_state(self, sandbox_id: str, state: str, *, limit_s: float = WAIT_S) -> dict[str, Any]:
        """Waits until a sandbox is in a state."""
        return await self.until(sandbox_id, lambda found: found["state"] == state, limit_s=limit_s)

    async def until(
        self, sandbox_id: str, holds: Callable[[dict[str, Any]], bool], *, limit_s: float = WAIT_S
    ) -> dict[str, Any]:
        """Waits until something is so of what is shown of a sandbox."""
        deadline = time.monotonic() + limit_s
        while not holds(found := await self.sandbox(sandbox_id)):
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.2)
        return found

    async def checkpoints(self, sandbox_id: str, *, count: int = 0) -> list[dict[str, Any]]:
        """The time line, once it has at least `count` entries: those after a cell come a moment after its end."""
        deadline = time.monotonic() + WAIT_S
        while True:
            found: list[dict[str, Any]] = await self.call("GET", f"/api/sandboxes/{sandbox_id}/checkpoints")
            if len(found) >= count:
                return found
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.05)


class Notebook:
    """A client of one kernel. `async with Notebook.open(gateway, sandbox_id) as notebook`."""

    def __init__(self, client: KernelClient) -> None:
        self.client = client

    @classmethod
    @asynccontextmanager
    async def open(
        cls, gateway: RunningGateway, sandbox_id: str, *, session_id: str | None = None
    ) -> AsyncIterator[Notebook]:
        client = await KernelClient.connect(gateway, sandbox_id, session_id=session_id)
        try:
            yield cls(client)
        finally:
            if not client.ended:
                await client.close()

    async def run(self, code: str) -> str:
        """Runs a cell; what it printed."""
        return stream_text(await self._messages(code))

    async def value(self, code: str) -> Any:
        """Runs a cell that ends with an expression; its value, a literal."""
        for message in await self._messages(code):
            if message["header"]["msg_type"] == "execute_result":
                return ast.literal_eval(message["content"]["data"]["text/plain"])
        return None

    async def displays(self, code: str) -> list[Message]:
        """Runs a cell; the contents of what it displayed, updates included."""
        kinds = ("execute_result", "display_data", "update_display_data")
        return [each["content"] for each in await self._messages(code) if each["header"]["msg_type"] in kinds]

    async def _messages(self, code: str) -> list[Message]:
        messages = await self.client.run(code)
        for message in messages:
            if message["header"]["msg_type"] == "error":
                raise AssertionError("\n".join(message["content"]["traceback"]))
        return messages

    async def rest(self, msg_id: str) -> list[Message]:
        """All messages that a cell still causes, up to the kernel's idle after it."""
        messages = []
        while True:
            message = await self.client.receive()
            assert message is not None, "the gateway closed the connection"
            if message["parent_header"].get("msg_id") == msg_id:
                messages.append(message)
                if message["content"].get("execution_state") == "idle":
                    return messages

    async def error(self, code: str) -> str:
        """Runs a cell that fails; the error's name and text."""
        (content,) = [m["content"] for m in await self.client.run(code) if m["header"]["msg_type"] == "error"]
        return f"{content['ename']}: {content['evalue']}"


async def value_of(gateway: RunningGateway, sandbox_id: str, code: str) -> Any:
    """`Notebook.value` with a client of its own."""
    async with Notebook.open(gateway, sandbox_id) as notebook:
        return await notebook.value(code)


# Leftovers


class Traces:
    """What machines of one gateway leave in the system while they run. `note()` whenever some may be there."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._shared_memory: set[Path] = set()
        self._cgroups: set[Path] = set()

    def note(self) -> None:
        for record in (self._run_dir / "m").glob("*/machine.json"):
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                self._cgroups |= {Path(path) for path in json.loads(record.read_text())["cgroups"]}
        for pid in vmm_pids(self._run_dir).values():
            with contextlib.suppress(OSError):
                mapped = {line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
                self._shared_memory |= {Path(path) for path in mapped if path.startswith("/dev/shm/")}

    def left(self, state_dir: Path) -> list[str]:
        """What is still there, of which nothing may be after a clean stop."""
        found = [f"cgroup {path}" for path in self._cgroups if path.exists()]
        found += [str(path) for path in self._shared_memory if path.exists()]
        found += [f"socket {line}" for line in lines_with("/proc/net/unix", str(self._run_dir))]
        found += [f"mount {line}" for line in lines_with("/proc/self/mounts", str(state_dir), str(self._run_dir))]
        found += [f"process {pid}" for pid in processes_of(state_dir)]
        found += [str(path) for path in (self._run_dir, *self._run_dir.rglob("*")) if path.exists()]
        found += [str(path) for path in (state_dir / "machines").glob("*")]
        return found


def lines_with(path: str, *texts: str) -> list[str]:
    return [line for line in Path(path).read_text().splitlines() if any(text in line for text in texts)]


def processes_of(state_dir: Path) -> list[int]:
    """Processes that have a file of a state directory open, this one excepted."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            targets = [fd.readlink() for fd in (directory / "fd").iterdir()]
            if int(directory.name) != os.getpid() and any(each.is_relative_to(state_dir) for each in targets):
                found.append(int(directory.name))
    return found


def vmm_pids(run_dir: Path) -> dict[str, int]:
    """Machines by id, with the pid of their VMM, as their records say."""
    found = {}
    for record in (run_dir / "m").glob("*/machine.json"):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            found[record.parent.name] = json.loads(record.read_text())["pid"]
    return found


def vmm_of(gateway: RunningGateway, sandbox_id: str) -> int:
    """The pid of the VMM of a sandbox that has a machine, from the gateway's own index."""
    with contextlib.closing(sqlite3.connect(f"file:{gateway.state_dir}/index.sqlite?mode=ro", uri=True)) as index:
        (record,) = index.execute("SELECT record FROM sandboxes WHERE id = ?", (sandbox_id,)).fetchone()
    return vmm_pids(gateway.run_dir)[json.loads(record)["machine_id"]]


async def eventually(holds: Callable[[], object], *, limit_s: float = WAIT_S, look_s: float = 0.1) -> None:
    """Waits until something about processes or files is so."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, holds
        await asyncio.sleep(look_s)
