"""The host's end of `sandbox.call`, played by a script: what docs/sandbox_calls.md says, and nothing of kernels/."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.unit.guest.conftest import KEY, Host
from vm_runtime.guest.agent import Agent, AgentSettings
from vm_runtime.guest.paths import Paths
from vm_runtime.guest.sandbox import values
from vm_runtime.wire.carriers import SocketCarrier
from vm_runtime.wire.errors import OpenRejectedError
from vm_runtime.wire.greeting import Hello
from vm_runtime.wire.link import Link
from vm_runtime.wire.protocol import BOOT_MARKER
from vm_runtime.wire.stream import Incoming

PARENT = "1" * 32


def child_id(index: int) -> str:
    return f"{index:x}" * 4 + "c" * 28


@dataclass
class Call:
    """A call that the guest made; `value` is there once it was read."""

    op: str
    params: dict[str, Any]
    incoming: Incoming
    over: asyncio.Event = field(default_factory=asyncio.Event)  # answered, or taken back by the guest

    @property
    def id(self) -> str:
        return str(self.params["call_id"])

    async def answer(self, result: dict[str, Any], value: bytes = b"") -> bytes:
        """ACCEPT, read the guest's value, send ours."""
        stream = await self.incoming.accept(result)
        await stream.write(value)
        received = b""
        while data := await stream.read():
            received += data
        stream.end()
        self.over.set()
        return received

    async def accept_and_hold(self) -> bytes:
        """ACCEPT and read the guest's value, without an end of our own: an offer that waits."""
        stream = await self.incoming.accept()
        received = b""
        while data := await stream.read():
            received += data
        return received


Script = Callable[[Call], Awaitable[None]]


@dataclass
class SandboxHost(Host):
    """`script` answers every call; without it calls wait in `calls`."""

    script: Script | None = None
    calls: asyncio.Queue[Call] = field(default_factory=asyncio.Queue)

    async def begin(self, identity: dict[str, str] | None = None, **fields: Any) -> Link:
        """A session as `hello`, with an identity of its own."""
        await self.hang_up()
        ours, theirs = [SocketCarrier(*await asyncio.open_unix_connection(sock=end)) for end in socket.socketpair()]
        self.serving = asyncio.create_task(self.agent.serve(theirs))
        hello = Hello(identity=identity or {"sandbox_id": PARENT, "hostname": "box"}, **fields)
        self.link = await Link.connect(ours, hello, marker=BOOT_MARKER, on_open=self._on_open, timeout_s=60)
        assert self.link.welcome is not None
        assert self.link.welcome.extra.get("problems") is None, self.link.welcome.extra
        return self.link

    async def become_child(self, call: Call, index: int = 0, **fields: Any) -> None:
        """What a child sees of a fork: the parent's session is gone, and a new one answers the pending call."""
        me = {"index": index, "id": child_id(index), "parent_id": PARENT}
        identity = {"sandbox_id": child_id(index), "parent_id": PARENT, "index": str(index), "hostname": "child"}
        await self.begin(identity, restored=True, extra={"calls": {call.id: {"result": {"child": me}}}}, **fields)

    async def next_call(self, op: str) -> Call:
        async with asyncio.timeout(60):
            call = await self.calls.get()
        assert call.op == op, call.params
        return call

    async def start(self) -> None:
        await self.call("kernel.start", key=KEY, env={}, cwd="/tmp")

    async def _on_open(self, incoming: Incoming) -> None:
        if incoming.kind != "sandbox.call":
            await super()._on_open(incoming)
            return
        call = Call(op=incoming.params["op"], params=dict(incoming.params), incoming=incoming)
        if self.script is not None:
            await self.script(call)
            return
        self.calls.put_nowait(call)
        try:
            await call.over.wait()
        finally:
            call.over.set()


async def sandbox_host(tmp_path: Path) -> AsyncIterator[SandboxHost]:
    """A host with a session and a kernel. Becomes a fixture where it is used."""
    (tmp_path / "home").mkdir()
    paths = Paths(run=tmp_path, home=tmp_path / "home")
    async with Agent(AgentSettings(paths=paths, user=None, owns_machine=False)) as agent:
        host = SandboxHost(agent=agent, paths=paths)
        await host.begin()
        await host.start()
        yield host
        await host.hang_up()


def family(outcomes: dict[int, bytes | None]) -> Script:
    """A host whose children have ended with these encoded values (None: crashed)."""
    finished = list(outcomes)

    async def script(call: Call) -> None:
        match call.op:
            case "fork":
                entries = [{"id": child_id(i), "index": i, "url": f"/lab/{i}"} for i in range(call.params["n"])]
                await call.answer({"children": entries})
            case "wait":
                index = next(i for i in finished if child_id(i) in call.params["ids"])
                finished.remove(index)
                await call.answer({"id": child_id(index)})
            case "result":
                index = next(i for i in outcomes if child_id(i) == call.params["id"])
                value = outcomes[index]
                if value is None:
                    await call.answer({"state": "crashed", "message": "The machine of the child ended."})
                else:
                    await call.answer({"state": "exited", "status": "ok"}, value)
            case "kill":
                await call.answer({})
            case _:
                raise OpenRejectedError("unknown_op", f"This host knows no {call.op}.")

    return script


def decoded(value: bytes) -> Any:
    return values.decode(value)
