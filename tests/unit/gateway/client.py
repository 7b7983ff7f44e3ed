"""A client of one kernel over the gateway's WebSocket, in either form. Test code only: it checks nothing."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Sequence
from typing import Any

from jupyter_server.services.kernels.connection.base import deserialize_binary_message, deserialize_msg_from_ws_v1
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse
from tornado.websocket import WebSocketClientConnection, websocket_connect

from gateway.frames import V1, KernelMessage, encode_legacy, encode_v1
from tests.gateways import GatewayAddress, RunningGateway

# A first cell under emulation takes seconds, on a busy machine many.
TIMEOUT_S = 120.0
Message = dict[str, Any]


async def request(
    gateway: GatewayAddress, method: str, path: str, body: object = None, *, headers: dict[str, str] | None = None
) -> HTTPResponse:
    """One request with the gateway's token (unless `headers` are given); any status is an answer."""
    return await AsyncHTTPClient().fetch(
        gateway.url + path,
        method=method,
        headers={"Authorization": f"token {gateway.token}"} if headers is None else headers,
        body=None if body is None else body if isinstance(body, bytes) else json.dumps(body),
        allow_nonstandard_methods=True,
        raise_error=False,
        request_timeout=TIMEOUT_S,
    )


def waits_for(name: str) -> str:
    """Lines of a cell that wait until the test calls `let_pass` with this name."""
    return f"import os, time\nwhile not os.path.exists('/tmp/{name}'): time.sleep(0.01)\n"


async def let_pass(gateway: RunningGateway, sandbox_id: str, name: str) -> None:
    """Lets the cell continue that `waits_for` this name."""
    answer = await request(gateway, "POST", f"/api/sandboxes/{sandbox_id}/exec", {"command": f"touch /tmp/{name}"})
    assert answer.code == 200 and json.loads(answer.body)["exit_code"] == 0, answer.body


class KernelClient:
    """`await KernelClient.connect(...)`; `run` executes code and answers all messages up to its end."""

    def __init__(self, websocket: WebSocketClientConnection, session_id: str, *, v1: bool) -> None:
        self.websocket = websocket
        self.session_id = session_id
        self.v1 = v1
        self.ended = False

    @classmethod
    async def connect(
        cls, gateway: RunningGateway, kernel_id: str, *, session_id: str | None = None, v1: bool = True
    ) -> KernelClient:
        session_id = session_id or uuid.uuid4().hex
        url = f"{gateway.url.replace('http', 'ws', 1)}/api/kernels/{kernel_id}/channels?session_id={session_id}"
        websocket = await websocket_connect(
            HTTPRequest(url, headers={"Authorization": f"token {gateway.token}"}),
            subprotocols=[V1] if v1 else None,
        )
        return cls(websocket, session_id, v1=v1)

    async def send(
        self,
        msg_type: str,
        content: Message,
        *,
        channel: str = "shell",
        msg_id: str | None = None,
        buffers: Sequence[bytes] = (),
    ) -> str:
        """Sends a message; its id. msg_id: of a message that was sent before."""
        msg_id = msg_id or uuid.uuid4().hex
        header = {
            "msg_id": msg_id,
            "msg_type": msg_type,
            "session": self.session_id,
            "username": "test",
            "date": "2026-01-01T00:00:00Z",
            "version": "5.4",
        }
        message = KernelMessage(
            channel, json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode(), buffers
        )
        data, binary = (encode_v1(message), True) if self.v1 else encode_legacy(message)
        await self.websocket.write_message(data, binary=binary)
        return msg_id

    async def execute(self, code: str, *, msg_id: str | None = None) -> str:
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": True,
            "stop_on_error": True,
        }
        return await self.send("execute_request", content, msg_id=msg_id)

    async def receive(self, timeout_s: float = TIMEOUT_S) -> Message | None:
        """The next message; None when the gateway has closed the connection."""
        data = await asyncio.wait_for(self.websocket.read_message(), timeout_s)
        if data is None:
            self.ended = True
            return None
        message: Message
        if not self.v1:
            message = json.loads(data) if isinstance(data, str) else deserialize_binary_message(data)
            return message
        channel, parts = deserialize_msg_from_ws_v1(data)
        names = ("header", "parent_header", "metadata", "content")
        message = {name: json.loads(part) for name, part in zip(names, parts, strict=False)}
        return {**message, "channel": channel, "buffers": parts[4:]}

    async def until(self, msg_type: str, **content: object) -> list[Message]:
        """All messages up to the first one of that type and content."""
        messages = []
        while True:
            message = await self.receive()
            assert message is not None, f"closed: {self.websocket.close_code} {self.websocket.close_reason}"
            messages.append(message)
            if message["header"]["msg_type"] == msg_type and content.items() <= message["content"].items():
                return messages

    async def run(self, code: str) -> list[Message]:
        """Executes code; the messages it caused, up to both its reply and the kernel's idle."""
        msg_id = await self.execute(code)
        wanted, messages = {"execute_reply", "idle"}, []
        while wanted:
            message = await self.receive()
            assert message is not None, f"closed: {self.websocket.close_code} {self.websocket.close_reason}"
            if message["parent_header"].get("msg_id") == msg_id:
                messages.append(message)
                wanted.discard(message["header"]["msg_type"])
                wanted.discard(message["content"].get("execution_state", ""))
        return messages

    async def rest(self, quiet_s: float) -> list[Message]:
        """What comes until nothing has come for `quiet_s`."""
        messages = []
        try:
            while message := await self.receive(quiet_s):
                messages.append(message)
        except TimeoutError:
            pass
        return messages

    async def close(self) -> None:
        """Closes and waits until the gateway has closed too."""
        self.websocket.close()
        while not self.ended:
            await self.receive()


def stream_text(messages: list[Message]) -> str:
    """What was printed to stdout."""
    return "".join(
        message["content"]["text"]
        for message in messages
        if message["header"]["msg_type"] == "stream" and message["content"]["name"] == "stdout"
    )
