"""`sandbox.fork` and its kin, with a real agent and kernel; a child is a new session that answers the pending call."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.guest.conftest import client, run, waits_for
from tests.unit.guest.sandbox_host import PARENT, SandboxHost, child_id, decoded, family, sandbox_host
from vm_runtime.guest.sandbox import values
from vm_runtime.guest.sandbox.errors import ValueRefusedError

host = pytest.fixture(sandbox_host)


async def test_the_parent_gets_a_handle(host: SandboxHost) -> None:
    host.script = family({0: values.encode({"answer": 42})})
    async with client(host) as jupyter:
        code = "import sandbox; c = sandbox.fork(name='a'); print(c.id, c.url, c.name, c.result(), sandbox.parent_id)"
        text, reply = await run(jupyter, code)
    assert reply["status"] == "ok"
    assert text.strip() == f"{child_id(0)} /lab/0 a {{'answer': 42}} None"


async def test_the_child_gets_none_and_knows_itself(host: SandboxHost) -> None:
    async with client(host) as jupyter:
        jupyter.execute(
            "import sandbox, tempfile, uuid, random; random.seed(1); tempfile.TemporaryDirectory().cleanup()\n"
            "before = get_ipython().history_manager.session_number\n"
            "child = sandbox.fork(3)\n"
            "try:\n    input()\nexcept EOFError as error:\n    asked = error\n"
            "after = get_ipython().history_manager.session_number"
        )
        call = await host.next_call("fork")
        assert (call.params["n"], call.params["name"], call.params["same_random"]) == (3, None, False)
        await host.become_child(call, index=2)
    async with client(host) as jupyter:
        code = "print(child, sandbox.index, sandbox.id, sandbox.parent_id, after - before, random.random(), asked)"
        text, _ = await run(jupyter, code)
    words = text.split()
    assert words[:5] == ["None", "2", child_id(2), PARENT, "1"]
    assert float(words[5]) != 0.13436424411240122  # what follows seed(1)
    assert "A forked child has no notebook" in text


async def test_same_random_is_the_hosts_to_keep(host: SandboxHost) -> None:
    async with client(host) as jupyter:
        jupyter.execute("import sandbox, random; random.seed(1); sandbox.fork(same_random=True); x = random.random()")
        call = await host.next_call("fork")
        assert call.params["same_random"] is True
        await host.become_child(call, keep_random=True)
    async with client(host) as jupyter:
        text, _ = await run(jupyter, "print(x)")
    assert float(text) == 0.13436424411240122


async def test_exit_hands_in_a_value_and_ends_the_cell_without_a_word(host: SandboxHost) -> None:
    async with client(host) as jupyter:
        jupyter.execute(
            "import sandbox; from vm_runtime.guest.sandbox import forking; forking.EXIT_LIMIT_S = 0.1\n"
            "went_on = False\n"
            "if sandbox.fork() is None:\n    try:\n        sandbox.exit([1, 2])\n    except Exception:\n        pass\n"
            "went_on = True"
        )
        await host.become_child(await host.next_call("fork"))
    call = await host.next_call("exit")
    assert decoded(await call.answer({})) == [1, 2]
    assert call.params["status"] == "ok"
    async with client(host) as jupyter:
        assert (await run(jupyter, "print(went_on)"))[0] == "False\n"


async def test_a_child_whose_cell_fails_ends_with_that_error(host: SandboxHost) -> None:
    async with client(host) as jupyter:
        jupyter.execute(
            "import sandbox; from vm_runtime.guest.sandbox import forking; forking.EXIT_LIMIT_S = 0.1\n"
            "if sandbox.fork() is None:\n    1 / 0"
        )
        await host.become_child(await host.next_call("fork"))
    call = await host.next_call("exit")
    failure = decoded(await call.answer({}))
    assert (call.params["status"], failure["ename"]) == ("error", "ZeroDivisionError")
    assert "1 / 0" in failure["traceback"]


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit", "ok"), ("import sys; sys.exit(3)", "error")])
async def test_sys_exit_ends_a_child(host: SandboxHost, code: str, status: str) -> None:
    async with client(host) as jupyter:
        jupyter.execute(
            "import sandbox; from vm_runtime.guest.sandbox import forking; forking.EXIT_LIMIT_S = 0.1\n"
            f"if sandbox.fork() is None:\n    {code}"
        )
        await host.become_child(await host.next_call("fork"))
    call = await host.next_call("exit")
    await call.answer({})
    assert call.params["status"] == status


async def test_results_that_there_are_not_raise_with_a_sentence(host: SandboxHost) -> None:
    host.script = family({0: None, 1: b"pnonsense"})
    async with client(host) as jupyter:
        code = (
            "import sandbox\na, b = sandbox.fork(2)\n"
            "for child in (a, b):\n    try:\n        child.result()\n    except sandbox.SandboxError as error:\n"
            "        print(type(error).__name__, error)\n"
        )
        text, _ = await run(jupyter, code)
        assert "ChildCrashedError The machine of the child ended." in text
        assert "ValueRefusedError The value cannot be read here" in text
        text, _ = await run(jupyter, "try:\n    sandbox.exit(1)\nexcept sandbox.SandboxError as error: print(error)")
        assert "nobody's child" in text
        text, _ = await run(jupyter, "try:\n    sandbox.info()\nexcept sandbox.HostError as error: print(error.code)")
        assert text == "unknown_op\n"


async def test_wait_returns_children_as_they_end(host: SandboxHost) -> None:
    host.script = family({1: values.encode("b"), 0: values.encode("a")})
    async with client(host) as jupyter:
        code = (
            "import sandbox; cs = sandbox.fork(2); print(sandbox.wait().index, sandbox.wait().result())\nsandbox.wait()"
        )
        text, reply = await run(jupyter, code)
    assert text == "1 a\n"
    assert "no child to wait for" in reply["evalue"]


async def test_one_failed_child_fails_not_its_siblings(host: SandboxHost) -> None:
    async def script(call: Any) -> None:
        full = {"error": {"code": "limit", "message": "No room for another."}}
        entries = [{"id": child_id(0), "index": 0, "url": None}, full]
        await call.answer({"children": entries if call.params["n"] == 2 else [full]})

    host.script = script
    async with client(host) as jupyter:
        code = "import sandbox; a, b = sandbox.fork(2); print(a.error, b.error, b.id)\nsandbox.fork()"
        text, reply = await run(jupyter, code)
    assert text == "None No room for another. None\n"
    assert (reply["ename"], reply["evalue"]) == ("ForkError", "No room for another.")


async def test_a_pending_call_that_a_new_session_does_not_name_is_interrupted(host: SandboxHost) -> None:
    async with client(host) as jupyter:
        jupyter.execute(
            "import sandbox\ntry:\n    sandbox.kill('c1')\nexcept sandbox.HostError as error:\n    e = error"
        )
        await host.next_call("kill")
        await host.begin()
    async with client(host) as jupyter:
        text, _ = await run(jupyter, "print(type(e).__name__, e)")
    assert text.startswith("InterruptedCallError The connection to the host was renewed while kill")


async def test_what_changes_nothing_is_asked_again(host: SandboxHost) -> None:
    """As after a restart of the gateway; also if the answer was on its way."""
    async with client(host) as jupyter:
        code = "import sandbox\nkids = sandbox.fork(2)\nfirst = sandbox.wait()\nvalue = first.result()"
        jupyter.execute(code)
        entries = [{"id": child_id(index), "index": index} for index in range(2)]
        await (await host.next_call("fork")).answer({"children": entries})
        for _ in range(3):
            waiting = await host.next_call("wait")
            await host.begin()
        assert waiting.params["ids"] == [child_id(0), child_id(1)]
        await (await host.next_call("wait")).answer({"id": child_id(1)})
        half = await host.next_call("result")
        stream = await half.incoming.accept({"state": "exited", "status": "ok"})
        await stream.write(values.encode("all of it")[:4])
        await host.begin(restored=True)
        await (await host.next_call("result")).answer({"state": "exited", "status": "ok"}, values.encode("all of it"))
    async with client(host) as jupyter:
        assert (await run(jupyter, "print(first.index, value)"))[0] == "1 all of it\n"


async def test_a_call_without_a_session_waits_for_the_next(host: SandboxHost) -> None:
    go = host.paths.home / "go"
    async with client(host) as jupyter:
        jupyter.execute(f"import sandbox\n{waits_for(go)}t = sandbox.info()")
        await host.wait_event(b"busy")
        await host.hang_up()
        go.touch()
        await asyncio.sleep(0.5)  # for the call, of which nothing tells without a session
        await host.begin()
        await (await host.next_call("info")).answer({"state": "running"})
    async with client(host) as jupyter:
        assert (await run(jupyter, "print(t)"))[0] == "{'state': 'running'}\n"


async def test_an_interrupt_takes_a_call_back(host: SandboxHost) -> None:
    async with client(host) as jupyter:
        cell = asyncio.ensure_future(run(jupyter, "import sandbox; sandbox.tree()"))
        call = await host.next_call("tree")
        await host.call("kernel.interrupt")
        assert (await cell)[1]["ename"] == "KeyboardInterrupt"
        async with asyncio.timeout(60):
            await call.over.wait()


async def test_scripts_can_import_it(host: SandboxHost) -> None:
    host.script = family({0: values.encode("from a script")})
    async with client(host) as jupyter:
        code = (
            "import subprocess, sys\ncode = 'import sandbox; print(sandbox.id, sandbox.fork().result())'\n"
            "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True))"
        )
        text, _ = await run(jupyter, code)
    assert f"{PARENT} from a script" in text


def test_values_have_limits_and_say_so() -> None:
    assert values.decode(values.encode({1: (2, 3)})) == {1: (2, 3)}
    with pytest.raises(ValueRefusedError, match=r"20\.0 MiB .* at most 16 MiB"):
        values.encode(bytes(20 << 20))
    with pytest.raises(ValueRefusedError, match="generator cannot cross"):
        values.encode(i for i in range(3))
