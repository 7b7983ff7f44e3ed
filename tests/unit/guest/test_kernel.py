"""The kernel as its clients see it: life cycle over the wire, output that is never lost, interrupts, renewal."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import zmq
import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.session import Session

from tests.unit.guest.conftest import KEY, Host, client, no_client, run, waits_for
from vm_runtime.guest.iopub import STREAM_CHARS
from vm_runtime.guest.outbox import QUEUE_BYTES_MAX, SPOOL_BYTES_MAX
from vm_runtime.guest.paths import CHANNEL_PORTS
from vm_runtime.wire.errors import OpenRejectedError


async def start(host: Host) -> int:
    return int((await host.call("kernel.start", key=KEY, env={"COLOUR": "blue"}, cwd="/tmp"))["pid"])


async def test_start_runs_a_kernel_with_env_and_cwd(host: Host) -> None:
    pid = await start(host)
    async with client(host) as jupyter:
        text, reply = await run(jupyter, "import os; print(os.getpid(), os.environ['COLOUR'], os.getcwd())")
    assert text.split() == [str(pid), "blue", "/tmp"]
    assert reply["execution_count"] == 1


async def test_start_where_the_directory_is_missing_falls_back_to_home(host: Host) -> None:
    await host.call("kernel.start", key=KEY, env={}, cwd="/no/such/place")
    async with client(host) as jupyter:
        text, _ = await run(jupyter, "import os; print(os.getcwd())")
    assert text.strip() == str(host.paths.home)


async def test_prepare_leaves_no_trace_and_start_takes_the_kernel_over(host: Host) -> None:
    prepared = await host.call("template.prepare", warmup="import json; left_over = 1")
    assert await start(host) == prepared["pid"]
    async with client(host) as jupyter:
        text, reply = await run(
            jupyter, "import os; print(os.getcwd(), os.environ['COLOUR'], 'left_over' in globals(), len(Out), In)"
        )
    assert text.split()[:4] == ["/tmp", "blue", "False", "0"]
    assert reply["execution_count"] == 1


async def test_a_warm_up_that_fails_says_why(host: Host) -> None:
    with pytest.raises(OpenRejectedError, match="no_such_module") as caught:
        await host.call("template.prepare", warmup="import no_such_module")
    assert caught.value.code == "warmup_failed"


async def test_restart_is_a_new_process_on_the_same_sockets(host: Host) -> None:
    first = await start(host)
    async with client(host) as jupyter:
        await run(jupyter, "import numpy; numpy.ones((300, 300)) @ numpy.ones((300, 300)); x = 1")
        second = (await host.call("kernel.restart"))["pid"]
        assert second != first
        await jupyter.wait_for_ready(timeout=120)
        text, _ = await run(jupyter, "import numpy; print('x' in globals(), (numpy.eye(300) @ numpy.eye(300)).sum())")
    assert text.split() == ["False", "300.0"]
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


async def test_kernels_of_one_zygote_have_different_random_numbers(host: Host) -> None:
    code = "import random, numpy, uuid; print(random.random(), numpy.random.rand(), uuid.uuid4())"
    await host.call("template.prepare", warmup="import random, numpy; random.seed(1); numpy.random.seed(1)")
    await start(host)
    async with client(host) as jupyter:
        first, _ = await run(jupyter, code)
        await host.call("kernel.restart")
        await jupyter.wait_for_ready(timeout=120)
        second, _ = await run(jupyter, code)
    assert not set(first.split()) & set(second.split())


async def test_renewal_changes_key_and_random_numbers(host: Host) -> None:
    await start(host)
    async with client(host) as jupyter:
        await run(jupyter, "import random; random.seed(1); state = random.getstate()")
    link = await host.hello(restored=True, kernel_key="second-key")
    assert link.welcome is not None
    assert link.welcome.kernel is not None
    assert json.loads(host.paths.identity.read_text())["hostname"] == "box"
    async with client(host, key="second-key") as jupyter:
        text, _ = await run(jupyter, "print(random.getstate() == state)")
        assert text.strip() == "False"
        sessions = "import gc; from jupyter_client.session import Session\n"
        text, _ = await run(jupyter, sessions + "print({o.key for o in gc.get_objects() if isinstance(o, Session)})")
        assert text.strip() == "{b'second-key'}"
        text, _ = await run(jupyter, "random.seed(1)\nprint(random.getstate() == state)")
        assert text.strip() == "True"
        text, _ = await run(jupyter, "print(random.getstate() == state)")
        assert text.strip() == "True"
    await host.hello(restored=True, keep_random=True)
    async with client(host, key="second-key") as jupyter:
        text, _ = await run(jupyter, "print(random.getstate() == state)")
    assert text.strip() == "True"


async def test_busy_means_cells_only(host: Host) -> None:
    await start(host)
    async with client(host) as jupyter:
        await host.wait_event(b'"idle"')
        host.events.clear()
        await jupyter.kernel_info(reply=True)
        assert host.events == []
        await run(jupyter, "pass")
        assert b"busy" in await host.wait_event(b"kernel.status")
        assert b"idle" in await host.wait_event(b"kernel.status")


async def test_a_crash_is_told_and_a_stop_is_not(host: Host) -> None:
    pid = await start(host)
    os.kill(pid, signal.SIGSEGV)
    event = json.loads(await host.wait_event(b"kernel.exited"))
    assert event == {"event": "kernel.exited", "pid": pid, "shut_down": False, "signal": signal.SIGSEGV}
    await start(host)
    host.events.clear()
    await host.call("kernel.stop", grace_s=5)
    assert not any(b"exited" in event for event in host.events)
    with pytest.raises(OpenRejectedError, match="No kernel"):
        await host.call("kernel.interrupt")


async def test_a_kernel_that_ended_between_two_hosts(host: Host) -> None:
    pid = await start(host)
    await host.hang_up()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        while True:  # until the zygote has reaped it
            os.kill(pid, 0)
            await asyncio.sleep(0.01)
    link = await host.hello()
    assert link.welcome is not None
    assert link.welcome.kernel is None
    how = {"shut_down": False, "signal": signal.SIGKILL}
    assert link.welcome.extra["kernel_exited"] == {"event": "kernel.exited", "pid": pid, **how}
    await start(host)
    link = await host.hello()
    assert link.welcome is not None
    assert "kernel_exited" not in link.welcome.extra


async def test_the_end_of_a_kernel_that_did_not_start_is_told_once(host: Host) -> None:
    await start(host)
    await host.wait_event(b'"idle"')
    startup = host.paths.home / ".ipython/profile_default/startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "00.py").write_text("import os; os._exit(3)")
    with pytest.raises(OpenRejectedError, match="ended while it started") as caught:
        await host.call("kernel.restart")
    assert caught.value.code == "kernel_failed"
    (startup / "00.py").unlink()
    await host.call("kernel.restart")
    while b'"idle"' not in (event := await host.wait_event(b"event")):
        assert b"kernel.exited" not in event


async def test_interrupt_ends_a_loop_over_both_ways(host: Host) -> None:
    await start(host)
    async with client(host) as jupyter:
        for interrupt in (_by_wire(host), _by_control(jupyter)):
            cell = asyncio.create_task(run(jupyter, "while True: pass"))
            await host.wait_event(b"busy")
            await interrupt
            _, reply = await cell
            assert reply["ename"] == "KeyboardInterrupt"


AWAITING = {
    "await asyncio.sleep(60)": "CancelledError",
    "await asyncio.Event().wait()": "CancelledError",
    "await asyncio.gather(asyncio.sleep(60), asyncio.to_thread(lambda: 1))": "CancelledError",
    "async with asyncio.timeout(70): await asyncio.sleep(60)": "CancelledError",
    "await asyncio.sleep(0)\nimport time; time.sleep(60)": "KeyboardInterrupt",
    "async def busy():\n  while True: pass\nawait busy()": "KeyboardInterrupt",
    "async def busy():\n  while True: pass\nawait asyncio.create_task(busy())": "CancelledError",
    "try: await asyncio.sleep(60)\nexcept asyncio.CancelledError: print('caught')": "",
}


async def test_an_interrupt_ends_what_awaits(host: Host) -> None:
    await start(host)
    async with client(host) as jupyter:
        for code, error in AWAITING.items():
            request = jupyter.execute(f"import asyncio; print('on')\n{code}")
            while (await jupyter.get_iopub_msg(timeout=60))["content"].get("text") != "on\n":
                pass
            await host.call("kernel.interrupt")
            # No message goes to the kernel meanwhile, which would wake it.
            reply = await jupyter.get_shell_msg(timeout=60)
            assert reply["parent_header"]["msg_id"] == request
            assert reply["content"].get("ename", "") == error, code
        assert (await run(jupyter, "print(2)"))[0] == "2\n"


async def _by_wire(host: Host) -> None:
    await host.call("kernel.interrupt")


async def _by_control(jupyter: Any) -> None:
    jupyter.control_channel.send(jupyter.session.msg("interrupt_request", {}))


async def test_input_is_answered(host: Host) -> None:
    await start(host)
    async with client(host) as jupyter:
        text, _ = await run(
            jupyter, "print('got', input('name? '))", allow_stdin=True, stdin_hook=lambda _: jupyter.input("Ada")
        )
    assert "got Ada" in text


async def test_fifty_megabytes_arrive_through_a_slow_client(host: Host) -> None:
    pid = await start(host)
    async with client(host) as jupyter:
        await run(jupyter, "pass")
    context = zmq.asyncio.Context()
    slow = context.socket(zmq.SUB)
    try:
        slow.set(zmq.RCVHWM, 1)
        slow.subscribe(b"")
        slow.connect(f"ipc://{host.paths.kernel_socket(CHANNEL_PORTS['iopub'])}")
        assert b"iopub_welcome" in b"".join(await slow.recv_multipart())
        shell = context.socket(zmq.DEALER)
        shell.connect(f"ipc://{host.paths.kernel_socket(CHANNEL_PORTS['shell'])}")
        before = _rss_kib(pid)
        session = Session(key=KEY.encode())
        host.events.clear()
        code = "for i in range(50): print('x' * 999_999)\nprint('y' * 100_000)"
        session.send(shell, "execute_request", {"code": code, "silent": False, "allow_stdin": False})
        await host.wait_event(b"busy")
        await asyncio.sleep(1.0)  # nobody reads: the kernel must wait, not grow
        assert not any(b"idle" in event for event in host.events)
        assert _rss_kib(pid) - before < 24 * 1024
        sizes: list[int] = []
        while sum(sizes) < 50 * 1_000_000 + 100_001:
            async with asyncio.timeout(30):
                _, frames = session.feed_identities(await slow.recv_multipart())
            message = session.deserialize(frames)
            if message["msg_type"] == "stream":
                sizes.append(len(message["content"]["text"]))
        await host.wait_event(b"idle")
    finally:
        context.destroy(linger=0)
    assert sum(sizes) == 50 * 1_000_000 + 100_001
    assert max(sizes) < 2 * STREAM_CHARS


async def test_an_interrupt_breaks_the_wait_for_a_slow_client(host: Host) -> None:
    await start(host)
    async with client(host) as jupyter:
        jupyter.execute(f"while True: print('x' * {QUEUE_BYTES_MAX})")
        await host.wait_event(b"busy")
        await asyncio.sleep(0.5)  # until it waits; nothing tells, and before that the same must happen
        await host.call("kernel.interrupt")
        async with asyncio.timeout(30):
            while True:
                message = await jupyter.get_iopub_msg()
                if message["msg_type"] == "error":
                    break
        assert message["content"]["ename"] == "KeyboardInterrupt"


async def test_output_is_kept_while_nobody_listens(host: Host) -> None:
    go = host.paths.home / "go"
    await start(host)
    async with client(host) as jupyter:
        jupyter.execute(f"{waits_for(go)}print('kept'); from IPython.display import display; display(42)")
        await host.wait_event(b"busy")
    await no_client(host, "iopub")
    go.touch()
    await host.wait_event(b"idle")
    await host.hello(restored=True, kernel_key="second-key")
    texts = await _first_outputs(host, key="second-key", count=2)
    assert texts == ["kept\n", "42"]


async def test_more_than_the_spool_drops_the_oldest_and_says_so(host: Host) -> None:
    go = host.paths.home / "go"
    await start(host)
    async with client(host) as jupyter:
        jupyter.execute(f"{waits_for(go)}for i in range(40): print('x' * {SPOOL_BYTES_MAX // 20})\nprint('the end')")
        await host.wait_event(b"busy")
    await no_client(host, "iopub")
    go.touch()
    await host.wait_event(b"idle")
    texts = await _first_outputs(host, key=KEY, count=1000, until="the end\n")
    assert "older output were dropped" in texts[0]
    assert texts[-1].endswith("the end\n")
    assert SPOOL_BYTES_MAX // 2 < sum(map(len, texts)) <= SPOOL_BYTES_MAX


async def _first_outputs(host: Host, *, key: str, count: int, until: str = "\0") -> list[str]:
    """What a client gets that connects to iopub alone."""
    jupyter = AsyncKernelClient()
    ip = str(host.paths.kernel_dir / "k")
    ports = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}
    info = {"transport": "ipc", "ip": ip, "key": key, "signature_scheme": "hmac-sha256", **ports}
    jupyter.load_connection_info(cast(KernelConnectionInfo, info))
    jupyter.start_channels(shell=False, stdin=False, hb=False, control=False)
    texts: list[str] = []
    try:
        while len(texts) < count and not (texts and texts[-1].endswith(until)):
            message = await jupyter.get_iopub_msg(timeout=60)
            if message["msg_type"] == "stream":
                texts.append(message["content"]["text"])
            elif message["msg_type"] == "display_data":
                texts.append(message["content"]["data"]["text/plain"])
    finally:
        jupyter.stop_channels()
    return texts


async def test_output_of_children_and_descriptors(host: Host) -> None:
    await start(host)
    code = """
