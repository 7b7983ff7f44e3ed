"""Requests and events over a datagram socket, the agent's end: the other is a zygote's or a kernel's `RpcServer`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import Callable, Sequence
from typing import Any

from vm_runtime.guest.rpc_server import DATAGRAM_BYTES_MAX


class PeerGoneError(Exception):
    """The process at the other end has ended, or does not take requests."""


class PeerError(Exception):
    """The other end could not do what was asked; the message is the end of its traceback."""


class RpcClient:
    """`on_event` is called with every event, `on_gone` once when the other end has closed. You must `close` it."""

    def __init__(
        self, sock: socket.socket, *, on_event: Callable[[dict[str, Any]], None], on_gone: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._on_event = on_event
        self._on_gone = on_gone
        self._ids = itertools.count()
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._loop.add_reader(sock, self._readable)

    async def ask(self, op: str, *, fds: Sequence[int] = (), **fields: Any) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises PeerError or PeerGoneError; limit it with asyncio.timeout."""
        request_id = next(self._ids)
        data = json.dumps({"id": request_id, "op": op, **fields}).encode()
        if len(data) > DATAGRAM_BYTES_MAX:
            raise PeerError(f"A request {op} of {len(data)} bytes is larger than {DATAGRAM_BYTES_MAX}.")
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._pending[request_id] = future
        try:
            try:
                if fds:
                    socket.send_fds(self._socket, [data], list(fds))
                else:
                    self._socket.send(data)
            except OSError as error:
                raise PeerGoneError(f"{op} could not be sent: {error}") from error
            return await future
        finally:
            self._pending.pop(request_id, None)

    def close(self) -> None:
        """Stop without calling `on_gone`. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(PeerGoneError("The process has ended."))

    def _readable(self) -> None:
        data = b""
        with contextlib.suppress(ConnectionError):
            try:
                data = self._socket.recv(DATAGRAM_BYTES_MAX)
            except BlockingIOError:
                return
        if not data:
            self.close()
            self._on_gone()
            return
        message = json.loads(data)
        if "event" in message:
            self._on_event(message)
            return
        future = self._pending.get(message["answer"])
        if future is not None and not future.done():
            if "error" in message:
                future.set_exception(PeerError(message["error"]))
            else:
                future.set_result(message["result"])
