"""`%sandbox` and `%%sandbox` as a notebook's user sees them, with a real kernel and a scripted host."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient

from tests.unit.guest.conftest import client, run
from tests.unit.guest.sandbox_host import PARENT, SandboxHost, child_id, decoded, family, sandbox_host
from vm_runtime.guest.sandbox import values
from vm_runtime.guest.sandbox.branches import BranchResult
from vm_runtime.guest.sandbox.grammar import SUBCOMMANDS, UsageProblem, completions, parse

host = pytest.fixture(sandbox_host)

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


async def shown(jupyter: AsyncKernelClient, code: str) -> list[dict[str, Any]]:
    """All iopub messages of a cell that has anything to show."""
    messages: list[dict[str, Any]] = []
    await jupyter.execute_interactive(code, timeout=60, output_hook=messages.append)
    kinds = ("stream", "display_data", "update_display_data", "execute_result", "error")
    return [message for message in messages if message["msg_type"] in kinds]


def stream(text: str) -> dict[str, str]:
    return {"output_type": "stream", "name": "stdout", "text": text}


def result(text: str, score: float | None = None, error: str | None = None) -> bytes:
    image = {"output_type": "display_data", "data": {"image/png": PIXEL, "text/plain": "<Figure>"}, "metadata": {}}
    return values.encode(BranchResult(outputs=[stream(text), image], seconds=0.5, error=error, score=score))


def test_lines_are_understood_or_refused_with_a_sentence() -> None:
    command = parse("branch -n 3 --keep best --by '-loss + 1'", cell=True)
    assert (command.n, command.keep, command.by) == (3, "best", "-loss + 1")
    assert parse("branch --keep best --by -loss", cell=True).by == "-loss"
    assert parse("fork 4 --name try-it", cell=False).label == "try-it"
    for line, cell, message in (
        ("frok", False, "Did you mean `%sandbox fork`"),
        ("zzzzz", False, "`%sandbox help` lists"),
        ("branch", False, "write it as `%%sandbox branch"),
        ("fork", True, "write it as `%sandbox fork"),
        ("fork none", False, "1 or more.*Usage: %sandbox fork"),
        ("branch --keep best", True, "go together"),
        ("snapshot", False, "Usage: %sandbox snapshot NAME"),
        ("snapshot 'a", False, "cannot be read"),
    ):
        with pytest.raises(UsageProblem, match=message):
            parse(line, cell=cell)


def test_completions_follow_what_is_typed() -> None:
    assert "fork" in completions("%sandbox ") and "branch" not in completions("%sandbox f")
    assert "try" in completions("%%sandbox ")
    assert completions("%%sandbox branch --keep ") == ["best"]
    assert "--name" in completions("%sandbox fork --")


async def test_help_completion_and_errors_in_a_kernel(host: SandboxHost) -> None:
    async with client(host) as jupyter:
        reply = await jupyter.inspect("%sandbox?", 8, reply=True, timeout=60)
        help_text = reply["content"]["data"]["text/plain"]
        assert all(subcommand.summary in help_text for subcommand in SUBCOMMANDS)
        reply = await jupyter.complete("%sandbox che", 12, reply=True, timeout=60)
        assert "checkpoints" in reply["content"]["matches"]
        [message] = await shown(jupyter, "%sandbox frok")
        expected = ["sandbox: There is no `%sandbox frok`. Did you mean `%sandbox fork`?"]
        assert message["content"]["traceback"] == expected


async def test_fork_shows_links_and_can_be_assigned(host: SandboxHost) -> None:
    host.script = family({0: values.encode(1), 1: values.encode(2)})
    async with client(host) as jupyter:
        [message] = await shown(jupyter, "%sandbox fork 2")
        assert '<a href="/lab/1"' in message["content"]["data"]["text/html"]
        assert child_id(1) in message["content"]["data"]["text/plain"]
        text, _ = await run(jupyter, "cs = %sandbox fork 2\nprint([c.result() for c in cs])")
    assert text == "[1, 2]\n"


async def test_a_child_of_the_magic_stays_when_its_cell_fails(host: SandboxHost) -> None:
    async with client(host) as jupyter:
        jupyter.execute("child = %sandbox fork\n1 / 0")
        await host.become_child(await host.next_call("fork"))
    async with client(host) as jupyter:
        assert (await run(jupyter, "print(child)"))[0] == "None\n"
    assert host.calls.empty()


async def test_tree_info_and_checkpoints_are_html_and_text(host: SandboxHost) -> None:
    async def script(call: Any) -> None:
        root = {"id": PARENT, "state": "running", "parent_id": None, "name": "<root>", "checkpoint_problem": "<full>"}
        child = {"id": child_id(0), "state": "asleep", "parent_id": PARENT, "url": "http://h/lab/x"}
        answers: dict[str, dict[str, Any]] = {
            "tree": {"root": PARENT, "nodes": [root, child]},
            "info": root,
            "checkpoints": {"checkpoints": [{"id": "c1", "cell": 3, "name": "before", "created_at": "2026-01-01"}]},
            "snapshot": {"id": "s1"},
        }
        await call.answer(answers[call.op])

    host.script = script
    async with client(host) as jupyter:
        [message] = await shown(jupyter, "%sandbox tree")
        page, text = message["content"]["data"]["text/html"], message["content"]["data"]["text/plain"]
        assert text.splitlines() == ["111111111111  running  <root> ← here", "  0000cccccccc  asleep"]
        assert "&lt;root&gt;" in page and 'href="http://h/lab/x"' in page
        [message] = await shown(jupyter, "%sandbox info")
        assert "<td>state</td><td>running</td>" in message["content"]["data"]["text/html"]
        [message] = await shown(jupyter, "%sandbox checkpoints")
        assert "c1  3  before  2026-01-01" in message["content"]["data"]["text/plain"]
        assert "Checkpoints are missing: <full>" in message["content"]["data"]["text/plain"]
        assert "Checkpoints are missing: &lt;full&gt;" in message["content"]["data"]["text/html"]
        assert "Kept the state of now as 'a b'" in (await run(jupyter, "%sandbox snapshot 'a b'"))[0]


async def test_branches_are_shown_side_by_side(host: SandboxHost) -> None:
    host.script = family({1: result("second\n"), 0: result("first\n"), 2: None})
    async with client(host) as jupyter:
        messages = await shown(jupyter, "%%sandbox branch -n 3\nprint(branch)")
    assert [message["msg_type"] for message in messages] == ["display_data"] + ["update_display_data"] * 4
    page = messages[-1]["content"]["data"]["text/html"]
    assert page.index("first") < page.index("second") < page.index("The machine of the child ended")
    assert page.count(f'src="data:image/png;base64,{PIXEL}"') == 2
    assert "── branch 1 0.50 s\nsecond\n<Figure>" in messages[-1]["content"]["data"]["text/plain"]


async def test_a_branch_records_what_its_cell_shows(host: SandboxHost) -> None:
    cell = (
        "%%sandbox branch -n 2\nimport sys\nfrom IPython.display import HTML, display\n"
        "print('branch', branch)\ndisplay(HTML('<b>rich</b>'))\nprint('after', file=sys.stderr)\nbranch * 10\n"
    )
    async with client(host) as jupyter:
        await run(jupyter, "from vm_runtime.guest.sandbox import forking; forking.EXIT_LIMIT_S = 0.1")
        jupyter.execute(cell)
        await host.become_child(await host.next_call("fork"), index=1)
    found = decoded(await (await host.next_call("exit")).answer({}))
    kinds = [output["output_type"] for output in found.outputs]
    assert kinds == ["stream", "display_data", "stream", "execute_result"]
    assert found.outputs[0]["text"] == "branch 1\n"
    assert found.outputs[1]["data"]["text/html"] == "<b>rich</b>"
    assert found.outputs[3]["data"]["text/plain"] == "10"
    assert found.error is None


async def test_a_branch_records_plots_and_errors(host: SandboxHost) -> None:
    cell = "%%sandbox branch -n 2\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\nprint(1)\n1 / 0"
    async with client(host) as jupyter:
        await run(jupyter, "from vm_runtime.guest.sandbox import forking; forking.EXIT_LIMIT_S = 0.1")
        jupyter.execute(cell)
        await host.become_child(await host.next_call("fork"))
    found = decoded(await (await host.next_call("exit")).answer({}))
    assert [output["output_type"] for output in found.outputs] == ["display_data", "stream", "error"]
    assert found.outputs[0]["data"]["image/png"].startswith("iVBOR")
    assert found.error == "ZeroDivisionError: division by zero"


async def test_the_best_branch_is_taken_over(host: SandboxHost) -> None:
    children = family({0: result("a", 1.0), 1: result("b", 3.0), 2: result("c", error="ValueError: no")})
    asked: list[tuple[str, str | None]] = []

    async def script(call: Any) -> None:
        asked.append((call.op, call.params.get("id")))
        if call.op == "become":
            await call.answer({})
        else:
            await children(call)

    host.script = script
    async with client(host) as jupyter:
        messages = await shown(jupyter, "%%sandbox branch -n 3 --keep best --by score\nscore = 1")
    assert "branch 1 0.50 s · 3 · kept ── kept" in messages[-1]["content"]["data"]["text/plain"]
    assert asked[-3:] == [("kill", child_id(0)), ("kill", child_id(2)), ("become", child_id(1))]


async def test_try_goes_on_as_the_child(host: SandboxHost) -> None:
    """The child's view: it offers itself, becomes the parent, and finishes the parent's cell."""
    async with client(host) as jupyter:
        cell = asyncio.ensure_future(run(jupyter, "%%sandbox try\nx = 5\nprint('in the child')"))
        call = await host.next_call("fork")
        await host.become_child(call)
        offered = await host.next_call("offer")
        assert decoded(await offered.accept_and_hold()) is None
        answers = {offered.id: {"result": {"became": PARENT}}}
        await host.begin({"sandbox_id": PARENT, "hostname": "box"}, restored=True, extra={"calls": answers})
        text, reply = await cell
        assert (text, reply["status"]) == ("in the child\n", "ok")
        assert (await run(jupyter, "print(x)"))[0] == "5\n"


async def test_try_that_fails_shows_the_error_and_changes_nothing(host: SandboxHost) -> None:
    failed = BranchResult(
        outputs=[{"output_type": "error", "ename": "E", "evalue": "", "traceback": ["E: the reason"]}],
        seconds=0.1,
        error="E: the reason",
        score=None,
    )
    host.script = family({0: values.encode(failed)})
    async with client(host) as jupyter:
        text, reply = await run(jupyter, "%%sandbox try\nraise E")
    assert reply["status"] == "ok"
    assert text == "E: the reason\nThe cell failed, so nothing has changed here.\n"
