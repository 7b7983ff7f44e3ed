"""The gateway dies or is stopped, a VMM dies: what goes on, what is found again, what clients are told, what stays."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.gateways import RunningGateway, start_gateway
from tests.state.all_kinds import CHECK, MAKE
from tests.state.conftest import QUIET
from tests.state.sandboxes import Api, Notebook, Traces, value_of, vmm_of, vmm_pids
from tests.unit.gateway.client import KernelClient, stream_text

# Machines of the pool are not the subject here; each would take a restart's time.
FLAGS = ("--pool-size", "0", *QUIET)
# By how much a guest's clock may differ from the host's.
CLOCKS_S = 0.5


@contextmanager
def ended(gateway: RunningGateway) -> Iterator[RunningGateway]:
    """Stops a gateway that the test has not ended."""
    try:
        yield gateway
    finally:
        if gateway.process.poll() is None:
            gateway.stop()


async def test_a_killed_gateway_s_cell_goes_on_and_nothing_is_left_of_it(state_dir: Path) -> None:
    first = start_gateway(state_dir, *FLAGS)
    traces = Traces(first.run_dir)
    sandbox_id = await Api(first).create()
    asleep_id = await Api(first).create(name="sleeper")
    async with Notebook.open(first, sandbox_id) as notebook:
        await notebook.run(MAKE)
        await value_of(first, asleep_id, "y = 5")
        await Api(first).do(asleep_id, "sleep")
        session = await Api(first).call(
            "POST",
            "/api/sessions",
            {"path": "a.ipynb", "type": "notebook", "name": "a", "kernel": {"id": sandbox_id}},
        )
        cell = (
            "times = []\nfor i in range(20):\n    print(i, flush=True)\n    times.append(time.time())\n"
            "    time.sleep(0.25)\nz = 'finished'"
        )
        msg_id = await notebook.client.execute(cell)
        seen = await notebook.client.until("stream")
        traces.note()
        machines = vmm_pids(first.run_dir)
        first.kill()
        killed_at = time.time()
        while await notebook.client.receive() is not None:
            pass
    with ended(start_gateway(state_dir, *FLAGS)) as second:
        assert vmm_pids(second.run_dir) == machines, "the same machine, adopted"
        assert {each["state"] for each in await Api(second).call("GET", "/api/sandboxes")} == {"running", "asleep"}
        assert [each["id"] for each in await Api(second).call("GET", "/api/sessions")] == [session["id"]]
        async with Notebook.open(second, sandbox_id, session_id=notebook.client.session_id) as again:
            seen += await again.rest(msg_id)
            lines = [int(line) for line in stream_text(seen).split()]
            # What was between kernel and gateway when this was killed has gone with it; their clocks differ by less.
            assert lines == sorted(set(lines))
            times = await again.value("times")
            assert {i for i in range(20) if times[i] > killed_at + CLOCKS_S} <= set(lines)
            assert await again.value("z") == "finished"
            await again.run(CHECK)
        assert await value_of(second, asleep_id, "y") == 5
        traces.note()
        second.stop()
        assert traces.left(state_dir) == []
    # A clean stop has put them to sleep, and the next gateway finds them.
    with ended(start_gateway(state_dir, *FLAGS)) as third:
        listed = {each["id"]: each["state"] for each in await Api(third).call("GET", "/api/sandboxes")}
        assert listed == {sandbox_id: "asleep", asleep_id: "asleep"}
        async with Notebook.open(third, sandbox_id) as notebook:
            assert await notebook.value("z, numbers, next(squares)") == ("finished", {"a": [1, 2, 3]}, 16)
        traces.note()
        for each in (sandbox_id, asleep_id):
            await Api(third).delete(each)
        third.stop()
        assert traces.left(state_dir) == []


async def test_a_cell_that_ends_while_no_gateway_runs(state_dir: Path) -> None:
    first = start_gateway(state_dir, *FLAGS)
    sandbox_id = await Api(first).create()
    client = await KernelClient.connect(first, sandbox_id)
    msg_id = await client.execute("import time\nprint('begun', flush=True)\ntime.sleep(4)\nprint('ended')\n6 * 7")
    await client.until("stream")
    first.kill()
    await client.close()
    await asyncio.sleep(5)  # the cell's end, of which nothing tells without a gateway
    with ended(start_gateway(state_dir, *FLAGS, "--no-stop-means-sleep")) as second:
        async with Notebook.open(second, sandbox_id, session_id=client.session_id) as again:
            rest = await again.rest(msg_id)
            assert stream_text(rest) == "ended\n"
            kinds = [message["header"]["msg_type"] for message in rest]
            assert "execute_result" in kinds
            assert await again.value("6 * 8") == 48


async def test_who_waits_for_a_child_outlasts_the_gateway(state_dir: Path) -> None:
    first = start_gateway(state_dir, *FLAGS)
    parent = await Api(first).create()
    cell = """
