"""Sandboxes come, fork, sleep, go back and go; none is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from hypercell import AsyncSandbox, NotFoundError, Sandbox, SandboxEvent, StateError
from tests.gateways import RunningGateway


def test_with_kills_what_it_made_and_leaves_what_it_found(at_gateway: RunningGateway) -> None:
    with Sandbox.create(name="mine", env={"WORD": "hello"}, memory_mib=1024) as made:
        assert made.run_code("import os; os.environ['WORD']").text == "'hello'"
        assert made.info().name == "mine"
        with Sandbox.connect(made.id) as found:
            assert found.run_code("1").text == "1"
        assert made.id in {info.id for info in Sandbox.list()}
        assert made.info().state == "running"
    assert made.id not in {info.id for info in Sandbox.list()}
    made.kill()


def test_sleep_at_the_end_of_its_time_and_tags(at_gateway: RunningGateway) -> None:
    tags = {"of": "test_sandbox_life", "what": "time"}
    with Sandbox.create(timeout_s=600, on_timeout="sleep", tags=tags, checkpoints="off") as sandbox:
        sandbox.run_code("value = 'kept'")
        sandbox.set_timeout(1)
        deadline = time.monotonic() + 60
        while sandbox.info().state != "asleep":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert sandbox.run_code("value").text == "'kept'"
        info = sandbox.info()
        assert (info.max_lifetime_s, info.on_timeout, info.tags) == (None, "sleep", tags)
        assert [found.id for found in Sandbox.list(tags={"of": "test_sandbox_life", "what": None})] == [sandbox.id]
        assert Sandbox.list(tags=tags, states=["asleep"]) == Sandbox.list(tags=tags, after=info) == []
        assert sandbox.set_tags({"of": "another"}).tags == {"of": "another"}
        (child,) = sandbox.fork()
        with child:
            assert [found.id for found in Sandbox.list(tags={"of": "another"}, limit=1)] == [sandbox.id]
            assert [found.id for found in Sandbox.list(tags={"of": "another"}, after=info)] == [child.id]


def test_fork_and_tree(sandbox: Sandbox) -> None:
    sandbox.run_code("value = [0]")
    children = sandbox.fork(2, name="child")
    try:
        for number, child in enumerate(children, start=1):
            assert child.run_code(f"value.append({number}); value").text == f"[0, {number}]"
        assert sandbox.run_code("value").text == "[0]"
        tree = sandbox.tree()
        assert tree.root == sandbox.id
        assert {info.id for info in tree.children(sandbox.id)} == {child.id for child in children}
        assert {info.name for info in tree.children(sandbox.id)} == {"child"}
    finally:
        for child in children:
            child.kill()


def test_sleep_wake_pause_resume(sandbox: Sandbox) -> None:
    sandbox.run_code("kept = 'yes'")
    assert sandbox.sleep().state == "asleep"
    assert sandbox.wake().state == "running"
    assert sandbox.run_code("kept").text == "'yes'"
    assert sandbox.sleep().state == "asleep"
    # Using it wakes it.
    assert sandbox.run_code("kept").text == "'yes'"
    assert sandbox.pause().state == "paused"
    assert sandbox.metrics().guest is None
    assert sandbox.resume().state == "running"
    metrics, info = sandbox.metrics(), sandbox.info()
    assert metrics.memory_unique_bytes > 0
    assert metrics.guest is not None and metrics.guest.cpu_used_ms > 0
    assert 0 < metrics.guest.memory_used_bytes < metrics.guest.memory_total_bytes <= info.memory_mib << 20
    assert 0 < metrics.guest.disk_used_bytes < metrics.guest.disk_total_bytes <= info.disk_mib << 20


def test_snapshots_and_time_travel(at_gateway: RunningGateway) -> None:
    with Sandbox.create(checkpoints="off") as sandbox:
        sandbox.run_code("value = 'then'")
        made = sandbox.create_snapshot("base-for-test")
        with pytest.raises(StateError, match="base-for-test"):
            sandbox.create_snapshot("base-for-test")
        sandbox.run_code("value = 'now'")
        with Sandbox.create(snapshot=made.id) as other:
            assert other.run_code("value").text == "'then'"
        assert made.id in {checkpoint.id for checkpoint in sandbox.checkpoints()}
        sandbox.goto("base-for-test")
        assert sandbox.run_code("value").text == "'then'"
        assert made.id in {snapshot.id for snapshot in Sandbox.snapshots()}
        with pytest.raises(NotFoundError):
            sandbox.goto("no-such-checkpoint")
        with pytest.raises(StateError, match="is needed by"):
            Sandbox.delete_snapshot(made.id)
    Sandbox.delete_snapshot(made.id)
    assert made.id not in {snapshot.id for snapshot in Sandbox.snapshots()}
    with pytest.raises(NotFoundError):
        Sandbox.delete_snapshot(made.id)


def test_undo_takes_back_the_last_cell(at_gateway: RunningGateway) -> None:
    with Sandbox.create(checkpoints="cell") as sandbox:
        sandbox.run_code("value = 'there'")
        deadline = time.monotonic() + 60
        while not sandbox.checkpoints():
            assert time.monotonic() < deadline, "no checkpoint after the cell"
            time.sleep(0.1)
        sandbox.run_code("del value")
        assert sandbox.undo().state == "running"
        assert sandbox.run_code("value").text == "'there'"
    with Sandbox.create(checkpoints="off") as other, pytest.raises(NotFoundError):
        other.undo()


def test_limits_of_time(sandbox: Sandbox) -> None:
    lifetime_s = sandbox.set_timeout(3000).max_lifetime_s
    assert lifetime_s is not None and lifetime_s >= 3000
    assert sandbox.set_timeout(None).max_lifetime_s is None
    assert sandbox.set_idle_timeout(77).idle_timeout_s == 77
    assert sandbox.set_checkpoints("off").checkpoints == "off"
    assert sandbox.rename("other").name == "other"


def test_a_sandbox_ends_by_its_timeout(at_gateway: RunningGateway) -> None:
    sandbox = Sandbox.create(timeout_s=5)
    deadline = time.monotonic() + 120
    while sandbox.id in {info.id for info in Sandbox.list()}:
        assert time.monotonic() < deadline, "it outlived its timeout"
        time.sleep(0.5)
    with pytest.raises(NotFoundError):
        sandbox.run_code("1")
    sandbox.close()


def test_a_killed_program_leaves_none_for_longer_than_its_timeout(at_gateway: RunningGateway) -> None:
    program = (
        "from hypercell import Sandbox; import time; print(Sandbox.create(timeout_s=8).id, flush=True); time.sleep(99)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    with process:
        sandbox_id = process.stdout.readline().strip()
        process.send_signal(signal.SIGKILL)
    assert sandbox_id
    deadline = time.monotonic() + 120
    while sandbox_id in {info.id for info in Sandbox.list()}:
        assert time.monotonic() < deadline, "it was left behind"
        time.sleep(0.5)


def test_a_program_killed_while_it_makes_fifty_leaves_none(at_gateway: RunningGateway) -> None:
    program = (
        "import asyncio\nfrom hypercell import AsyncSandbox\n"
        "async def one(number):\n"
        "    async with await AsyncSandbox.create(name='of-fifty', checkpoints='off', timeout_s=60) as sandbox:\n"
        "        await sandbox.run_code('1')\n"
        "        print(number, flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "async def all():\n"
        "    await asyncio.gather(*(one(number) for number in range(50)))\n"
        "asyncio.run(all())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    with process:
        for _ in range(5):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert any(info.name == "of-fifty" for info in Sandbox.list())
    deadline = time.monotonic() + 200
    while left := [info for info in Sandbox.list() if info.name == "of-fifty"]:
        assert time.monotonic() < deadline, f"{len(left)} were left behind"
        time.sleep(0.5)


async def test_events(at_gateway: RunningGateway) -> None:
    async with await AsyncSandbox.create(checkpoints="off") as sandbox:
        seen: list[SandboxEvent] = []

        async def follow() -> None:
            async for event in sandbox.events():
                seen.append(event)

        following = asyncio.create_task(follow())
        while not seen:
            await sandbox.run_code("1")
        other = await AsyncSandbox.connect(sandbox.id)
        await other.kill()
        await asyncio.wait_for(following, 60)
        assert {"execution_state", "deleted"} <= {event.kind for event in seen}


async def test_several_at_once_through_one_program(at_gateway: RunningGateway) -> None:
    async def one(number: int) -> str | None:
        async with await AsyncSandbox.create(checkpoints="off", timeout_s=600) as sandbox:
            return (await sandbox.run_code(f"{number} * 2")).text

    assert await asyncio.gather(*(one(number) for number in range(4))) == ["0", "2", "4", "6"]


def test_what_a_state_forbids_is_said(sandbox: Sandbox) -> None:
    sandbox.sleep()
    with pytest.raises(StateError, match="asleep"):
        sandbox.pause()
    sandbox.wake()
