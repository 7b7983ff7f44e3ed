"""Round trips over a kernel's own ZMQ sockets, without a gateway between: what its part is measured against."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import hmac
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import zmq
import zmq.asyncio

from benchmarks.client import TIMEOUT_S
from benchmarks.messages import BenchmarkError, Execution, Parts, execute_request

# An emulated kernel takes most of a second for its first cell.
READY_INTERVAL_S = 3.0
_DELIMITER = b"<IDS|MSG>"


class RawKernel:
    """Shell and iopub of one kernel. One execution at a time."""

    def __init__(self, shell: zmq.asyncio.Socket, iopub: zmq.asyncio.Socket, key: bytes) -> None:
        self._shell = shell
        self._iopub = iopub
        self._key = key
        self._session_id = uuid.uuid4().hex
        self._poller = zmq.asyncio.Poller()
        self._poller.register(shell, zmq.POLLIN)
        self._poller.register(iopub, zmq.POLLIN)

    async def ask(self, expression: str, *, after: str = "") -> Any:
        """The value of an expression, which JSON can hold, after silently running some code. Errors: as `execute`."""
        execution = await self.execute(after, expression=f"__import__('json').dumps({expression})")
        return json.loads(ast.literal_eval(execution.results[-1]))

    async def execute(self, code: str, *, expression: str | None = None) -> Execution:
        """Runs code until its reply and idle have come. expression: see `execute_request`.

        Errors: CellError, TimeoutError.
        """
        async with asyncio.timeout(TIMEOUT_S):
            execution = await self._send(code, expression)
            while not execution.finished:
                for plug, _ in await self._poller.poll():
                    execution.take(_parts_of(await plug.recv_multipart()))
        return execution

    async def reply(self, code: str) -> None:
        """Runs code until its reply has come; iopub is not waited for. Errors: CellError, TimeoutError."""
        async with asyncio.timeout(TIMEOUT_S):
            execution = await self._send(code, None)
            while execution.replied_at is None:
                execution.take(_parts_of(await self._shell.recv_multipart()))

    async def _send(self, code: str, expression: str | None) -> Execution:
        message_id, parts = execute_request(code, session_id=self._session_id, expression=expression)
        blobs = [parts.header, parts.parent, parts.metadata, parts.content]
        signer = hmac.new(self._key, b"".join(blobs), hashlib.sha256)
        execution = Execution(message_id=message_id, sent_at=perf_counter())
        await self._shell.send_multipart([_DELIMITER, signer.hexdigest().encode(), *blobs])
        return execution

    async def wait_ready(self) -> None:
        """Waits until iopub is subscribed: its first message may pass before that."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                try:
                    async with asyncio.timeout(READY_INTERVAL_S):
                        await self.execute("1+1")
                        return
                except TimeoutError:
                    # Replied before the subscription was there: ask again.
                    continue


@asynccontextmanager
async def raw_kernel(info: Mapping[str, Any], *, wait: bool = True) -> AsyncIterator[RawKernel]:
    """Connects to the kernel of a connection file. wait: until iopub is subscribed, which `reply` does not need."""
    if info["signature_scheme"] != "hmac-sha256":
        raise BenchmarkError(f"The kernel signs with {info['signature_scheme']}, not hmac-sha256.")
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as shell, context.socket(zmq.SUB) as iopub:
        shell.linger = iopub.linger = 0
        iopub.subscribe(b"")
        shell.connect(_address(info, "shell"))
        iopub.connect(_address(info, "iopub"))
        kernel = RawKernel(shell, iopub, str(info["key"]).encode())
        if wait:
            await kernel.wait_ready()
        yield kernel


def _address(info: Mapping[str, Any], channel: str) -> str:
    port = info[f"{channel}_port"]
    return f"ipc://{info['ip']}-{port}" if info["transport"] == "ipc" else f"tcp://{info['ip']}:{port}"


def _parts_of(frames: list[bytes]) -> Parts:
    if _DELIMITER not in frames:
        # ipykernel 7's XPUB greets a new subscriber with a message of its own form.
        return Parts(header=b"{}", parent=b"{}", metadata=b"{}", content=b"{}")
    start = frames.index(_DELIMITER) + 2
    header, parent, metadata, content = frames[start : start + 4]
    return Parts(header=header, parent=parent, metadata=metadata, content=content)
