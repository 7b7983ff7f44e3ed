"""How a kernel ends: at a restart and a shutdown_request in order, as a local one does; else within limits."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient

from tests.unit.guest.conftest import KEY, Host, client, run

# What a local kernel does at its end: an open file, an exit handler, a temporary directory.
LEFT_OPEN = """
import atexit, pathlib, tempfile
file = open('open file', 'w')
file.write('hello')
atexit.register(lambda: pathlib.Path('exit handler').write_text('ran'))
directory = tempfile.TemporaryDirectory(dir='.', prefix='temporary-')
"""


def check_orderly_end(host: Host) -> None:
    home = host.paths.home
    assert (home / "open file").read_text() == "hello"
    assert (home / "exit handler").read_text() == "ran"
    assert list(home.glob("temporary-*")) == []


async def outcome(jupyter: AsyncKernelClient, request: str) -> tuple[str, str]:
    """What a request was answered with: its reply's status, and the name of the error on iopub before `idle`."""
    error = ""
    while True:
        message = await jupyter.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") == request:
            if message["msg_type"] == "error":
                error = message["content"]["ename"]
            elif message["content"].get("execution_state") == "idle":
                break
    reply = await jupyter.get_shell_msg(timeout=60)
    assert reply["parent_header"]["msg_id"] == request
    return reply["content"]["status"], error


async def started(jupyter: AsyncKernelClient, code: str) -> str:
    """Send a cell that prints "on" in its course; its id, once it has."""
    request = jupyter.execute(code)
    text = ""
    while "on" not in text:
        message = await jupyter.get_iopub_msg(timeout=60)
        text += message["content"].get("text", "")
    return str(request)


async def test_a_restart_lets_an_idle_kernel_end_in_order(host: Host) -> None:
    await host.call("kernel.start", key=KEY, env={}, cwd=None)
    async with client(host) as jupyter:
        await run(jupyter, LEFT_OPEN)
        await host.call("kernel.restart")
        check_orderly_end(host)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("print('on'); import time; time.sleep(60)", "KeyboardInterrupt"),
        ("print('on'); import asyncio; await asyncio.sleep(60)", "CancelledError"),
        ("while True: print('on' * 100_000)", "KeyboardInterrupt"),
    ],
    ids=["sleeping", "awaiting", "printing"],
)
async def test_a_restart_ends_the_running_cell_first(host: Host, code: str, error: str) -> None:
    await host.call("kernel.start", key=KEY, env={}, cwd=None)
    async with client(host) as jupyter:
        await run(jupyter, LEFT_OPEN)
        request = await started(jupyter, code)
        restart = asyncio.create_task(host.call("kernel.restart"))
        assert await outcome(jupyter, request) == ("error", error)
        await restart
        check_orderly_end(host)


@pytest.mark.parametrize(
    "code",
    [
        "import time\nwhile True:\n  try: print('on'); time.sleep(60)\n  except KeyboardInterrupt: pass",
        "import atexit, time; atexit.register(time.sleep, 60); print('on')",
        "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); print('on')",
    ],
    ids=["cell", "handler", "thread"],
)
async def test_a_kernel_that_does_not_end_is_ended(host: Host, code: str) -> None:
    first = (await host.call("kernel.start", key=KEY, env={}, cwd=None))["pid"]
    async with client(host) as jupyter:
        await started(jupyter, code)
        assert (await host.call("kernel.restart"))["pid"] != first


@pytest.mark.parametrize("restart", [True, False])
async def test_a_shutdown_request_is_answered_and_followed(host: Host, restart: bool) -> None:
    pid = (await host.call("kernel.start", key=KEY, env={}, cwd=None))["pid"]
    async with client(host) as jupyter:
        await run(jupyter, LEFT_OPEN)
        request = jupyter.session.msg("shutdown_request", {"restart": restart})
        jupyter.control_channel.send(request)
        reply = await jupyter.get_control_msg(timeout=60)
        assert reply["content"] == {"status": "ok", "restart": restart}
        assert reply["parent_header"]["msg_id"] == request["header"]["msg_id"]
        broadcast: dict[str, Any] = {"msg_type": ""}
        while broadcast["msg_type"] != "shutdown_reply":
            broadcast = await jupyter.get_iopub_msg(timeout=60)
    exited = json.loads(await host.wait_event(b"kernel.exited"))
    assert exited == {"event": "kernel.exited", "pid": pid, "shut_down": True, "exit_status": 0}
    check_orderly_end(host)
