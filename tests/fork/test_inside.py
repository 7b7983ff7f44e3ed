"""`sandbox.fork()` and the magics, in cells of kernels on real machines."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.fork.conftest import MAX_CHILDREN
from tests.gateways import RunningGateway
from tests.state.sandboxes import Api, Notebook, eventually, vmm_pids
from tests.unit.gateway.client import request, stream_text


@pytest.fixture
async def notebook(fork_gateway: RunningGateway, api: Api) -> AsyncIterator[Notebook]:
    """A parent of one's own; what is left of its family ends with it."""
    before = {each["id"] for each in await api.call("GET", "/api/sandboxes")}
    parent = await api.create()
    async with Notebook.open(fork_gateway, parent) as notebook:
        await notebook.run("import os, random, sandbox, threading, time")
        yield notebook
    for each in await api.call("GET", "/api/sandboxes"):
        if each["id"] not in before:
            # One that has just exited may be on its way out.
            await request(fork_gateway, "DELETE", f"/api/sandboxes/{each['id']}")


async def test_fork_returns_twice_and_results_come_back(
    notebook: Notebook, fork_gateway: RunningGateway, api: Api
) -> None:
    cell = """
x, squares = [1], (i * i for i in range(9))
next(squares)
me = (sandbox.id, os.uname().nodename)
kids = sandbox.fork(3)
if kids is None:
    x.append(sandbox.index)
    sandbox.exit({"index": sandbox.index, "parent": sandbox.parent_id == me[0], "new": sandbox.id != me[0],
                  "host": os.uname().nodename != me[1], "x": x, "square": next(squares)})
results = [kid.result(60) for kid in kids]
(results, x, next(squares), sandbox.id == me[0])
"""
    machines = len(vmm_pids(fork_gateway.run_dir))
    results, x, square, same = await notebook.value(cell)
    assert [each["index"] for each in results] == [0, 1, 2]
    for index, each in enumerate(results):
        assert (each["parent"], each["new"], each["host"]) == (True, True, True)
        assert (each["x"], each["square"]) == ([1, index], 1)
    assert (x, square, same) == ([1], 1, True)
    assert await notebook.value("[kid.result() for kid in kids] == results") is True
    await eventually(lambda: len(vmm_pids(fork_gateway.run_dir)) == machines)


async def test_threads_and_locks_go_on_in_parent_and_child(notebook: Notebook) -> None:
    cell = """
n, lock = 0, threading.Lock()
def count():
    global n
    while True:
        with lock: n += 1
        time.sleep(0.01)
threading.Thread(target=count, daemon=True).start()
child = sandbox.fork()
seen = n
while n < seen + 3: time.sleep(0.01)
if child is None: sandbox.exit(n > seen)
(child.result(60), n > seen)
"""
    assert await notebook.value(cell) == (True, True)


async def test_the_ways_in_which_a_child_ends(notebook: Notebook) -> None:
    cell = """
def outcome(child):
    try: return child.result(60)
    except sandbox.SandboxError as error: return type(error).__name__, str(error)
def ending(how):
    child = sandbox.fork(name=how)
    if child is not None: return outcome(child)
    if how == "raise": raise ValueError("of the child")
    if how == "exit": sandbox.exit(42)
    if how == "crash": os.kill(os.getpid(), 9)
    if how == "none": sandbox.exit()
"""
    await notebook.run(cell)
    assert await notebook.value("ending('exit')") == 42
    assert await notebook.value("ending('none')") is None
    name, text = await notebook.value("ending('raise')")
    assert name == "ChildFailedError"
    assert "ValueError: of the child" in text
    name, text = await notebook.value("ending('crash')")
    assert name in ("ChildCrashedError", "ChildUnfinishedError")
    assert await notebook.value("6 * 7") == 42, "the parent is none the worse"


async def test_wait_gives_the_first_and_kill_ends_the_rest(notebook: Notebook, api: Api) -> None:
    cell = """
kids = sandbox.fork(2)
if kids is None:
    time.sleep(0.1 if sandbox.index == 1 else 600)
    sandbox.exit(sandbox.index)
first = sandbox.wait(timeout=60)
value = first.result()
kids[0].kill()
try: kids[0].result(5)
except sandbox.ChildCrashedError as error: said = str(error)
(first.index, value, 'said' in globals())
"""
    assert await notebook.value(cell) == (1, 1, True)


