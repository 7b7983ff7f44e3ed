"""A real jupyter_server in front of the gateway, as JupyterLab has one, and a client of its WebSockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import websockets
from jupyter_client.session import Session
from jupyter_server.services.kernels.connection.base import deserialize_msg_from_ws_v1, serialize_msg_to_ws_v1
from websockets.asyncio.client import ClientConnection

from tests.gateways import GatewayAddress

V1 = "v1.kernel.websocket.jupyter.org"
START_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, kw_only=True)
class Server:
    """Something that speaks Jupyter's REST and WebSocket: jupyter_server, or the gateway itself."""

    url: str
    token: str

    def call(self, method: str, path: str, body: Any = None) -> Answer:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
                return Answer(status=answer.status, headers=dict(answer.headers), body=answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(status=error.code, headers=dict(error.headers), body=error.read())

    def connect(self, kernel_id: str, *, subprotocol: str | None) -> websockets.connect:
        """A WebSocket to the kernel's channels, for `async with`."""
        return websockets.connect(
            f"{self.url.replace('http', 'ws', 1)}/api/kernels/{kernel_id}/channels?session_id={uuid.uuid4().hex}",
            additional_headers={"Authorization": f"token {self.token}"},
            subprotocols=[websockets.Subprotocol(subprotocol)] if subprotocol else None,
            max_size=None,
            open_timeout=REQUEST_TIMEOUT_S,
        )


@contextmanager
def running_server(gateway: GatewayAddress, directory: Path, *options: str) -> Iterator[Server]:
    """jupyter_server with the gateway's kernels, and with configuration and data of its own below `directory`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = uuid.uuid4().hex
    command = [
        *(sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", f"--gateway-url={gateway.url}"),
        *(f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={directory}"),
        *(f"--IdentityProvider.token={token}", *options),
    ]
    environment = {
        **os.environ,
        "JUPYTER_GATEWAY_AUTH_TOKEN": gateway.token,
        "JUPYTER_CONFIG_DIR": str(directory / "config"),
        "JUPYTER_DATA_DIR": str(directory / "data"),
        "JUPYTER_RUNTIME_DIR": str(directory / "runtime"),
    }
    with (directory / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    server = Server(url=f"http://127.0.0.1:{port}", token=token)
    try:
        _wait_until_serving(server, process, directory / "server.log")
        yield server
    finally:
        process.terminate()
        process.wait()


def _wait_until_serving(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            server.call("GET", "/api/status")
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"jupyter_server does not serve ({error}):\n{log.read_text()}") from error
        time.sleep(0.1)


class Channels:
    """Kernel messages over one WebSocket, in the subprotocol that was negotiated."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.session = Session(key=b"")

    async def send(
        self, channel: str, message_type: str, content: dict[str, Any], *, buffers: list[bytes] | None = None
    ) -> str:
        """Sends a request; returns its id."""
        message = self.session.msg(message_type, content)
        if self.connection.subprotocol == V1:
            parts = [self.session.pack(message[part]) for part in ("header", "parent_header", "metadata", "content")]
            await self.connection.send(serialize_msg_to_ws_v1([*parts, *(buffers or [])], channel))
        else:
            assert not buffers, "the old subprotocol is only used without buffers here"
            await self.connection.send(json.dumps({**message, "channel": channel, "buffers": []}, default=str))
        message_id: str = message["header"]["msg_id"]
        return message_id

    async def receive(self) -> dict[str, Any]:
        frame = await self.connection.recv()
        if isinstance(frame, str):
            parsed: dict[str, Any] = json.loads(frame)
            return parsed
        assert self.connection.subprotocol == V1
        channel, parts = deserialize_msg_from_ws_v1(frame)
        names = ("header", "parent_header", "metadata", "content")
        message = {name: json.loads(part) for name, part in zip(names, parts, strict=False)}
        return {**message, "channel": channel, "buffers": parts[4:]}

    async def receive_for(self, message_id: str, message_type: str) -> dict[str, Any]:
        """The next message of this type that answers this request."""
        while True:
            message = await self.receive()
            if message["header"]["msg_type"] == message_type and message["parent_header"].get("msg_id") == message_id:
                return message

    async def execute(self, code: str) -> str:
        """Starts a cell; returns the request's id."""
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": True}
        return await self.send("shell", "execute_request", content)

    async def output_of(self, code: str) -> str:
        """Runs a cell; returns all that it wrote to stdout and stderr."""
        message_id = await self.execute(code)
        text = ""
        while True:
            message = await self.receive()
            if message["parent_header"].get("msg_id") != message_id:
                continue
            if message["header"]["msg_type"] == "stream":
                text += message["content"]["text"]
            elif message["header"]["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return text
