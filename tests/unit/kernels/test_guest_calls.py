"""What a sandbox asks from inside: about itself and its descendants, of nobody else, and within bounds."""

from __future__ import annotations

import json
from typing import Any

from kernels.child_results import ChildResult
from kernels.models import Sandbox, SandboxState
from tests.unit.kernels.conftest import Service

ASK = """
import json
from vm_runtime.guest.sandbox import errors, host
try:
    reply = host.ask(**{arguments!r})
    print(json.dumps([reply.result, reply.value.decode()]))
except errors.HostError as error:
    print(json.dumps([error.code, str(error)]))
"""


async def ask(kernels: Service, sandbox_id: str, op: str, **params: Any) -> Any:
    """The result and value of an op, or the code and text of its error."""
    return json.loads(await kernels.run(sandbox_id, ASK.format(arguments={"op": op, **params})))


async def test_it_asks_about_itself_and_its_family(kernels: Service) -> None:
    parent, stranger = await kernels.new(name="box"), await kernels.new()
    (child,) = await kernels.forks.fork(parent, count=1)
    assert isinstance(child, Sandbox)
    info, _ = await ask(kernels, parent, "info")
    assert (info["id"], info["name"]) == (parent, "box")
    tree, _ = await ask(kernels, child.id, "tree")
    assert (tree["root"], [node["id"] for node in tree["nodes"]]) == (parent, [parent, child.id])
    # A child that is idle and has no result yet, and one that has.
    assert await ask(kernels, parent, "wait", timeout_s=0) == [{"id": child.id}, ""]
    assert await ask(kernels, parent, "result", id=child.id, timeout_s=0) == [{"state": "idle"}, ""]
    await kernels.forks.child_results.record(
        ChildResult(child_id=child.id, parent_id=parent, state="exited", status="ok"), b"v"
    )
    result, value = await ask(kernels, parent, "result", id=child.id)
    assert (result["state"], value) == ("exited", "v")
    for op, target in (("kill", parent), ("kill", stranger), ("result", stranger), ("become", parent)):
        code, _ = await ask(kernels, child.id, op, id=target)
        assert code == "unknown_sandbox", (op, target)
    assert await ask(kernels, parent, "kill", id=child.id[:8]) == [{}, ""]
    assert {sandbox.id for sandbox in kernels.registry.sandboxes()} == {parent, stranger}


async def test_what_it_asks_badly_is_refused(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    bad: list[tuple[str, dict[str, Any]]] = [
        ("goto", {}),
        ("goto", {"target": ""}),
        ("goto", {"target": "x" * 1000}),
        ("fork", {"n": True, "call_id": "c"}),
        ("wait", {"timeout_s": -1}),
        ("wait", {"ids": 1}),
    ]
    for op, params in bad:
        assert (await ask(kernels, sandbox_id, op, **params))[0] == "refused", (op, params)
    assert (await ask(kernels, sandbox_id, "nothing"))[0] == "unknown_op"
    assert len(kernels.registry.sandboxes()) == 1


async def test_it_goes_back_and_to_sleep(kernels: Service) -> None:
    sandbox_id = await kernels.new()
    await kernels.run(sandbox_id, "open('name', 'w').write('before')")
    snapshot, _ = await ask(kernels, sandbox_id, "snapshot", name="one")
    assert snapshot["name"] == "one"
    listed, _ = await ask(kernels, sandbox_id, "checkpoints")
    assert [each["name"] for each in listed["checkpoints"]] == ["one"]
    for op, params in (("restore", {"name": "one"}), ("goto", {"target": snapshot["id"]})):
        await kernels.run(sandbox_id, "open('name', 'w').write('after')")
        machine = kernels.machines.running(sandbox_id).saved.machine
        async with kernels.client(sandbox_id) as client:
            client.execute(ASK.format(arguments={"op": op, **params}))
            await machine.wait_dead()
        assert await kernels.run(sandbox_id, "print(open('name').read())") == "before\n"
    async with kernels.client(sandbox_id) as client:
        client.execute(ASK.format(arguments={"op": "sleep"}))
        await kernels.until(lambda: kernels.registry.get(sandbox_id).state is SandboxState.ASLEEP)
