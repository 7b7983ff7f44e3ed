"""Notebook identity: who opens a notebook's path again gets the kernel that was left behind with it."""

from __future__ import annotations

from tests.gateways import RunningGateway
from tests.state.sandboxes import Api, Notebook, value_of
from tests.unit.gateway.client import let_pass, stream_text, waits_for

KERNEL = {"name": "python3", "env": {"JPY_SESSION_NAME": "work/analysis.ipynb"}}


async def test_a_kernel_of_the_same_notebook_is_the_one_left_behind(state_gateway: RunningGateway, api: Api) -> None:
    first = (await api.call("POST", "/api/kernels", KERNEL, status=201))["id"]
    await value_of(state_gateway, first, "df = [1, 2, 3]")
    await api.call("DELETE", f"/api/kernels/{first}", status=204)
    assert (await api.sandbox(first))["released"] is True
    other = (await api.call("POST", "/api/kernels", {"env": {"JPY_SESSION_NAME": "other.ipynb"}}, status=201))["id"]
    again = (await api.call("POST", "/api/kernels", KERNEL, status=201))["id"]
    assert again == first
    assert other != first
    assert await value_of(state_gateway, again, "df") == [1, 2, 3]
    assert (await api.sandbox(first))["released"] is False
    # While it is in use, a second kernel of the same path is another one.
    second = (await api.call("POST", "/api/kernels", KERNEL, status=201))["id"]
    assert second != first
    for each in (first, second, other):
        await api.delete(each)
    fresh = (await api.call("POST", "/api/kernels", KERNEL, status=201))["id"]
    assert fresh not in (first, second), "the sandbox API's delete is real"
    await api.delete(fresh)


async def test_the_same_through_sessions(state_gateway: RunningGateway, api: Api) -> None:
    request = {"path": "work/b.ipynb", "type": "notebook", "name": "b", "kernel": {"name": "python3"}}
    session = await api.call("POST", "/api/sessions", request, status=201)
    kernel_id = session["kernel"]["id"]
    assert await value_of(state_gateway, kernel_id, "x = 'still here'; x") == "still here"
    await api.call("DELETE", f"/api/sessions/{session['id']}", status=204)
    again = await api.call("POST", "/api/sessions", request, status=201)
    assert again["kernel"]["id"] == kernel_id
    assert await value_of(state_gateway, kernel_id, "x") == "still here"
    await api.delete(kernel_id)


async def test_output_that_came_while_nobody_was_connected(state_gateway: RunningGateway, api: Api) -> None:
    path = {"env": {"JPY_SESSION_NAME": "late.ipynb"}}
    kernel_id = (await api.call("POST", "/api/kernels", path, status=201))["id"]
    async with Notebook.open(state_gateway, kernel_id) as notebook:
        cell = ("print(0, flush=True)", waits_for("first"), "for i in range(1, 4): print(i, flush=True)")
        rest = (waits_for("second"), "for i in range(4, 8): print(i, flush=True)")
        await notebook.client.execute("\n".join((*cell, *rest)))
        seen = await notebook.client.until("stream")
    await let_pass(state_gateway, kernel_id, "first")
    await api.call("DELETE", f"/api/kernels/{kernel_id}", status=204)
    again = (await api.call("POST", "/api/kernels", path, status=201))["id"]
    assert again == kernel_id
    await let_pass(state_gateway, kernel_id, "second")
    async with Notebook.open(state_gateway, kernel_id, session_id=notebook.client.session_id) as notebook:
        while "7" not in stream_text(seen):
            message = await notebook.client.receive()
            assert message is not None
            seen.append(message)
    assert stream_text(seen).split() == [str(i) for i in range(8)]
    await api.delete(kernel_id)
