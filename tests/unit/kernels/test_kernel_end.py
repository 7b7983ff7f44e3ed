"""Kernels that end, at any moment, and machines that do not answer: what is reported of them, once, and how they are
left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from gateway.clients import ClientRegistry
from gateway.connection import Client
from gateway.frames import CHANNELS, KernelMessage, decode_v1
from gateway.metrics import Metrics
from gateway.models import KernelAnswer
from gateway.settings import GatewaySettings
from kernels import live
from kernels.errors import MachineFailedError, MachineUnresponsiveError
from kernels.events import EventQueue
from kernels.exec import CommandRequest
from kernels.models import EventKind, SandboxState
from kernels.session import KernelExited, parse_event
from tests.fake_driver import tree
from tests.unit.kernels.conftest import LIMIT_S, Service, TestDriver, started_driver, started_service

ENDS = (EventKind.KERNEL_RESTARTING, EventKind.KERNEL_RESTARTED, EventKind.KERNEL_DEAD)
CRASH_AT_START = "import os; os._exit(3)"


async def next_ends(events: EventQueue, count: int) -> list[EventKind]:
    """The next reports of kernels' ends."""
    seen: list[EventKind] = []
    async with asyncio.timeout(30):
        while len(seen) < count:
            event = await anext(events)
            seen += [event.kind] if event.kind in ENDS else []
    return seen


def crash_at_start(kernels: Service, sandbox_id: str) -> Path:
    """From now on its kernels end while they start, until the file is removed."""
    home = kernels.machines.running(sandbox_id).saved.paths.disk_dir / "home"
    startup = home / ".ipython/profile_default/startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "00.py").write_text(CRASH_AT_START)
    return startup / "00.py"


