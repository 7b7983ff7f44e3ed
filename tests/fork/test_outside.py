"""Forks over REST: of running, sleeping and restored sandboxes, their limits, failures and family."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from tests.fork.conftest import MAX_CHILDREN, MAX_DEPTH
from tests.gateways import RunningGateway
from tests.state.all_kinds import CHECK, MAKE
from tests.state.sandboxes import Api, Notebook, eventually, value_of, vmm_of, vmm_pids
from tests.unit.gateway.client import KernelClient, let_pass, stream_text


async def fork(api: Api, sandbox_id: str, count: int = 1, **fields: object) -> list[dict[str, Any]]:
    """The children; all of them must have been made."""
    children: list[dict[str, Any]] = (await api.do(sandbox_id, "fork", {"count": count, **fields}))["children"]
    assert all("error" not in child for child in children), children
    assert [child["index"] for child in children] == list(range(count))
    return children


async def end(api: Api, *ids: str) -> None:
    await asyncio.gather(*(api.delete(each) for each in ids))


async def test_a_child_has_all_state_and_shares_nothing_further(fork_gateway: RunningGateway, api: Api) -> None:
    parent = await api.create(name="origin")
    async with Notebook.open(fork_gateway, parent) as notebook:
        await notebook.run(MAKE)
        one, two = await fork(api, parent, 2)
        assert (one["parent_id"], one["state"], one["name"]) == (parent, "running", "origin")
        write = "numbers['a'] = '{0}'; _ = open('/tmp/common.txt', 'w').write('{0}'); numbers['a']"
        names = {parent: "parent", one["id"]: "one", two["id"]: "two"}
        async with Notebook.open(fork_gateway, one["id"]) as first:
            await first.run(CHECK)
            await asyncio.gather(
                notebook.value(write.format("parent")),
                first.value(write.format("one")),
                value_of(fork_gateway, two["id"], write.format("two")),
            )
            for sandbox_id, name in names.items():
                found = await value_of(fork_gateway, sandbox_id, "numbers['a'], open('/tmp/common.txt').read()")
                assert found == (name, name)
            # All that was there before the fork is still the parent's own, too.
            assert await notebook.value("next(squares)") == 9
            assert await first.value("next(squares)") == 16
        tree = await api.call("GET", f"/api/sandboxes/{two['id']}/tree")
        assert tree["root"] == parent
        assert [node["id"] for node in tree["nodes"]] == [parent, one["id"], two["id"]]
    await end(api, parent, one["id"], two["id"])


async def test_a_fork_is_never_captured_in_a_cell_that_begins_just_then(fork_gateway: RunningGateway, api: Api) -> None:
    parent = await api.create()
    async with Notebook.open(fork_gateway, parent) as notebook:
        await notebook.run("x = 0")
        for delay_s in (0.0, 0.02, 0.05, 0.1):  # the cell begins at different moments of the fork
            before, cell = await notebook.value("x, get_ipython().execution_count - 1")
            forking = asyncio.create_task(fork(api, parent))
            await asyncio.sleep(delay_s)
            await notebook.run("import time\nfor i in range(100):\n    x += 1; time.sleep(0.01)")
            (child,) = await forking
            # A child that was captured in the cell would run the rest of it.
            checkpoint = (await api.call("GET", f"/api/sandboxes/{parent}/checkpoints"))[-1]
            expected = {cell: before, cell + 1: before + 100}[checkpoint["cell"]]
            assert await value_of(fork_gateway, child["id"], "x") == expected
            await end(api, child["id"])
    await end(api, parent)


async def test_sleeping_and_restored_sandboxes_are_forked(fork_gateway: RunningGateway, api: Api) -> None:
    parent = await api.create()
    await value_of(fork_gateway, parent, "x = [1]")
    await api.do(parent, "sleep")
    (asleep,) = await fork(api, parent)
    assert (await api.sandbox(parent))["state"] == "asleep", "it stays asleep"
    assert await value_of(fork_gateway, asleep["id"], "x.append(2); x") == [1, 2]
    await api.do(parent, "wake")
    (restored,) = await fork(api, parent)
    await value_of(fork_gateway, parent, "x.append(3)")
    assert await value_of(fork_gateway, restored["id"], "x") == [1]
    # A child sleeps and wakes as any sandbox.
    await value_of(fork_gateway, restored["id"], "x.append(4)")
    await api.do(restored["id"], "sleep")
    assert await value_of(fork_gateway, restored["id"], "x") == [1, 4]
    assert await value_of(fork_gateway, parent, "x") == [1, 3]
    await end(api, parent, asleep["id"], restored["id"])


async def test_generations_to_the_limit_and_parents_that_go_first(fork_gateway: RunningGateway, api: Api) -> None:
    line = [await api.create()]
    await value_of(fork_gateway, line[0], "line = [0]")
    for generation in range(1, MAX_DEPTH + 1):
        (child,) = await fork(api, line[-1])
        line.append(child["id"])
        await value_of(fork_gateway, child["id"], f"line.append({generation})")
    refused = await api.do(line[-1], "fork", status=403)
    assert "max_depth" in refused["message"]
    tree = await api.call("GET", f"/api/sandboxes/{line[0]}/tree")
    assert [node["id"] for node in tree["nodes"]] == line
    assert [node["parent_id"] for node in tree["nodes"]] == [None, *line[:-1]]
    # The oldest two are ended while the others live, which then sleep and wake on what they share with them.
    await end(api, *line[:2])
    for generation in range(2, MAX_DEPTH + 1):
        await api.do(line[generation], "sleep")
        assert await value_of(fork_gateway, line[generation], "line") == list(range(generation + 1))
    tree = await api.call("GET", f"/api/sandboxes/{line[-1]}/tree")
    assert [node["id"] for node in tree["nodes"]] == line[2:]
    await api.call("DELETE", f"/api/sandboxes/{line[2]}?descendants=true", status=204)
    assert not set(line) & {each["id"] for each in await api.call("GET", "/api/sandboxes")}


async def test_more_children_than_allowed_are_refused_before_the_first(fork_gateway: RunningGateway, api: Api) -> None:
    parent = await api.create()
    machines = vmm_pids(fork_gateway.run_dir)
    refused = await api.do(parent, "fork", {"count": MAX_CHILDREN + 1}, status=403)
    assert "max_children" in refused["message"]
    (child,) = await fork(api, parent)
    await api.do(parent, "fork", {"count": MAX_CHILDREN}, status=403)
    await api.do(parent, "fork", {"count": 0}, status=400)
    assert len(vmm_pids(fork_gateway.run_dir)) == len(machines) + 1
    await end(api, child["id"], parent)
    await api.do(parent, "fork", status=404)


async def test_a_fork_between_cells_waits_and_one_in_mid_cell_does_not(fork_gateway: RunningGateway, api: Api) -> None:
    parent = await api.create()
    client = await KernelClient.connect(fork_gateway, parent)
    notebook = Notebook(client)
    cell = (
        "import itertools, os, time\nfor end in itertools.count():\n    print(end, flush=True)\n    time.sleep(0.05)\n"
        "    if os.path.exists('/tmp/go'): break"
    )
    msg_id = await client.execute(cell)
    seen = await client.until("stream")
    behind = await client.execute("end = 'the next cell, which was asked of the parent'")
    (middle,) = await fork(api, parent, mid_cell=True)
    assert (await api.sandbox(parent))["execution_state"] == "busy"
    forking = asyncio.create_task(fork(api, parent))
    for each in (middle["id"], parent):
        await let_pass(fork_gateway, each, "go")
    (after,) = await forking
    assert (await api.sandbox(parent))["execution_state"] == "idle"
    seen += await notebook.rest(msg_id)
    lines = [int(line) for line in stream_text(seen).split()]
    assert lines == list(range(len(lines))), "the parent's output has no gap and nothing twice"
    assert type(await value_of(fork_gateway, middle["id"], "end")) is int, "the child's cell goes on to its end"
    await notebook.rest(behind)
    assert type(await value_of(fork_gateway, parent, "end")) is str
    await client.close()
    await end(api, parent, middle["id"], after["id"])


async def test_a_child_that_dies_does_not_harm_its_siblings(fork_gateway: RunningGateway, api: Api) -> None:
    parent = await api.create()
    await value_of(fork_gateway, parent, "x = 1")
    one, two, three = await fork(api, parent, 3)
    os.kill(vmm_of(fork_gateway, two["id"]), signal.SIGKILL)
    # As any sandbox it has what it was made from as its checkpoint.
    await api.until_state(two["id"], "asleep")
    for child in (one, three, two):
        assert await value_of(fork_gateway, child["id"], "x") == 1
    await end(api, one["id"], two["id"], three["id"], parent)


async def test_a_child_that_cannot_be_made_is_told_in_its_place(fork_gateway: RunningGateway, api: Api) -> None:
    """One VMM of the new ones is killed as soon as it is seen; whichever it is, the others are made."""
    parent = await api.create()
    await value_of(fork_gateway, parent, "x = 1")
    before = vmm_pids(fork_gateway.run_dir)
    forking = asyncio.create_task(api.do(parent, "fork", {"count": 4}))
    await eventually(lambda: vmm_pids(fork_gateway.run_dir).keys() - before.keys(), look_s=0.005)
    (pid, *_) = set(vmm_pids(fork_gateway.run_dir).values()) - set(before.values())
    os.kill(pid, signal.SIGKILL)
    children = (await forking)["children"]
    made = [child for child in children if "error" not in child]
    failed = [child for child in children if "error" in child]
    # Killed after it had been handed out it is a sandbox that fell back to its checkpoint.
    assert len(children) == 4
    assert len(failed) <= 1
    for child in failed:
        assert child["error"]["message"]
    for child in made:
        assert await value_of(fork_gateway, child["id"], "x") == 1
    assert await value_of(fork_gateway, parent, "x") == 1
    listed = {each["id"] for each in await api.call("GET", "/api/sandboxes") if each["parent_id"] == parent}
    assert {child["id"] for child in made} == listed
    await end(api, parent, *(child["id"] for child in made))


async def test_parent_and_children_fork_at_the_same_time(fork_gateway: RunningGateway, api: Api) -> None:
    parent = await api.create()
    await value_of(fork_gateway, parent, "x = 1")
    one, two = await fork(api, parent, 2)
    families = await asyncio.gather(*(fork(api, each, 2) for each in (parent, one["id"], two["id"])))
    made = [child["id"] for family in families for child in family]
    assert await asyncio.gather(*(value_of(fork_gateway, each, "x") for each in made)) == [1] * 6
    tree = await api.call("GET", f"/api/sandboxes/{made[-1]}/tree")
    assert {node["id"] for node in tree["nodes"]} == {parent, one["id"], two["id"], *made}
    await end(api, parent, one["id"], two["id"], *made)
