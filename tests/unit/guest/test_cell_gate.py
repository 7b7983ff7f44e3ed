"""The moment between two cells: who waits for whom, and what a restored state does with cells that waited."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient

from tests.unit.guest.conftest import KEY, Host, client, run, waits_for
from vm_runtime.guest.cell_gate import UNASKED_S, CellGate
from vm_runtime.wire.errors import OpenRejectedError

# Longer than a kernel waits unasked, so that only `hold` can be the reason.
LONGER_S = 2 * UNASKED_S


async def start(host: Host) -> None:
    await host.call("kernel.start", key=KEY, env={}, cwd="/tmp")


async def reply_to(jupyter: AsyncKernelClient, msg_id: str, *, limit_s: float = 30) -> dict[str, Any]:
    """The content of the reply to a request. Raises TimeoutError."""
    async with asyncio.timeout(limit_s):
        while True:
            message = await jupyter.get_shell_msg()
            if message["parent_header"].get("msg_id") == msg_id:
                content: dict[str, Any] = message["content"]
                return content


async def unanswered(host: Host, *, count: int) -> list[Any]:
    """The requests that wait in the kernel for an answer, once there are so many."""
    while len(found := (await host.call("kernel.hold", limit_s=0.0, unanswered=True))["unanswered"]) < count:
        pass
    return list(found)


async def test_the_next_cell_waits_while_it_is_held(host: Host) -> None:
    await start(host)
    async with client(host) as jupyter:
        await run(jupyter, "x = 1")
        assert await host.call("kernel.hold", limit_s=5.0) == {"held": True, "execution_count": 1}
        waiting = jupyter.execute("x = 2")
        with pytest.raises(TimeoutError):
            await reply_to(jupyter, waiting, limit_s=LONGER_S)
        # It has not begun, so it can still be held.
        assert await host.call("kernel.hold", limit_s=0.0) == {"held": True, "execution_count": 1}
        await host.call("kernel.release", waits=True)
        assert (await reply_to(jupyter, waiting))["status"] == "ok"
        assert (await run(jupyter, "print(x)"))[0] == "2\n"


async def test_what_answers_a_failed_cell_s_reply_runs_and_what_waited_behind_it_does_not(host: Host) -> None:
    await start(host)
    async with client(host) as jupyter:
        await host.call("kernel.release", waits=False)
        for number in range(50):
            go = host.paths.home / f"go {number}"
            # What is sent in time waits behind it: the kernel takes it in within the rest of the cell.
            failing = jupyter.execute(f"{waits_for(go)}time.sleep(0.05); 1 / 0")
            behind = jupyter.execute("x = 'behind'")
            go.touch()
            assert (await reply_to(jupyter, failing))["status"] == "error"
            answer = jupyter.execute("x = 'answer'")
            assert (await reply_to(jupyter, behind))["status"] == "aborted"
            assert (await reply_to(jupyter, answer))["status"] == "ok"
            kept = jupyter.execute("1 / 0", stop_on_error=False)
            behind = jupyter.execute("x = 'goes on'")
            assert (await reply_to(jupyter, kept))["status"] == "error"
            assert (await reply_to(jupyter, behind))["status"] == "ok"


async def test_a_kernel_that_hears_nothing_goes_on(host: Host) -> None:
    await start(host)
    async with client(host) as jupyter:
        for _ in range(2):
            assert (await run(jupyter, "x = 1"))[1]["status"] == "ok"
        await host.call("kernel.hold", limit_s=LONGER_S)
        assert (await run(jupyter, "x = 2"))[1]["status"] == "ok"


async def test_a_cell_that_runs_cannot_be_held(host: Host) -> None:
    await start(host)
    async with client(host) as jupyter:
        running = jupyter.execute("import time\nwhile not globals().get('enough'): time.sleep(0.01)")
        await host.wait_event(b'"busy"')
        assert await host.call("kernel.hold", limit_s=5.0) == {"held": False, "execution_count": 0}
        await host.call("kernel.interrupt")
        assert (await reply_to(jupyter, running))["status"] == "error"
        # But the one behind it can: it must not begin in a copy of this state before that has been greeted.
        behind = jupyter.execute("x = 1")
        with pytest.raises(TimeoutError):
            await reply_to(jupyter, behind, limit_s=LONGER_S)
        await host.hello()
        assert (await reply_to(jupyter, behind))["status"] == "ok"


async def test_the_host_is_told_whether_the_next_cell_waits_for_it(host: Host) -> None:
    await start(host)
    async with client(host) as jupyter:
        await run(jupyter, "1")
        assert b'"next_waits": true' in await host.wait_event(b'"execution_count": 1')
        await host.call("kernel.release", waits=False)
        await run(jupyter, "2")
        assert b'"next_waits": false' in await host.wait_event(b'"execution_count": 2')


@pytest.mark.parametrize("drop", [True, False])
async def test_cells_that_wait_in_a_restored_state_run_or_not(host: Host, drop: bool) -> None:
    await start(host)
    async with client(host) as jupyter:
        await run(jupyter, "x = []")
        await host.call("kernel.hold", limit_s=5.0)
        asked = [jupyter.execute(f"x.append({number})") for number in range(3)]
        with pytest.raises(TimeoutError):  # the first waits in the kernel, the others behind it
            await reply_to(jupyter, asked[0], limit_s=LONGER_S)
        await host.hello(restored=True, extra={"drop_requests": drop})
        statuses = [(await reply_to(jupyter, msg_id))["status"] for msg_id in asked]
        assert statuses == (["aborted"] * 3 if drop else ["ok"] * 3)
        assert (await run(jupyter, "print(x)"))[0] == ("[]\n" if drop else "[0, 1, 2]\n")


async def test_cells_behind_a_running_one_are_dropped_and_it_goes_on(host: Host, tmp_path: Path) -> None:
    await start(host)
    async with client(host) as jupyter:
        go = tmp_path / "go"
        running = jupyter.execute(
            f"import time, os\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\nx = 'whole'"
        )
        await host.wait_event(b'"busy"')
        behind = jupyter.execute("x = 'behind'")
        await unanswered(host, count=2)
        await host.hello(restored=True, extra={"drop_requests": True})
        later = jupyter.execute("assert x == 'whole'")
        go.touch()
        assert (await reply_to(jupyter, running))["status"] == "ok"
        assert (await reply_to(jupyter, behind))["status"] == "aborted"
        assert (await reply_to(jupyter, later))["status"] == "ok"


async def test_requests_without_an_answer_are_named_and_another_state_aborts_them(host: Host, tmp_path: Path) -> None:
    await start(host)
    async with client(host) as jupyter:
        go = tmp_path / "go"
        running = jupyter.execute(f"import time, os\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)")
        await host.wait_event(b'"busy"')
        waiting = jupyter.execute("x = 1")
        jupyter.kernel_info()
        found = await unanswered(host, count=2)
        assert [request["header"]["msg_id"] for request in found] == [running, waiting]
        go.touch()
        for msg_id in (running, waiting):
            assert (await reply_to(jupyter, msg_id))["status"] == "ok"
        while not (answer := await host.call("kernel.hold", limit_s=0.0, unanswered=True))["held"]:
            pass  # a reply comes before the end of its cell
        assert answer["unanswered"] == []
        # As if they had been asked of another state.
        await host.hello(restored=True, extra={"aborted": [*found, "nonsense", {"idents": 1}]})
        for msg_id in (running, waiting):
            assert (await reply_to(jupyter, msg_id))["status"] == "aborted"
        assert (await run(jupyter, "print(x)"))[0] == "1\n"


@pytest.mark.parametrize("params", [{}, {"limit_s": "long"}, {"limit_s": True}])
async def test_bad_holds_are_refused(host: Host, params: dict[str, Any]) -> None:
    await start(host)
    with pytest.raises(OpenRejectedError) as caught:
        await host.call("kernel.hold", **params)
    assert caught.value.code == "bad_params"


async def test_without_a_kernel_there_is_nothing_to_hold(host: Host) -> None:
    with pytest.raises(OpenRejectedError) as caught:
        await host.call("kernel.hold", limit_s=1.0)
    assert caught.value.code == "no_kernel"


def test_cells_of_subshells_run_beside_each_other() -> None:
    changes: list[tuple[bool, bool]] = []
    gate = CellGate(lambda busy, waits: changes.append((busy, waits)))
    assert gate.begin("first")
    assert gate.begin("beside"), "one that runs is not waited for"
    gate.end("first")
    assert not gate.hold(0.0)
    gate.end("beside")
    gate.end("beside")
    assert changes == [(True, True), (False, True)]
    assert gate.hold(5.0)
    began: list[bool] = []
    waiting = [threading.Thread(target=lambda name=name: began.append(gate.begin(name))) for name in ("a", "b")]
    for thread in waiting:
        thread.start()
    gate.greeted(drop=True)
    for thread in waiting:
        thread.join()
    assert gate.begin("later")
