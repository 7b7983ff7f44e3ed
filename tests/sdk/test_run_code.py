"""`run_code`: output as it comes, rich results, errors, time limits, contexts, cancellation."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from hypercell import AsyncSandbox, CodeError, CodeTimeoutError, KernelDiedError, Result, Sandbox, StateError
from tests.gateways import RunningGateway

SHOW_ALL = """
from IPython.display import display, HTML, Markdown, Latex, SVG, JSON
display(HTML("<b>h</b>")); display(Markdown("*m*")); display(Latex("$l$")); display(JSON({"j": [1]}))
display(SVG('<svg xmlns="http://www.w3.org/2000/svg"/>'))
import matplotlib.pyplot as plt
plt.plot([1, 2]); plt.show()
"""


@pytest.fixture
async def async_sandbox(at_gateway: RunningGateway) -> AsyncIterator[AsyncSandbox]:
    async with await AsyncSandbox.create(checkpoints="off") as sandbox:
        yield sandbox


def test_variables_stay_and_output_is_sorted(sandbox: Sandbox) -> None:
    sandbox.run_code("value = 20")
    execution = sandbox.run_code("import sys; print('out'); print('err', file=sys.stderr); value + 1")
    assert (execution.text, execution.stdout, execution.stderr) == ("21", "out\n", "err\n")
    assert execution.error is None
    assert execution.execution_count == 2
    assert [output["output_type"] for output in execution.outputs] == ["stream", "stream", "execute_result"]


def test_rich_results(sandbox: Sandbox) -> None:
    results = sandbox.run_code(SHOW_ALL).raise_for_error().results
    html, markdown, latex, json, svg, plot = results
    assert (html.html, markdown.markdown, latex.latex, json.json) == ("<b>h</b>", "*m*", "$l$", {"j": [1]})
    assert svg.svg is not None and svg.svg.startswith("<svg")
    assert plot.png is not None and base64.b64decode(plot.png).startswith(b"\x89PNG")
    assert "image/png" in plot.formats and not plot.is_main


def test_displays_are_updated_in_place(sandbox: Sandbox) -> None:
    execution = sandbox.run_code("d = display('one', display_id=True); display('two'); d.update('three')")
    assert [result.text for result in execution.results] == ["'three'", "'two'"]


def test_callbacks_run_in_the_caller_s_thread_as_output_comes(sandbox: Sandbox) -> None:
    heard: list[tuple[str, int]] = []
    results: list[Result] = []
    code = "import os, time\nprint('a', flush=True)\nwhile not os.path.exists('heard'): time.sleep(0.01)\n"

    def hear(text: str) -> None:
        heard.append((text, threading.get_ident()))
        sandbox.files.write("heard", "")

    sandbox.run_code(f"{code}print('b', flush=True)\n'end'", on_stdout=hear, on_result=results.append)
    assert [text for text, _ in heard] == ["a\n", "b\n"]
    assert {thread for _, thread in heard} == {threading.get_ident()}
    assert [result.text for result in results] == ["'end'"]


def test_what_a_callback_raises_is_raised_and_the_code_goes_no_further(sandbox: Sandbox) -> None:
    def refuse(text: str) -> None:
        raise ZeroDivisionError(text)

    with pytest.raises(ZeroDivisionError):
        sandbox.run_code("print('x', flush=True)", on_stdout=refuse)
    assert sandbox.run_code("1").text == "1"


def test_an_exception_is_a_value_until_it_is_wanted(sandbox: Sandbox) -> None:
    execution = sandbox.run_code("{}['missing']")
    assert execution.error is not None
    assert (execution.error.name, execution.error.value) == ("KeyError", "'missing'")
    assert "missing" in execution.error.traceback
    with pytest.raises(CodeError, match="KeyError"):
        execution.raise_for_error()


def test_a_time_limit_interrupts_the_kernel(sandbox: Sandbox) -> None:
    with pytest.raises(CodeTimeoutError, match="was interrupted") as raised:
        sandbox.run_code("print('before', flush=True)\nwhile True: pass", timeout_s=2)
    assert raised.value.interrupted
    assert raised.value.execution is not None and raised.value.execution.stdout == "before\n"
    assert sandbox.run_code("'alive'").text == "'alive'"


def test_a_paused_sandbox_is_told_at_once(sandbox: Sandbox) -> None:
    with Sandbox.connect(sandbox.id) as other:
        other.run_code("1")
        sandbox.pause()
        # Whether it was used a moment ago or not.
        for same in (other, sandbox, other):
            with pytest.raises(StateError, match="resume"):
                same.run_code("ran = True", timeout_s=2)
        sandbox.resume()
        assert other.run_code("1").text == "1"


def test_a_limit_of_the_whole_call(sandbox: Sandbox) -> None:
    stuck = "import time\nprint('on', flush=True)\nwhile not globals().get('free'):\n    try: time.sleep(0.1)\n"
    stuck += "    except KeyboardInterrupt: pass"
    began = threading.Event()
    with Sandbox.connect(sandbox.id) as other, ThreadPoolExecutor() as threads:
        holding = threads.submit(other.run_code, stuck, on_stdout=lambda text: began.set())
        assert began.wait(60)
        # Behind another client's code, and behind one's own.
        for same in (sandbox, other):
            with pytest.raises(CodeTimeoutError, match="did not begin") as raised:
                same.run_code("1", timeout_s=60, total_timeout_s=1)
            assert not raised.value.interrupted
        sandbox.run_code("free = True", context=sandbox.create_context())
        assert holding.result(60).error is None
    with pytest.raises(CodeTimeoutError, match="longer than 5 s") as raised:
        sandbox.run_code("while True: pass", timeout_s=60, total_timeout_s=5)
    assert raised.value.interrupted


async def test_contexts_run_beside_each_other_on_the_same_variables(async_sandbox: AsyncSandbox) -> None:
    context = await async_sandbox.create_context()
    await async_sandbox.run_code("done = False")
    waiting = asyncio.create_task(async_sandbox.run_code("import time\nwhile not done: time.sleep(0.01)\n'seen'"))
    await async_sandbox.run_code("done = True", context=context, timeout_s=60)
    assert (await waiting).text == "'seen'"
    with pytest.raises(CodeTimeoutError) as raised:
        await async_sandbox.run_code("while True: pass", context=context, timeout_s=2)
    assert raised.value.interrupted
    assert (await async_sandbox.run_code("done", context=context)).text == "True"
    await async_sandbox.delete_context(context)


async def test_a_cancelled_call_interrupts_its_code(async_sandbox: AsyncSandbox) -> None:
    began = asyncio.Event()
    running = asyncio.create_task(
        async_sandbox.run_code("print('on', flush=True)\nwhile True: pass", on_stdout=lambda text: began.set())
    )
    await began.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (await async_sandbox.run_code("'alive'", timeout_s=60)).text == "'alive'"


async def test_an_interrupt_ends_what_another_client_runs(async_sandbox: AsyncSandbox) -> None:
    began = asyncio.Event()
    running = asyncio.create_task(
        async_sandbox.run_code("print('on', flush=True)\nwhile True: pass", on_stdout=lambda text: began.set())
    )
    await began.wait()
    async with await AsyncSandbox.connect(async_sandbox.id) as other:
        await other.interrupt()
    execution = await asyncio.wait_for(running, 60)
    assert execution.error is not None and execution.error.name == "KeyboardInterrupt"
    # With nothing running it does nothing.
    await async_sandbox.interrupt()
    assert (await async_sandbox.run_code("'alive'", timeout_s=60)).text == "'alive'"


async def test_a_callback_that_gives_up_far_behind_holds_nothing(async_sandbox: AsyncSandbox) -> None:
    async def give_up(text: str) -> None:
        (pending,) = async_sandbox._kernel._pending.values()
        while not pending.messages.full():  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0.01)
        # And one message more, for which the reader waits; nothing tells, and without it the same must come out.
        await asyncio.sleep(0.5)
        raise ZeroDivisionError

    async with asyncio.timeout(90):
        with pytest.raises(ZeroDivisionError):
            await async_sandbox.run_code("for i in range(2000): print(i, flush=True)", on_stdout=give_up)
        assert (await async_sandbox.run_code("'alive'")).text == "'alive'"


async def test_limits_and_cancelling_leave_other_clients_code_alone(async_sandbox: AsyncSandbox) -> None:
    began = asyncio.Event()
    # Longer than what another's limit counts from its own beginning.
    code = "print('on', flush=True)\nimport time; time.sleep(7); 'theirs'"
    async with await AsyncSandbox.connect(async_sandbox.id) as other:
        theirs = asyncio.create_task(other.run_code(code, on_stdout=lambda text: began.set()))
        await began.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await async_sandbox.run_code("withdrawn = True")
        ours = await async_sandbox.run_code("'ours'", timeout_s=5)
        assert ((await theirs).text, ours.text) == ("'theirs'", "'ours'")


async def test_fifty_calls_at_once_are_each_answered(async_sandbox: AsyncSandbox) -> None:
    answers = await asyncio.gather(*(async_sandbox.run_code(f"print({i}); {i}") for i in range(50)))
    assert [(answer.text, answer.stdout) for answer in answers] == [(str(i), f"{i}\n") for i in range(50)]


async def test_a_kernel_that_dies_is_told_and_comes_back(async_sandbox: AsyncSandbox) -> None:
    await async_sandbox.run_code("value = 1")
    with pytest.raises(KernelDiedError, match="variables are gone") as raised:
        await async_sandbox.run_code("print('last', flush=True)\nimport os; os._exit(3)")
    assert raised.value.execution is not None and raised.value.execution.stdout == "last\n"
    assert (await async_sandbox.run_code("'value' in globals()")).text == "False"


async def test_a_restart_ends_what_runs(async_sandbox: AsyncSandbox) -> None:
    began = asyncio.Event()
    running = asyncio.create_task(
        async_sandbox.run_code("print('on', flush=True)\nwhile True: pass", on_stdout=lambda text: began.set())
    )
    await began.wait()
    await async_sandbox.restart()
    ended = await running  # the old kernel ends in order: its cell is interrupted first
    assert ended.error is not None and ended.error.name == "KeyboardInterrupt"
    assert (await async_sandbox.run_code("1 + 1")).text == "2"


async def test_a_broken_connection_loses_no_output(async_sandbox: AsyncSandbox) -> None:
    began = asyncio.Event()
    code = "import time\nfor i in range(30): print(i, flush=True); time.sleep(0.1)"
    running = asyncio.create_task(async_sandbox.run_code(code, on_stdout=lambda text: began.set()))
    await began.wait()
    websocket = async_sandbox._kernel._websocket
    assert websocket is not None
    websocket.transport.abort()
    assert (await running).stdout == "".join(f"{i}\n" for i in range(30))
