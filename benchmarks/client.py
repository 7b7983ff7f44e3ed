"""A client of any Jupyter gateway: the kernels' REST calls and the v1 WebSocket. The same for both peers."""

from __future__ import annotations

import asyncio
import json
import socket
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from tornado.httpclient import AsyncHTTPClient, HTTPError, HTTPRequest
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from benchmarks.messages import V1_SUBPROTOCOL, BenchmarkError, Execution, execute_request, pack_v1, unpack_v1

# Ten emulated kernels started at once on two busy CPUs; beyond this something hangs.
TIMEOUT_S = 300.0
# A slow client's receive buffer, in bytes: small, so that the gateway feels at once that nobody reads.
SLOW_RECEIVE_BUFFER = 64 * 1024


class KernelConnection:
    """A WebSocket to one kernel. One execution at a time."""

    def __init__(self, websocket: ClientConnection, session_id: str) -> None:
        self._websocket = websocket
        self._session_id = session_id

    async def execute(self, code: str, *, bytes_per_s: float | None = None, store_history: bool = False) -> Execution:
        """Runs code until its reply and idle have come. bytes_per_s: reads no faster than this. store_history: the
        kernel counts the cell and writes it down, as for notebooks and the SDK.

        Errors: BenchmarkError when the code raises, TimeoutError.
        """
        message_id, request = execute_request(code, session_id=self._session_id, store_history=store_history)
        execution = Execution(message_id=message_id, sent_at=perf_counter())
        received = 0
        async with asyncio.timeout(TIMEOUT_S):
            await self._websocket.send(pack_v1("shell", request))
            while not execution.finished:
                frame = await self._websocket.recv()
                if isinstance(frame, str):
                    raise BenchmarkError("The gateway does not speak the v1 subprotocol.")
                execution.take(unpack_v1(frame))
                received += len(frame)
                if bytes_per_s is not None:
                    # What the rate allows is behind the clock by this much; a slow reader waits for it.
                    await asyncio.sleep(max(0.0, execution.sent_at + received / bytes_per_s - perf_counter()))
        return execution


class GatewayClient:
    """The calls of one gateway that the measurements need. Close it."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url.rstrip("/")
        self._token = token
        self._headers = {"Authorization": f"token {token}"}
        self._http = AsyncHTTPClient(force_instance=True, max_clients=64)

    @property
    def url(self) -> str:
        return self._url

    @property
    def token(self) -> str:
        return self._token

    def close(self) -> None:
        self._http.close()

    async def get(self, path: str) -> bytes:
        """Errors: HTTPError, OSError."""
        return await self._call("GET", path)

    async def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer's JSON, None where there is no body. Errors: BenchmarkError, OSError."""
        answer = await self._call("POST", path, json.dumps(body or {}))
        return json.loads(answer) if answer else None

    async def create(self, kernel_name: str | None = None) -> str:
        """POST /api/kernels; the kernel's id."""
        body = {} if kernel_name is None else {"name": kernel_name}
        answer: dict[str, Any] = json.loads(await self._call("POST", "/api/kernels", json.dumps(body)))
        return str(answer["id"])

    async def delete(self, kernel_id: str) -> None:
        await self._call("DELETE", f"/api/kernels/{kernel_id}")

    async def connection_info(self, kernel_id: str) -> dict[str, Any]:
        """The kernel's connection file (Hypercell only)."""
        info: dict[str, Any] = json.loads(await self.get(f"/api/sandboxes/{kernel_id}/connection"))
        return info

    @asynccontextmanager
    async def connection(self, kernel_id: str, *, slow: bool = False) -> AsyncIterator[KernelConnection]:
        """A WebSocket. slow: one whose buffers are as small as they can be."""
        session_id = uuid.uuid4().hex
        parts = urlsplit(self._url)
        url = f"ws://{parts.netloc}{parts.path}/api/kernels/{kernel_id}/channels?session_id={session_id}"
        plug = socket.socket()
        try:
            plug.setblocking(False)
            if slow:
                plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_RECEIVE_BUFFER)
            await asyncio.get_running_loop().sock_connect(plug, (parts.hostname, parts.port))
            async with connect(
                url,
                sock=plug,
                subprotocols=[Subprotocol(V1_SUBPROTOCOL)],
                additional_headers=self._headers,
                compression=None,
                ping_interval=None,
                open_timeout=TIMEOUT_S,
                max_size=None,
                max_queue=1 if slow else 64,
                proxy=None,
            ) as websocket:
                yield KernelConnection(websocket, session_id)
        finally:
            plug.close()

    @asynccontextmanager
    async def kernel(self, kernel_name: str | None = None) -> AsyncIterator[str]:
        """The id of a new kernel, which is deleted at the end."""
        kernel_id = await self.create(kernel_name)
        try:
            yield kernel_id
        finally:
            await self.delete(kernel_id)

    async def _call(self, method: str, path: str, body: str | None = None) -> bytes:
        request = HTTPRequest(
            self._url + path, method, self._headers, body, request_timeout=TIMEOUT_S, connect_timeout=TIMEOUT_S
        )
        try:
            return (await self._http.fetch(request)).body
        except HTTPError as error:
            detail = error.response.body.decode(errors="replace") if error.response is not None else ""
            raise BenchmarkError(f"{method} {path} answered {error.code} {error.message}: {detail}") from error