import os, sys, subprocess, multiprocessing, time
def child(): print('from a fork')
process = multiprocessing.get_context('fork').Process(target=child)
process.start(); process.join()
subprocess.run(['echo', 'from a subprocess'])
os.write(1, 'from the descriptor é'.encode())
"""
    parts = ("from a fork", "from a subprocess", "from the descriptor é")
    async with client(host) as jupyter:
        jupyter.execute(code)
        text = ""
        while not all(part in text for part in parts):
            text += (await jupyter.get_iopub_msg(timeout=60))["content"].get("text", "")
        text += (await run(jupyter, "pass"))[0]
    assert [text.count(part) for part in parts] == [1, 1, 1]


async def test_an_error_is_shown_without_a_search_through_all_modules(host: Host) -> None:
    """As a local kernel shows it, frame by frame; endless recursion took a minute in an emulated machine."""
    await start(host)
    async with client(host) as jupyter:
        await run(jupyter, "import inspect, sys, types\ndef endless(n):\n  return endless(n + 1)")
        await run(
            jupyter,
            "seen = []\nclass Counted(types.ModuleType):\n  def __getattr__(self, name): seen.append(name)\n"
            "sys.modules['counted'] = Counted('counted')",
        )
        _, reply = await run(jupyter, "endless(0)")
        assert reply["ename"] == "RecursionError"
        assert len("\n".join(reply["traceback"]).split("endless")) > 900
        text, _ = await run(jupyter, "print(len(seen), inspect.getmodule(endless) is sys.modules['__main__'])")
    looks, is_main = text.split()
    assert int(looks) < 50
    assert is_main == "True"


async def test_subshells_run_beside_a_cell(host: Host) -> None:
    await start(host)
    async with client(host) as jupyter:
        jupyter.control_channel.send(jupyter.session.msg("create_subshell_request", {}))
        reply = await jupyter.get_control_msg(timeout=60)
        jupyter.execute("import threading; e = threading.Event(); print('on', flush=True); print(e.wait(20))")
        message = jupyter.session.msg("execute_request", {"code": "e.set()", "silent": False, "allow_stdin": False})
        message["header"]["subshell_id"] = reply["content"]["subshell_id"]
        text = ""
        while "on" not in text:
            text += (await jupyter.get_iopub_msg(timeout=60))["content"].get("text", "")
        jupyter.shell_channel.send(message)
        while "True" not in text:
            text += (await jupyter.get_iopub_msg(timeout=60))["content"].get("text", "")
    assert text == "on\nTrue\n"


async def test_channels_go_over_the_wire(host: Host) -> None:
    await start(host)
    assert host.link is not None
    stream = await host.link.open("kernel.channel", {"channel": "shell"}, timeout_s=60)
    assert (await stream.read(1)) == b"\xff"  # ZMTP's greeting
    stream.reset()
    with pytest.raises(OpenRejectedError, match="shell, iopub"):
        await host.call("kernel.channel", channel="nonsense")


async def test_a_tunnel_reaches_a_port(host: Host) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read(100)).upper())
        writer.close()

    assert host.link is not None
    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        stream = await host.link.open("tunnel", {"port": port}, timeout_s=60)
        await stream.write(b"hello")
        assert await stream.read() == b"HELLO"
        stream.end()
    with pytest.raises(OpenRejectedError):
        await host.call("tunnel", port=port)


async def test_bad_requests_are_refused(host: Host) -> None:
    for kind, params in (
        ("no.such.kind", {}),
        ("kernel.start", {"key": 1}),
        ("kernel.start", {"key": "k", "env": {"A": 1}}),
        ("kernel.start", {"key": "k", "env": {"A=B": "1"}}),
        ("tunnel", {"port": 0}),
        ("tunnel", {"port": "22"}),
        ("kernel.channel", {}),
        ("kernel.channel", {"channel": "shell"}),
    ):
        with pytest.raises(OpenRejectedError):
            await host.call(kind, **params)


async def test_the_zygote_killed_takes_the_kernel_along_and_is_replaced(host: Host) -> None:
    pid = await start(host)
    os.kill(_parent(pid), signal.SIGKILL)
    await host.wait_event(b"kernel.exited")
    assert await start(host) != pid


def _rss_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


async def test_a_cell_has_variables_and_a_directory_of_its_own(host: Host, tmp_path: Path) -> None:
    await start(host)
    (tmp_path / "there").mkdir()
    show = "import os; print(os.environ.get('WORD'), os.environ.get('HOME'), os.getcwd())"
    async with client(host) as jupyter:
        before, _ = await run(jupyter, show)
        plain, _ = await run_at(jupyter, show, {"env": {"WORD": "w", "HOME": "/h"}, "cwd": str(tmp_path / "there")})
        assert plain.split() == ["w", "/h", str(tmp_path / "there")]
        _, reply = await run_at(
            jupyter, "os.environ['KEPT'] = 'k'; os.rmdir(os.getcwd()); 1 / 0", {"cwd": str(tmp_path / "there")}
        )
        assert (reply["ename"], reply["hypercell"]) == ("ZeroDivisionError", {})
        for place, name in (
            ({"cwd": str(tmp_path / "none")}, "FileNotFoundError"),
            ({"env": {"A=B": "c"}}, "ValueError"),
            ({"env": {"A": "\0"}}, "ValueError"),
            ({"env": {"A": 1}}, "TypeError"),
        ):
            text, reply = await run_at(jupyter, "print('ran')", place)
            assert (text, reply["ename"], reply["hypercell"]) == ("", name, {})
        assert (await run(jupyter, show))[0] == before
        assert (await run(jupyter, "print(os.environ['KEPT'])"))[0] == "k\n"


async def run_at(jupyter: AsyncKernelClient, code: str, place: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """As `run`, with what only the SDK sends in the request."""
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    message = jupyter.session.msg("execute_request", {**content, "stop_on_error": False, "hypercell": place})
    jupyter.shell_channel.send(message)
    text, own = "", message["header"]["msg_id"]
    while True:
        told = await jupyter.get_iopub_msg(timeout=60)
        if told["parent_header"].get("msg_id") != own:
            continue
        if told["msg_type"] == "stream":
            text += told["content"]["text"]
        if told["msg_type"] == "status" and told["content"]["execution_state"] == "idle":
            break
    while (reply := await jupyter.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != own:
        pass
    return text, reply["content"]