async def test_a_kernel_that_ends_again_and_again_is_reported_dead_once(state_dir: Path, driver: TestDriver) -> None:
    async with started_service(state_dir, driver, restart_limit=2) as kernels:
        sandbox_id = await kernels.new()
        file = crash_at_start(kernels, sandbox_id)
        async with kernels.bus.subscribe() as events:
            async with kernels.client(sandbox_id) as client:
                client.execute("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
                assert await next_ends(events, 3) == [*(EventKind.KERNEL_RESTARTING,) * 2, EventKind.KERNEL_DEAD]
            # A restart that fails is answered with why, and leaves it dead.
            with pytest.raises(MachineFailedError, match="ended while it started"):
                await kernels.restart(sandbox_id)
            assert kernels.get(sandbox_id).execution_state == "dead"
            assert await next_ends(events, 1) == [EventKind.KERNEL_DEAD]
            file.unlink()
            await kernels.restart(sandbox_id)
            assert await kernels.run(sandbox_id, "print(1)") == "1\n"
            assert await next_ends(events, 1) == [EventKind.KERNEL_RESTARTED]


async def test_a_dead_kernel_stays_dead_while_its_sandbox_sleeps(state_dir: Path, driver: TestDriver) -> None:
    async with started_service(state_dir, driver, restart_limit=0) as kernels:
        sandbox_id = await kernels.new(idle_timeout_s=0.1)
        async with kernels.client(sandbox_id) as client:
            client.execute("import os; os._exit(1)")
            await kernels.until(lambda: kernels.get(sandbox_id).execution_state == "dead")
        await kernels.until(lambda: kernels.get(sandbox_id).state is SandboxState.ASLEEP)
        assert KernelAnswer.of_sandbox(kernels.get(sandbox_id), 0).execution_state == "dead"


class Notebook:
    """A client of the gateway without its WebSocket: what it was sent, as (channel, type, request, state or status)."""

    def __init__(self) -> None:
        self.client = Client(write=self._write, close=lambda code, reason: None, legacy=False)
        self.received: asyncio.Queue[tuple[str, str, str, str]] = asyncio.Queue()

    def _write(self, data: bytes, binary: bool) -> asyncio.Future[None]:
        message = decode_v1(data, channels=CHANNELS)
        header, parent, content = (
            json.loads(bytes(each)) for each in (message.header, message.parent, message.content)
        )
        received = content.get("status") or content.get("execution_state") or content.get("text", "")
        self.received.put_nowait((message.channel, header["msg_type"], parent.get("msg_id", ""), received))
        sent = asyncio.get_running_loop().create_future()
        sent.set_result(None)
        return sent

    async def until(self, *last: str) -> list[tuple[str, str, str, str]]:
        """What comes up to this message."""
        seen: list[tuple[str, str, str, str]] = []
        async with asyncio.timeout(LIMIT_S):
            while not seen or seen[-1] != last:
                seen.append(await self.received.get())
        return seen


def cell(msg_id: str, code: str) -> KernelMessage:
    header = {"msg_id": msg_id, "msg_type": "execute_request", "session": "s", "username": "u", "version": "5.4"}
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    return KernelMessage("shell", json.dumps(header).encode(), b"{}", b"{}", json.dumps(content).encode())


@pytest.mark.parametrize("restart_limit", [3, 0])
async def test_no_client_waits_for_a_kernel_that_died(state_dir: Path, driver: TestDriver, restart_limit: int) -> None:
    settings = GatewaySettings(state_dir=state_dir)
    async with started_service(state_dir, driver, restart_limit=restart_limit) as kernels:
        clients = ClientRegistry(kernels, settings, Metrics(states=list, pool_ready=int))
        async with clients.running(), kernels.bus.subscribe() as events:
            following = asyncio.create_task(clients.follow(events))
            sandbox_id = await kernels.new()
            one, other = Notebook(), Notebook()
            connections = [
                clients.attach(sandbox_id, name, each.client) for name, each in (("one", one), ("other", other))
            ]
            await connections[0].from_client(cell("1", "import os, time\nprint('on')"))
            await one.until("iopub", "status", "1", "idle")
            code = "print('on', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\nos._exit(3)"
            await connections[0].from_client(cell("2", code))
            await one.until("iopub", "stream", "2", "on\n")
            await connections[0].from_client(cell("3", "print('three')"))
            await connections[1].from_client(cell("4", "print('four')"))
            home = kernels.machines.running(sandbox_id).saved.paths.disk_dir / "home"
            (home / "go").touch()
            state = "restarting" if restart_limit else "dead"
            seen = [each for each in await one.until("iopub", "status", "", state) if each[1] != "stream"]
            assert seen[-5:] == [
                ("shell", "execute_reply", "2", "error"),
                ("iopub", "status", "2", "idle"),
                ("shell", "execute_reply", "3", "aborted"),
                ("iopub", "status", "3", "idle"),
                ("iopub", "status", "", state),
            ]
            assert ("shell", "execute_reply", "4", "aborted") in await other.until("iopub", "status", "", state)
            await connections[1].from_client(cell("5", "print('five')"))
            seen = await other.until("iopub", "status", "5", "idle")
            assert (("iopub", "stream", "5", "five\n") in seen) == bool(restart_limit)
            reply = ("shell", "execute_reply", "5", "ok" if restart_limit else "aborted")
            if reply not in seen:  # by another socket than idle: in no order
                await other.until(*reply)
            following.cancel()


async def test_a_kernel_that_ended_while_no_gateway_ran_is_restarted(state_dir: Path, driver: TestDriver) -> None:
    async with started_service(state_dir, driver) as kernels:
        sandbox_id = await kernels.new()
        await kernels.run(sandbox_id, "x = 1; open('file', 'w').write('kept')")
        agent = kernels.machines.running(sandbox_id).saved.machine.pid
        await kernels.machines.detach(sandbox_id)
        kernels.registry._records.clear()
    *_, kernel = tree.pids(agent)  # after agent and zygote
    os.kill(kernel, signal.SIGKILL)
    async with asyncio.timeout(30):
        while kernel in await asyncio.to_thread(tree.pids, agent):  # until the zygote has reaped it
            pass
    async with started_driver(state_dir) as later, started_service(state_dir, later) as kernels:
        await kernels.until(lambda: kernels.get(sandbox_id).execution_state == "idle")
        assert await kernels.run(sandbox_id, "print(open('file').read(), 'x' in globals())") == "kept False\n"


async def unresponsive(kernels: Service, sandbox_id: str, *, expected: bool) -> None:
    await kernels.until(lambda: (kernels.get(sandbox_id).unresponsive_since is not None) == expected)


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PING_INTERVAL_S", 0.05)
    monkeypatch.setattr(live, "LOOK_S", 0.05)


@pytest.mark.usefixtures("quick_looks")
async def test_a_machine_that_does_not_answer_is_shown_so_until_it_does(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    await kernels.run(sandbox_id, "x = 1")
    machine = kernels.machines.running(sandbox_id).saved.machine
    os.kill(machine.pid, signal.SIGSTOP)
    await unresponsive(kernels, sandbox_id, expected=True)
    shown = KernelAnswer.of_sandbox(kernels.get(sandbox_id), 0)
    assert shown.execution_state == "unknown"
    assert shown.reason is not None
    assert "has not answered since" in shown.reason
    with pytest.raises(MachineUnresponsiveError):
        await (await kernels.commands(sandbox_id)).start(CommandRequest(command="true"))
    with pytest.raises(MachineUnresponsiveError):
        await (await kernels.files(sandbox_id)).list(".")
    with pytest.raises(MachineUnresponsiveError):
        await kernels.interrupt(sandbox_id)
    os.kill(machine.pid, signal.SIGCONT)
    await unresponsive(kernels, sandbox_id, expected=False)
    assert kernels.get(sandbox_id).execution_state == "idle"
    assert await kernels.run(sandbox_id, "print(x)") == "1\n"


@pytest.mark.usefixtures("quick_looks")
async def test_a_machine_that_is_paused_owes_no_answer(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    await kernels.lifecycle.pause(sandbox_id)
    # Longer than one that owes an answer has: nothing happens.
    await asyncio.sleep(live.PING_INTERVAL_S + 2 * live.UNRESPONSIVE_LOOKS * live.LOOK_S)
    assert kernels.get(sandbox_id).unresponsive_since is None
    await kernels.lifecycle.resume(sandbox_id)


@pytest.mark.usefixtures("quick_looks")
async def test_a_restart_ends_a_machine_that_does_not_answer(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    await kernels.run(sandbox_id, "open('file', 'w').write('kept')")
    await kernels.checkpoints.checkpoint(sandbox_id, name=None)
    machine = kernels.machines.running(sandbox_id).saved.machine
    os.kill(machine.pid, signal.SIGSTOP)
    await unresponsive(kernels, sandbox_id, expected=True)
    await kernels.restart(sandbox_id)
    assert machine.is_dead
    assert await kernels.run(sandbox_id, "print(open('file').read())") == "kept\n"
    # Without a checkpoint there is nothing to go on from.
    other_id = await kernels.new()
    os.kill(kernels.machines.running(other_id).saved.machine.pid, signal.SIGSTOP)
    await unresponsive(kernels, other_id, expected=True)
    with pytest.raises(MachineFailedError):
        await kernels.restart(other_id)
    assert kernels.get(other_id).state is SandboxState.FAILED


def test_out_of_memory_is_told_apart_from_a_kill() -> None:
    killed = parse_event(b'{"event": "kernel.exited", "pid": 7, "signal": 9}')
    assert isinstance(killed, KernelExited) and killed.reason == "The kernel was killed by signal 9."
    ended = parse_event(b'{"event": "kernel.exited", "pid": 7, "signal": 9, "out_of_memory": true}')
    assert isinstance(ended, KernelExited) and ended.reason == "The kernel ran out of memory."
