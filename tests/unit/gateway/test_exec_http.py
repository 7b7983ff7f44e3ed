"""Commands over HTTP and WebSocket, against a real agent and a real machine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from kernels.errors import MachineFailedError
from kernels.exec import CommandInfo
from tests.unit.gateway.client import request
from tests.unit.gateway.conftest import Box


async def ask(box: Box, method: str, path: str, body: object = None, *, code: int = 200) -> Any:
    answer = await request(box, method, box.path + path, body)
    assert answer.code == code, answer.body
    return json.loads(answer.body) if answer.body else None


async def connect(box: Box, path: str) -> WebSocketClientConnection:
    url = box.url.replace("http", "ws", 1) + box.path + path
    socket = await websocket_connect(HTTPRequest(url, headers={"Authorization": f"token {box.token}"}))
    box.sockets.append(socket)
    return socket


async def follow(socket: WebSocketClientConnection, *, until: bytes | None = None) -> dict[str, Any]:
    """Everything up to the exit, or until that much has been said: {stdout, stderr, frames}."""
    stdout, stderr = b"", b""
    frames: list[dict[str, Any]] = []
    async with asyncio.timeout(60):
        while until is None or until not in stdout:
            message = await socket.read_message()
            if message is None:
                break
            if isinstance(message, bytes):
                stdout += message[1:] if message[0] == 1 else b""
                stderr += message[1:] if message[0] == 2 else b""
            else:
                frames.append(json.loads(message))
    return {"stdout": stdout, "stderr": stderr, "frames": frames}


async def wait_for_commands(box: Box, count: int) -> list[dict[str, Any]]:
    async with asyncio.timeout(60):
        while len(commands := await ask(box, "GET", "/commands")) != count:  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0.1)
    return list(commands)


async def test_exec_to_its_end(box: Box) -> None:
    body = {"command": "echo $X; cat; echo err >&2; exit 5", "env": {"X": "y"}, "stdin": "in\n"}
    answer = await ask(box, "POST", "/exec", body)
    answer.pop("command_id")
    assert answer == {
        "stdout": "y\nin\n",
        "stderr": "err\n",
        "stdout_truncated": False,
        "stderr_truncated": False,
        "exit_code": 5,
        "signal": None,
        "timed_out": False,
        "out_of_memory": False,
    }


async def test_exec_limits(box: Box) -> None:
    answer = await ask(box, "POST", "/exec", {"command": "head -c 300000 /dev/zero", "max_output_bytes": 1000})
    assert (len(answer["stdout"]), answer["stdout_truncated"], answer["exit_code"]) == (1000, True, 0)
    for limit in ("timeout_s", "timeout"):
        answer = await ask(box, "POST", "/exec", {"command": ["sleep", "60"], limit: 0.5})
        assert (answer["timed_out"], answer["signal"]) == (True, "SIGTERM")


async def test_exec_refusals(box: Box) -> None:
    for body, code in (
        ({"command": ["no-such-program"]}, "command_not_found"),
        ({"command": "true", "cwd": "nowhere"}, "bad_cwd"),
        ({"command": []}, "invalid_request"),
        ({"command": "true", "timeout": 1, "timeout_s": 1}, "invalid_request"),
        ({"command": "true", "unknown": 1}, "invalid_request"),
        ({"command": "x" * 300_000}, "invalid_request"),
    ):
        assert (await ask(box, "POST", "/exec", body, code=400))["code"] == code
    nobody = Box(**{**vars(box), "sandbox_id": "00000000-0000-4000-8000-00000000dead"})
    assert (await ask(nobody, "POST", "/exec", {"command": "true"}, code=404))["code"] == "sandbox_not_found"
    assert (await request(box, "POST", f"{box.path}/exec", {"command": "true"}, headers={})).code == 401


async def test_client_that_goes_ends_its_command(box: Box) -> None:
    asking = asyncio.create_task(ask(box, "POST", "/exec", {"command": "sleep 600", "timeout_s": 600}))
    await wait_for_commands(box, 1)
    _, writer = await asyncio.open_connection(*box.url.removeprefix("http://").split(":"))
    body = json.dumps({"command": "sleep 601", "timeout_s": 600}).encode()
    head = f"POST {box.path}/exec HTTP/1.1\r\nHost: localhost\r\nAuthorization: token {box.token}\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    commands = await wait_for_commands(box, 2)
    writer.close()
    await wait_for_commands(box, 1)
    killed = await ask(box, "DELETE", f"/commands/{commands[0]['command_id']}")
    assert killed["signal"] == "SIGKILL"
    assert (await asking)["signal"] == "SIGKILL"


async def test_background_command(box: Box) -> None:
    command = await ask(
        box, "POST", "/commands", {"command": "read x; echo got $x; sleep 600", "stdin": True}, code=201
    )
    path = f"/commands/{command['command_id']}"
    assert (command["running"], command["background"]) == (True, True)
    first = await connect(box, f"{path}/attach?stdin=true")
    await first.write_message(b"this\n", binary=True)
    assert (await follow(first, until=b"got this\n"))["frames"][0]["type"] == "started"
    first.close()
    again = await connect(box, f"{path}/attach")
    await follow(again, until=b"got this\n")
    await ask(box, "POST", f"{path}/signal", {"signal": "SIGTERM"}, code=204)
    end = (await follow(again))["frames"][-1]
    how = {"signal": "SIGTERM", "timed_out": False, "out_of_memory": False}
    assert end == {"type": "exited", "exit_code": None, **how}
    assert not (await ask(box, "GET", path))["running"]
    await ask(box, "DELETE", path)
    assert (await ask(box, "GET", path, code=404))["code"] == "unknown_command"
    try:
        await connect(box, f"{path}/attach")
    except HTTPClientError as error:
        assert error.code == 404
    else:
        raise AssertionError("attached to nothing")


async def test_socket_streams(box: Box) -> None:
    socket = await connect(box, "/exec")
    script = "echo out; echo err >&2; read a; echo $a; cat | wc -c"
    await socket.write_message(json.dumps({"type": "start", "command": script, "stdin": True}))
    await socket.write_message(b"line\n", binary=True)
    for _ in range(10):
        await socket.write_message(bytes(100_000), binary=True)
    await socket.write_message(json.dumps({"type": "stdin_end"}))
    seen = await follow(socket)
    assert (seen["stdout"], seen["stderr"]) == (b"out\nline\n1000000\n", b"err\n")
    assert [frame["type"] for frame in seen["frames"]] == ["started", "exited"]
    assert socket.close_code == 1000


async def test_terminal_over_a_socket(box: Box) -> None:
    socket = await connect(box, "/exec")
    await socket.write_message(
        json.dumps({"type": "start", "command": ["bash", "--norc"], "tty": {"rows": 20, "columns": 70}})
    )
    await socket.write_message(b"stty size; echo on''e\n", binary=True)
    assert b"20 70\r\n" in (await follow(socket, until=b"one\r\n"))["stdout"]
    await socket.write_message(json.dumps({"type": "resize", "rows": 10, "columns": 30}))
    await socket.write_message(b"stty size; echo tw''o\n", binary=True)
    assert b"10 30\r\n" in (await follow(socket, until=b"two\r\n"))["stdout"]
    await socket.write_message(b"exit 4\n", binary=True)
    assert (await follow(socket))["frames"][-1]["exit_code"] == 4


async def test_socket_that_closes_ends_its_command(box: Box) -> None:
    socket = await connect(box, "/exec")
    await socket.write_message(json.dumps({"type": "start", "command": "echo on; sleep 600"}))
    await follow(socket, until=b"on\n")
    socket.close()
    await wait_for_commands(box, 0)


async def test_socket_says_what_is_wrong(box: Box) -> None:
    for message, code in (
        ("nonsense", "invalid_json"),
        (json.dumps({"type": "start"}), "invalid_request"),
        (json.dumps({"type": "start", "command": ["no-such-program"]}), "command_not_found"),
    ):
        socket = await connect(box, "/exec")
        await socket.write_message(message)
        assert [frame["code"] for frame in (await follow(socket))["frames"]] == [code]
    socket = await connect(box, "/exec")
    await socket.write_message(json.dumps({"type": "start", "command": "echo on; sleep 600"}))
    await follow(socket, until=b"on\n")
    await socket.write_message(json.dumps({"type": "resize", "rows": 1, "columns": 1}))
    frame = json.loads(await socket.read_message() or "")
    assert (frame["type"], frame["code"]) == ("refused", "no_terminal")
    await socket.write_message("nonsense")
    assert (await follow(socket))["frames"][-1]["code"] == "invalid_json"
    await wait_for_commands(box, 0)


async def test_a_path_with_something_that_is_no_id_leads_nowhere(box: Box) -> None:
    for name in ("..", "..%2F..%2Fother", "%2e%2e", "a%0d%0ab", "a%20b"):
        answer = await request(box, "DELETE", f"{box.path}/commands/{name}")
        assert (answer.code, json.loads(answer.body)["code"]) == (404, "not_found")


@pytest.mark.parametrize("given", ["a\r\nSet-Cookie: b", "../../other", "", "x" * 65])
def test_a_guest_that_answers_something_else_than_an_id_has_failed(given: str) -> None:
    told = {"pid": 1, "command": "c", "background": True, "tty": False, "started_at": 1.0, "output_bytes": 0}
    ended = {"running": False, "exit_status": 0, "signal": None, "timed_out": False}
    assert CommandInfo.parse({"command_id": "0123456789ab", "cwd": None, **told, **ended}).exit_code == 0
    with pytest.raises(MachineFailedError, match="id"):
        CommandInfo.parse({"command_id": given, "cwd": None, **told, **ended})
