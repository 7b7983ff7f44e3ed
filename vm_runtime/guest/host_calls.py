"""Calls of the guest to its host (docs/sandbox_calls.md): a UNIX socket for any process here, forwarded over the wire.

A call belongs to the machine's state, not to a session: one that was pending in a snapshot is answered by the next
session's HELLO, one that is made while no session is open waits for it. Knows nothing of what the calls do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vm_runtime.wire.errors import LinkClosedError, OpenRejectedError, StreamResetError, WireError
from vm_runtime.wire.frames import MAX_JSON_BYTES
from vm_runtime.wire.link import Link

# Lengths of the header (JSON) and of the value that follows it, in both directions.
LENGTHS = struct.Struct(">II")

# A header becomes the parameters of an OPEN, together with kind, op and call id.
HEADER_BYTES_MAX = MAX_JSON_BYTES - 1024

# What crosses between sandboxes by value; larger things are files, or whole states.
VALUE_BYTES_MAX = 16 << 20

# Values that wait in the agent, which the machine's memory limit never ends: as many as four of the largest.
HELD_BYTES_MAX = 4 * VALUE_BYTES_MAX

# A pending call is an OPEN without an answer; the host allows 64 of them, and events need one, too.
CALLS_MAX = 48

# A process that connects and then does not send what it wants.
REQUEST_LIMIT_S = 30.0

# What ended well if the machine was restored while it was pending: the state that was stored then, or left, continues.
_DONE_WHEN_RESTORED = frozenset({"snapshot", "sleep", "restore", "goto", "undo"})
# What changes nothing is asked again in the next session: the host keeps how children ended.
_ASKED_AGAIN = frozenset({"result", "wait", "info", "tree", "checkpoints"})


@dataclass(frozen=True, kw_only=True)
class Answer:
    """header: {"result": {...}} or {"error": {"code", "message"}}."""

    header: Mapping[str, Any]
    value: bytes = b""


def _refused(code: str, message: str) -> Answer:
    return Answer(header={"error": {"code": code, "message": message}})


@dataclass(eq=False, kw_only=True)
class _Call:
    op: str
    params: Mapping[str, Any]
    value: bytes
    answered: asyncio.Future[Answer]
    link: Link | None = None  # the session that it was sent in
    id: str = field(default_factory=lambda: secrets.token_hex(16))

    def answer(self, answer: Answer) -> None:
        if not self.answered.done():
            self.answered.set_result(answer)


class HostCalls:
    """Listens on `path` as an async context manager. `begin_session` with every session of the host's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._calls: set[_Call] = set()
        self._held_bytes = 0
        self._link: Link | None = None
        self._begun = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> HostCalls:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve_client, self._path)
        self._path.chmod(0o666)  # any user of the machine; what is allowed is the host's to decide
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for client in self._clients:
            client.cancel()
        if self._clients:
            await asyncio.wait(self._clients)
        self._path.unlink(missing_ok=True)

    def begin_session(self, link: Link, *, restored: bool, answers: object) -> None:
        """Answer what was pending before this session, and send what waited for one.

        answers: HELLO's `extra.calls`, {call id: {"result": {...}} | {"error": {"code", "message"}}}.
        """
        named = answers if isinstance(answers, dict) else {}
        for call in self._calls:
            if call.link is None:
                continue  # never sent: it goes out now
            header = named.get(call.id)
            if isinstance(header, dict) and (isinstance(header.get("result"), dict) or "error" in header):
                call.answer(Answer(header=header))
            elif restored and call.op in _DONE_WHEN_RESTORED:
                call.answer(Answer(header={"result": {"restored": True}}))
            elif call.op not in _ASKED_AGAIN:
                message = f"The connection to the host was renewed while {call.op} was waiting for its answer."
                call.answer(_refused("interrupted", message))
        self._link = link
        self._begun.set()

    async def _serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._serve_request(reader, writer)
        finally:
            self._clients.discard(task)
            writer.close()

    async def _serve_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(REQUEST_LIMIT_S):
            header_bytes, value_bytes = LENGTHS.unpack(await reader.readexactly(LENGTHS.size))
            refusal = self._check(header_bytes, value_bytes)
            if refusal is not None:
                await _send(writer, refusal)
                return
            header = await reader.readexactly(header_bytes)
        self._held_bytes += value_bytes
        try:
            async with asyncio.timeout(REQUEST_LIMIT_S):
                value = await reader.readexactly(value_bytes)
            try:
                params = json.loads(header)
                op = params.pop("op")
            except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
                await _send(writer, _refused("bad_request", "A request is a JSON object with an `op`."))
                return
            call = _Call(op=str(op), params=params, value=value, answered=asyncio.get_running_loop().create_future())
            answer = await self._answer_unless_gone(call, reader)
            if answer is not None:
                await _send(writer, answer)
        finally:
            self._held_bytes -= value_bytes

    def _check(self, header_bytes: int, value_bytes: int) -> Answer | None:
        if not 0 < header_bytes <= HEADER_BYTES_MAX:
            return _refused("bad_request", f"A request has at most {HEADER_BYTES_MAX} bytes beside its value.")
        if value_bytes > VALUE_BYTES_MAX:
            return _refused("too_large", f"A value has at most {VALUE_BYTES_MAX >> 20} MiB.")
        if len(self._calls) >= CALLS_MAX or self._held_bytes + value_bytes > HELD_BYTES_MAX:
            return _refused("too_many_calls", f"More than {CALLS_MAX} calls to the host wait already; try again later.")
        return None

    async def _answer_unless_gone(self, call: _Call, reader: asyncio.StreamReader) -> Answer | None:
        """The call's answer; None if the process that made it has ended, which takes the call back."""
        self._calls.add(call)
        sending = asyncio.create_task(self._send_call(call), name=f"sandbox.call {call.op}")
        gone = asyncio.create_task(reader.read(1))  # there is one call per connection, so only its end can come
        try:
            futures: list[asyncio.Future[Any]] = [call.answered, gone]
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            return call.answered.result() if call.answered.done() else None
        finally:
            self._calls.discard(call)
            for task in (sending, gone):
                task.cancel()
            await asyncio.wait([sending, gone])
            if not gone.cancelled():
                gone.exception()  # a connection that broke is as gone as one that ended

    async def _send_call(self, call: _Call) -> None:
        """Forward a call; if the session ends meanwhile, the next one's `begin_session` answers it, or it is asked
        again."""
        while not await self._answered(call) and call.op in _ASKED_AGAIN:
            pass

    async def _answered(self, call: _Call) -> bool:
        """Whether the session lasted until the call was answered."""
        link = await self._session()
        call.link = link
        try:
            async with await link.open("sandbox.call", {**call.params, "op": call.op, "call_id": call.id}) as stream:
                result = stream.result
                await stream.write(call.value)
                stream.end()
                value = bytearray()
                while data := await stream.read():
                    value += data
                    if len(value) > VALUE_BYTES_MAX:
                        stream.reset("too_large", f"A value has at most {VALUE_BYTES_MAX} bytes")
                        call.answer(_refused("too_large", f"The answer to {call.op} is larger than a value may be."))
                        return True
            call.answer(Answer(header={"result": dict(result)}, value=bytes(value)))
        except (OpenRejectedError, StreamResetError) as error:
            call.answer(_refused(error.code, error.reason))
        except LinkClosedError:
            return False
        except WireError as error:  # params that are no JSON for the wire
            call.answer(_refused("bad_request", str(error)))
        return True

    async def _session(self) -> Link:
        while self._link is None or self._link.closed:
            self._begun.clear()
            await self._begun.wait()
        return self._link


async def _send(writer: asyncio.StreamWriter, answer: Answer) -> None:
    header = json.dumps(answer.header).encode()
    writer.write(LENGTHS.pack(len(header), len(answer.value)) + header)
    writer.write(answer.value)
    await writer.drain()