async def test_limits_are_errors_in_the_cell(notebook: Notebook) -> None:
    assert "ForkError" in await notebook.error(f"sandbox.fork({MAX_CHILDREN + 1})")
    assert "ValueError" in await notebook.error("sandbox.fork(0)")
    assert "SandboxError" in await notebook.error("sandbox.exit(1)")


async def test_same_random(notebook: Notebook) -> None:
    cell = """
random.seed(5)
kids = sandbox.fork(2, same_random={0})
if kids is None: sandbox.exit((random.random(), os.urandom(8).hex()))
found = [kid.result(60) for kid in kids]
(len({{value for value, _ in found}}), len({{text for _, text in found}}))
"""
    assert await notebook.value(cell.format("True")) == (1, 2)
    assert await notebook.value(cell.format("False")) == (2, 2)


async def test_a_child_forks_too(notebook: Notebook) -> None:
    cell = """
def down(depth):
    if depth == 0: return [sandbox.id]
    child = sandbox.fork()
    if child is None:
        sandbox.exit([sandbox.parent_id, *down(depth - 1)])
    return child.result(120)
line = down(3)
(len(line), len(set(line)), line[0] == sandbox.id)
"""
    assert await notebook.value(cell) == (4, 4, True)


async def test_branch_shows_each_and_keeps_the_best(notebook: Notebook) -> None:
    await notebook.run("base = 10")
    shown = await notebook.displays("%%sandbox branch -n 3\nprint('branch', branch)\nscore = base * branch\nscore")
    text = shown[-1]["data"]["text/plain"]
    for index in range(3):
        assert f"branch {index}" in text
        assert str(10 * index) in text
    assert "NameError" in await notebook.error("score")
    await notebook.displays("%%sandbox branch -n 3 --keep best --by score\nscore = base * (branch == 1)")
    assert await notebook.value("score") == 10


async def test_try_takes_over_what_succeeds_only(notebook: Notebook, api: Api) -> None:
    await notebook.run("x = 1")
    ours = await notebook.value("sandbox.id")
    await notebook.client.run("%%sandbox try\nx = 2\nopen('/tmp/tried', 'w').write('x')\n1 / 0")
    assert await notebook.value("x, os.path.exists('/tmp/tried')") == (1, False)
    await notebook.client.run("%%sandbox try\nx = 3\nprint('inside')")
    assert await notebook.value("x, sandbox.id") == (3, ours)


async def test_who_goes_on_in_its_childs_state_has_the_childs_children(notebook: Notebook, api: Api) -> None:
    cell = """%%sandbox try
early = sandbox.fork()
if early is None:
    sandbox.exit("early")
sandbox.wait([early])
late = sandbox.fork(name="late")
if late is None:
    while not os.path.exists("/tmp/go"): time.sleep(0.01)
    sandbox.exit("late")
"""
    await notebook.client.run(cell)
    (late,) = [each["id"] for each in await api.call("GET", "/api/sandboxes") if each["name"] == "late"]
    await api.do(late, "exec", {"command": "touch /tmp/go"})
    assert await notebook.value("early.result(60), late.result(60)") == ("early", "late")


async def test_magics_tell_of_the_family(notebook: Notebook, api: Api) -> None:
    (forked,) = await notebook.displays("%sandbox fork 2 --name worker")
    assert "worker" in forked["data"]["text/html"]
    (tree,) = await notebook.displays("%sandbox tree")
    assert tree["data"]["text/plain"].count("worker") == 2
    children = [each for each in await api.call("GET", "/api/sandboxes") if each["name"] == "worker"]
    assert len(children) == 2
    await notebook.run(f"%sandbox kill {children[0]['id']}")
    left = [each["id"] for each in await api.call("GET", "/api/sandboxes") if each["name"] == "worker"]
    assert left == [children[1]["id"]]
    (info,) = await notebook.displays("%sandbox info")
    assert await notebook.value("sandbox.id") in info["data"]["text/plain"]


async def test_sleep_from_inside_goes_on_with_the_next_cell(notebook: Notebook, api: Api) -> None:
    ours = await notebook.value("y = 8; sandbox.id")
    await notebook.client.execute("%sandbox sleep")
    await api.until_state(ours, "asleep")
    assert await notebook.value("y") == 8


async def test_output_before_a_fork_is_shown_once(notebook: Notebook) -> None:
    cell = (
        "print('before')\nchild = sandbox.fork()\nprint('after')\nif child is None: sandbox.exit(1)\nchild.result(60)"
    )
    assert stream_text(await notebook.client.run(cell)).split() == ["before", "after"]
