"""What a user meets when something is wrong: token, gateway, id, a dead machine, a gateway that is restarted."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hypercell import (
    AsyncSandbox,
    ClosedError,
    Command,
    CommandResult,
    ConnectionLostError,
    HypercellError,
    InvalidRequestError,
    KernelDiedError,
    LimitError,
    MachineFailedError,
    NoGatewayError,
    NotFoundError,
    Sandbox,
    SandboxEvent,
    StateError,
    TokenError,
)
from tests.gateways import RunningGateway, start_gateway
from tests.state.sandboxes import vmm_of

MIB = 1024 * 1024

# A program that is sent SIGINT once it has said "on".
INTERRUPTED = """
import signal, sys
from hypercell import Sandbox
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
with Sandbox.connect(sys.argv[1]) as sandbox:
    try:
        sandbox.run_code("print(1, flush=True)\\nwhile True: pass", on_stdout=lambda text: print("on", flush=True))
    except KeyboardInterrupt:
        print(sandbox.run_code("'alive'").text)
"""


def test_a_wrong_token(at_gateway: RunningGateway) -> None:
    with pytest.raises(TokenError, match="HYPERCELL_TOKEN") as raised:
        Sandbox.list(url=at_gateway.url, token="wrong")
    assert raised.value.status == 401


async def test_a_wrong_token_on_a_websocket(at_gateway: RunningGateway, sandbox: Sandbox) -> None:
    from hypercell.aio.transport import Transport
    from hypercell.locate import Gateway

    async with Transport.leased(Gateway(url=at_gateway.url, token="wrong")) as transport:
        with pytest.raises(TokenError):
            await transport.connect(f"/api/sandboxes/{sandbox.id}/exec")


def test_no_gateway_is_told() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(NoGatewayError, match="does not answer"):
        Sandbox.create(url=url, token="any")


def test_an_unknown_id(at_gateway: RunningGateway) -> None:
    with pytest.raises(NotFoundError, match="no sandbox with the id") as raised:
        Sandbox.connect(str(uuid.uuid4()))
    assert raised.value.code == "sandbox_not_found"
    with pytest.raises(NotFoundError):
        Sandbox.create(template="no-such-template")
    with pytest.raises(NotFoundError):
        Sandbox.create(snapshot="no-such-snapshot")


def test_more_than_the_maximum(at_gateway: RunningGateway) -> None:
    with pytest.raises(LimitError, match="memory_mib"):
        Sandbox.create(memory_mib=10_000_000)
    # Sizes are told as they are, and not made larger without a word.
    with pytest.raises(InvalidRequestError, match="512 is the next size"):
        Sandbox.create(memory_mib=300)
    with pytest.raises(InvalidRequestError, match="1024 is the next size"):
        Sandbox.create(disk_mib=256)


def test_a_sandbox_that_is_gone(at_gateway: RunningGateway) -> None:
    sandbox = Sandbox.create(checkpoints="off")
    sandbox.run_code("1")
    with Sandbox.connect(sandbox.id) as other:
        other.kill()
    for use in (lambda: sandbox.run_code("1"), sandbox.info, lambda: sandbox.commands.run("true")):
        with pytest.raises(NotFoundError):
            use()
    sandbox.kill()
    for use in (lambda: sandbox.run_code("1"), sandbox.info):
        with pytest.raises(ClosedError, match="was closed"):
            use()


async def test_a_sandbox_that_goes_while_code_runs(at_gateway: RunningGateway) -> None:
    sandbox = await AsyncSandbox.create(checkpoints="off")
    began = asyncio.Event()
    code = "print('on', flush=True)\nimport time; time.sleep(600)"
    running = asyncio.create_task(sandbox.run_code(code, on_stdout=lambda text: began.set()))
    await began.wait()
    async with await AsyncSandbox.connect(sandbox.id) as other:
        await other.kill()
    with pytest.raises(HypercellError):
        await asyncio.wait_for(running, 60)
    await sandbox.close()


def test_a_forked_process_has_a_connection_of_its_own(at_gateway: RunningGateway) -> None:
    with Sandbox.create(checkpoints="off") as sandbox:
        files = sandbox.files
        sandbox.run_code("x = 1")
        files.write("given", "by the parent")
        following = sandbox.commands.start("cat", stdin=True, background=False)
        events = sandbox.events()
        threading.Thread(target=lambda: list(events), daemon=True).start()
        global _inherited
        _inherited = (sandbox, following)
        with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
            said = pool.map_async(_in_the_child, range(4), chunksize=1)
            assert sandbox.run_code("x").text == "1"
            assert said.get(100) == ["1", "1", "1", "1"]
        # The children have ended, and took nothing from here.
        assert sandbox.run_code("sorted(seen)").text == "[0, 1, 2, 3]"
        following.write("still\n")
        following.end_input()
        assert following.wait().stdout == "still\n"
        assert sandbox.info().state == "running"


_inherited: tuple[Sandbox, Command]


def _in_the_child(number: int) -> str | None:
    sandbox, following = _inherited
    sandbox.run_code(f"seen = globals().get('seen', set()) | {{{number}}}")
    assert sandbox.files.read_text("given") == "by the parent"
    assert sandbox.commands.run("cat given").stdout == "by the parent"
    with pytest.raises(ClosedError, match="attach"):
        following.wait()
    with sandbox:  # not killed: it is not this process that made it
        return sandbox.run_code("x").text


def test_the_blocking_api_says_where_it_cannot_be_used(sandbox: Sandbox) -> None:
    from hypercell.blocking.portal import BlockingCall

    async def inside() -> None:
        sandbox.info()

    with pytest.raises(HypercellError, match="AsyncSandbox"):
        BlockingCall().run(inside())


async def test_a_machine_that_is_killed_is_told_with_the_reason(at_gateway: RunningGateway) -> None:
    async with await AsyncSandbox.create(checkpoints="off") as sandbox:
        began = asyncio.Event()
        running = asyncio.create_task(
            sandbox.run_code("print('on', flush=True)\nwhile True: pass", on_stdout=lambda text: began.set())
        )
        await began.wait()
        os.kill(vmm_of(at_gateway, sandbox.id), signal.SIGKILL)
        with pytest.raises((KernelDiedError, MachineFailedError, StateError), match="machine"):
            await asyncio.wait_for(running, 60)
        info = await sandbox.info()
        assert info.state == "failed" and info.reason is not None and "SIGKILL" in info.reason
        for _ in range(2):
            with pytest.raises(KernelDiedError, match="SIGKILL"):
                await asyncio.wait_for(sandbox.run_code("1"), 60)
        async with await AsyncSandbox.connect(sandbox.id) as other:
            with pytest.raises(MachineFailedError, match="SIGKILL"):
                await asyncio.wait_for(other.run_code("1"), 60)
        for use in (sandbox.commands.run("true"), sandbox.files.read("x"), sandbox.sleep()):
            with pytest.raises((MachineFailedError, StateError), match="failed"):
                await asyncio.wait_for(use, 60)


async def test_a_killed_machine_comes_back_from_its_checkpoint(at_gateway: RunningGateway) -> None:
    async with await AsyncSandbox.create(checkpoints="off") as sandbox:
        await sandbox.run_code("value = 'kept'")
        await sandbox.create_snapshot()
        os.kill(vmm_of(at_gateway, sandbox.id), signal.SIGKILL)
        async with asyncio.timeout(60):
            while (await sandbox.info()).state != "asleep":  # noqa: ASYNC110 (nothing tells)
                await asyncio.sleep(0.1)
        assert (await sandbox.run_code("value", timeout_s=60)).text == "'kept'"


async def test_a_command_is_told_why_its_machine_left(at_gateway: RunningGateway) -> None:
    async with (
        await AsyncSandbox.create(checkpoints="off") as sandbox,
        await AsyncSandbox.connect(sandbox.id) as other,
    ):

        async def running() -> asyncio.Task[CommandResult]:
            began = asyncio.Event()
            task = asyncio.create_task(sandbox.commands.run("echo on; sleep 600", on_stdout=lambda text: began.set()))
            await began.wait()
            return task

        command, events = await running(), asyncio.create_task(_all_of(sandbox.events()))
        watch = await sandbox.files.watch(".")
        await other.sleep()
        for task in (command, asyncio.ensure_future(anext(watch))):
            with pytest.raises(StateError, match="was put to sleep"):
                await asyncio.wait_for(task, 60)
        (left,) = await sandbox.commands.list()
        assert left.running
        command = await running()
        await other.kill()
        with pytest.raises(NotFoundError, match="was deleted"):
            await asyncio.wait_for(command, 60)
        assert (await asyncio.wait_for(events, 60))[-1].kind == "deleted"


async def _all_of(events: AsyncIterator[SandboxEvent]) -> list[SandboxEvent]:
    return [event async for event in events]


async def test_a_callback_that_fails_ends_the_code(at_gateway: RunningGateway) -> None:
    def failing(text: str) -> None:
        raise ZeroDivisionError

    async with await AsyncSandbox.create(checkpoints="off") as sandbox:
        code = "print('on', flush=True)\nimport time\ntime.sleep(600)"
        for running in (
            sandbox.run_code(code, on_stdout=failing),
            sandbox.commands.run("echo on; sleep 600", on_stdout=failing),
        ):
            with pytest.raises(ZeroDivisionError):
                await running
        assert (await asyncio.wait_for(sandbox.run_code("1"), 60)).text == "1"
        async with asyncio.timeout(60):
            while any(one.running for one in await sandbox.commands.list()):  # noqa: ASYNC110 (nothing tells)
                await asyncio.sleep(0.1)


def test_ctrl_c_interrupts_the_code_that_a_blocking_call_waits_for(sandbox: Sandbox) -> None:
    command = [sys.executable, "-c", INTERRUPTED, sandbox.id]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "'alive'\n"
    assert process.returncode == 0


async def test_commands_and_files_when_the_gateway_is_restarted(state_dir: Path) -> None:
    first = start_gateway(state_dir, "--pool-size", "0")
    port = int(first.url.rpartition(":")[2])
    try:
        async with await AsyncSandbox.create(url=first.url, token=first.token, checkpoints="off") as sandbox:
            await sandbox.files.write("whole", "old")
            sent = asyncio.Event()

            async def endless() -> AsyncIterator[bytes]:
                while True:
                    yield bytes(MIB)
                    sent.set()
                    await asyncio.sleep(0.1)

            began = asyncio.Event()
            foreground = asyncio.create_task(
                sandbox.commands.run("echo on; sleep 600", on_stdout=lambda text: began.set())
            )
            background = await sandbox.commands.start("for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 1; done")
            events = asyncio.create_task(_all_of(sandbox.events()))
            upload = asyncio.create_task(sandbox.files.write("whole", endless()))
            await began.wait()
            await sent.wait()
            await asyncio.to_thread(first.kill)
            for task in (foreground, upload, events, asyncio.create_task(background.wait())):
                with pytest.raises(ConnectionLostError):
                    await asyncio.wait_for(task, 60)
            first = await asyncio.to_thread(
                lambda: start_gateway(state_dir, "--pool-size", "0", port=port, token=first.token)
            )
            again = await sandbox.commands.attach(background.command_id)
            assert (await asyncio.wait_for(again.wait(), 60)).stdout.split() == list("12345678")
            assert await sandbox.files.read("whole") == b"old"
            # Nobody gave it up.
            (left,) = [known for known in await sandbox.commands.list() if known.running]
            assert left.command == "echo on; sleep 600"
            assert (await sandbox.commands.kill(left.command_id)).signal == "SIGKILL"
    finally:
        await asyncio.to_thread(first.stop)


async def test_a_gateway_that_stops_is_told_as_such(state_dir: Path) -> None:
    gateway = start_gateway(state_dir, "--pool-size", "0")
    try:
        async with await AsyncSandbox.create(url=gateway.url, token=gateway.token, checkpoints="off") as sandbox:
            began = asyncio.Event()
            command = asyncio.create_task(
                sandbox.commands.run("echo on; sleep 600", on_stdout=lambda text: began.set())
            )
            events = asyncio.create_task(_all_of(sandbox.events()))
            await began.wait()
            await asyncio.to_thread(gateway.stop)
            for task in (command, events):
                with pytest.raises(ConnectionLostError):
                    await asyncio.wait_for(task, 60)
            await sandbox.close()
    finally:
        await asyncio.to_thread(gateway.stop)


async def test_a_gateway_restarted_in_the_middle_loses_nothing(state_dir: Path) -> None:
    first = start_gateway(state_dir, "--pool-size", "0")
    port = first.url.rpartition(":")[2]
    try:
        async with await AsyncSandbox.create(url=first.url, token=first.token, checkpoints="off") as sandbox:
            began = asyncio.Event()
            code = "import time\nfor i in range(100): print(i, flush=True); time.sleep(0.1)\n'end'"
            running = asyncio.create_task(sandbox.run_code(code, on_stdout=lambda text: began.set()))
            await began.wait()
            await asyncio.to_thread(first.kill)
            first = await asyncio.to_thread(
                lambda: start_gateway(state_dir, "--pool-size", "0", "--port", port, token=first.token)
            )
            execution = await asyncio.wait_for(running, 120)
            assert execution.text == "'end'"
            assert (await sandbox.run_code("i")).text == "99"
            assert (await sandbox.info()).state == "running"
    finally:
        await asyncio.to_thread(first.stop)