import os, sandbox, time
kid = sandbox.fork()
if kid is None:
    while not os.path.exists("/tmp/go"):
        time.sleep(0.1)
    sandbox.exit("the child's")
"""
    async with Notebook.open(first, parent) as notebook:
        await notebook.run(cell)
        msg_id = await notebook.client.execute("print('waits', flush=True)\nvalue = kid.result()")
        await notebook.client.until("stream")
        first.kill()
        while await notebook.client.receive() is not None:
            pass
    with ended(start_gateway(state_dir, *FLAGS)) as second:
        api = Api(second)
        (child,) = [each["id"] for each in await api.call("GET", "/api/sandboxes") if each["parent_id"] == parent]
        await api.do(child, "exec", {"command": "touch /tmp/go"})
        async with Notebook.open(second, parent, session_id=notebook.client.session_id) as again:
            await again.rest(msg_id)
            assert await again.value("value") == "the child's"


async def test_sigterm_in_a_cell_puts_it_to_sleep_and_it_goes_on(state_dir: Path) -> None:
    first = start_gateway(state_dir, *FLAGS)
    traces = Traces(first.run_dir)
    ids = [await Api(first).create() for _ in range(3)]
    for number, sandbox_id in enumerate(ids):
        await value_of(first, sandbox_id, f"number = {number}")
    client = await KernelClient.connect(first, ids[0])
    cell = "import time\nprint('begun', flush=True)\nfor i in range(20):\n    time.sleep(0.1)\ndone = 'all'"
    await client.execute(cell)
    await client.until("stream")
    traces.note()
    first.stop()
    await client.close()
    assert "asleep" in first.log.read_text().lower(), "progress"
    assert traces.left(state_dir) == []
    with ended(start_gateway(state_dir, *FLAGS, "--no-stop-means-sleep")) as second:
        assert {each["state"] for each in await Api(second).call("GET", "/api/sandboxes")} == {"asleep"}
        for number, sandbox_id in enumerate(ids):
            assert await value_of(second, sandbox_id, "number") == number
        assert await value_of(second, ids[0], "done") == "all"
        traces.note()
        second.stop()
        assert traces.left(state_dir) == []
        assert not list((state_dir / "snapshots/pins").glob("sandbox-*")), "this stop was a real end"


async def test_a_killed_vmm_falls_back_to_its_checkpoint_and_says_so(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 'kept'")
        await api.do(sandbox_id, "checkpoints", {"name": "good"}, status=201)
        await notebook.run("x = 'lost'")
        os.kill(vmm_of(state_gateway, sandbox_id), signal.SIGKILL)
        (*_, told) = await notebook.client.until("status", execution_state="restarting")
        assert "checkpoint of" in told["content"]["reason"]
        found = await api.sandbox(sandbox_id)
        assert found["state"] == "asleep"
        assert "checkpoint of" in found["reason"]
        assert await notebook.value("x") == "kept"
    await api.delete(sandbox_id)


async def test_a_killed_vmm_without_a_checkpoint_has_failed(state_gateway: RunningGateway, api: Api) -> None:
    sandbox_id = await api.create()
    async with Notebook.open(state_gateway, sandbox_id) as notebook:
        await notebook.run("x = 1")
        os.kill(vmm_of(state_gateway, sandbox_id), signal.SIGKILL)
        (*_, told) = await notebook.client.until("status", execution_state="dead")
        assert told["content"]["reason"]
        assert (await api.sandbox(sandbox_id))["state"] == "failed"
        await api.do(sandbox_id, "wake", status=502)
    await api.delete(sandbox_id)


async def test_vmms_that_die_with_the_gateway(state_dir: Path) -> None:
    """As after a reboot of the host: no process is left, but what was checkpointed is."""
    first = start_gateway(state_dir, *FLAGS)
    kept, lost = [await Api(first).create() for _ in range(2)]
    await value_of(first, kept, "x = 1")
    await Api(first).do(kept, "checkpoints", status=201)
    machines = vmm_pids(first.run_dir)
    first.kill()
    for pid in machines.values():
        os.kill(pid, signal.SIGKILL)
    with ended(start_gateway(state_dir, *FLAGS, "--no-stop-means-sleep")) as second:
        assert (await Api(second).sandbox(kept))["state"] == "asleep"
        assert "checkpoint of" in (await Api(second).sandbox(kept))["reason"]
        assert (await Api(second).sandbox(lost))["state"] == "failed"
        assert await value_of(second, kept, "x") == 1
        second.stop()
        traces = Traces(second.run_dir)
        assert traces.left(state_dir) == []


class SmallDisk:
    """A state directory on a file system with little room beside its template. The images stay where they are."""

    def __init__(self, state_dir: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root may mount a small tmpfs")
        self.directory = state_dir
        self._origin = state_dir.with_name(f"{state_dir.name}-origin")
        files = [path for path in (state_dir / "snapshots").rglob("*") if path.is_file()]
        self._used_kib = sum(path.stat().st_blocks for path in files) // 2

    def __enter__(self) -> SmallDisk:
        self.directory.rename(self._origin)
        self.directory.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={self._used_kib + (32 << 10)}k", "hypercell-test", self.directory)
        for name in ("templates", "snapshots", "accelerator.json"):
            _run("cp", "-a", "--sparse=always", self._origin / name, self.directory)
        (self.directory / "images").symlink_to(self._origin / "images")
        return self

    def grow(self) -> None:
        _run("mount", "-o", f"remount,size={self._used_kib + (300 << 10)}k", self.directory)

    def __exit__(self, *exc: object) -> None:
        _run("umount", self.directory)
        self.directory.rmdir()
        self._origin.rename(self.directory)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


async def test_a_full_disk_fails_the_snapshot_only(state_dir: Path) -> None:
    with SmallDisk(state_dir) as disk, ended(start_gateway(state_dir, *FLAGS, "--no-stop-means-sleep")) as gateway:
        api = Api(gateway)
        sandbox_id = await api.create()
        async with Notebook.open(gateway, sandbox_id) as notebook:
            await notebook.run("import os; x = os.urandom(64 << 20)")
            refused = await api.do(sandbox_id, "sleep", status=502)
            assert "No room left" in refused["message"], refused
            assert (await api.sandbox(sandbox_id))["state"] == "running"
            await api.do(sandbox_id, "checkpoints", {"name": "no room"}, status=502)
            assert not list((disk.directory / "snapshots/drafts").iterdir())
            assert await notebook.value("len(x)") == 64 << 20, "it runs on"
            # With room again it works, and nothing of what was written meanwhile is missing.
            disk.grow()
            await notebook.run("import hashlib; digest = hashlib.sha256(x).hexdigest()")
            await api.do(sandbox_id, "sleep")
            assert await notebook.value("hashlib.sha256(x).hexdigest() == digest") is True


async def test_a_paused_machine_is_found_again_as_it_was(state_dir: Path) -> None:
    """So is one whose gateway was killed in the pause of a snapshot: to the next gateway they look the same."""
    first = start_gateway(state_dir, *FLAGS)
    sandbox_id = await Api(first).create()
    await value_of(first, sandbox_id, "x = 'unsaved'")
    await Api(first).do(sandbox_id, "pause")
    machines = vmm_pids(first.run_dir)
    first.kill()
    with ended(start_gateway(state_dir, *FLAGS)) as second:
        assert vmm_pids(second.run_dir) == machines
        assert (await Api(second).sandbox(sandbox_id))["state"] == "paused"
        await Api(second).do(sandbox_id, "resume")
        assert await value_of(second, sandbox_id, "x") == "unsaved"
        await Api(second).delete(sandbox_id)


async def test_a_broken_checkpoint_fails_its_sandbox_and_no_other(state_dir: Path) -> None:
    first = start_gateway(state_dir, *FLAGS)
    broken, whole = await Api(first).create(), await Api(first).create()
    for sandbox_id in (broken, whole):
        await value_of(first, sandbox_id, "x = 1")
        await Api(first).do(sandbox_id, "checkpoints", status=201)
    manifest = (await Api(first).sandbox(broken))["snapshot_id"]
    pids = vmm_pids(first.run_dir).values()
    first.kill()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    (state_dir / f"snapshots/manifests/{manifest}.json").unlink()
    with ended(start_gateway(state_dir, *FLAGS)) as second:
        failed = await Api(second).sandbox(broken)
        assert (failed["state"], "checkpoint cannot be used" in failed["reason"]) == ("failed", True), failed
        assert await value_of(second, whole, "x") == 1
        for sandbox_id in (broken, whole):
            await Api(second).delete(sandbox_id)


async def test_what_a_child_stood_on_goes_with_it_also_after_its_parent(state_dir: Path) -> None:
    with ended(start_gateway(state_dir, *FLAGS)) as gateway:
        parent = await Api(gateway).create()
        await value_of(gateway, parent, "x = 1")
        (child,) = (await Api(gateway).do(parent, "fork"))["children"]
        await Api(gateway).delete(parent)
        assert await value_of(gateway, child["id"], "x") == 1
        await Api(gateway).delete(child["id"])
        assert {each["owner"] for each in await Api(gateway).call("GET", "/api/snapshots")} == {"template"}
