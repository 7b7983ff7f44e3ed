"""Commands over the wire: output, input, exit, signals, terminals, and what happens when client or session go."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.guest.conftest import Host
from vm_runtime.guest.commands import OPEN_MAX
from vm_runtime.guest.output import AHEAD_BYTES_MAX, LOG_BYTES_MAX, Cursor, OutputLog
from vm_runtime.wire.command_frames import REQUEST_HEADER, CommandFrame, CommandFrameReader
from vm_runtime.wire.errors import OpenRejectedError, StreamResetError
from vm_runtime.wire.stream import Stream


class Followed:
    """A command's stream, read to its end or until something has come."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.out = b""
        self.err = b""
        self.skipped = 0
        self.started: dict[str, Any] = {}
        self.exited: dict[str, Any] = {}
        self._frames = CommandFrameReader()

    async def until(self, part: bytes) -> None:
        while part not in self.out:
            assert await self.step(), self.out

    async def end(self) -> Followed:
        while await self.step():
            pass
        return self

    async def step(self) -> bool:
        async with asyncio.timeout(30):
            data = await self.stream.read()
        for kind, payload in self._frames.feed(data):
            match kind:
                case CommandFrame.STDOUT:
                    self.out += payload
                case CommandFrame.STDERR:
                    self.err += payload
                case CommandFrame.STARTED:
                    self.started = json.loads(payload)
                case CommandFrame.SKIPPED:
                    self.skipped += json.loads(payload)["bytes"]
                case CommandFrame.EXITED:
                    self.exited = json.loads(payload)
        return bool(data)


async def start(host: Host, command: str | list[str], *, kind: str = "exec.start", **options: Any) -> Followed:
    assert host.link is not None
    stream = await host.link.open(kind, timeout_s=60)
    request = json.dumps({"command": command, **options}).encode()
    await stream.write(REQUEST_HEADER.pack(len(request)) + request)
    followed = Followed(stream)
    while not followed.started:
        await followed.step()
    return followed


async def run(host: Host, command: str | list[str], **options: Any) -> Followed:
    return await (await start(host, command, **options)).end()


async def commands(host: Host) -> list[dict[str, Any]]:
    assert host.link is not None
    stream = await host.link.open("exec.list", timeout_s=60)
    data = b""
    while more := await stream.read():
        data += more
    stream.end()
    return list(json.loads(data))


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def wait_gone(pid: int) -> None:
    async with asyncio.timeout(60):
        while exists(pid):  # noqa: ASYNC110 (not our child: nothing tells)
            await asyncio.sleep(0.02)


async def wait_commands(host: Host, wanted: Callable[[list[dict[str, Any]]], bool]) -> None:
    async with asyncio.timeout(60):
        while not wanted(await commands(host)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@asynccontextmanager
async def attached(host: Host, command_id: str) -> AsyncIterator[Followed]:
    assert host.link is not None
    stream = await host.link.open("exec.attach", {"command_id": command_id}, timeout_s=60)
    try:
        yield Followed(stream)
    finally:
        stream.reset()


async def test_output_and_exit(host: Host) -> None:
    done = await run(host, "echo out; echo err >&2; exit 3")
    assert (done.out, done.err) == (b"out\n", b"err\n")
    assert done.exited == {"exit_status": 3, "signal": None, "timed_out": False, "out_of_memory": False}
    assert await commands(host) == []


async def test_program_with_arguments(host: Host) -> None:
    done = await run(host, ["printf", "%s|", "a b", "$HOME", "*"])
    assert done.out == b"a b|$HOME|*|"


@pytest.mark.parametrize("tty", [None, {"rows": 24, "columns": 80}])
async def test_a_command_line_may_have_all_the_bytes_of_a_request(host: Host, tty: dict[str, int] | None) -> None:
    line = f"echo $0; X='{'x' * 250_000}'\nfor i in 1; do echo ${{#X}}; done; ls /dev/fd | wc -w; exit 7"
    usual = await run(host, "echo $0; echo 250000; ls /dev/fd | wc -w; exit 7", tty=tty)
    done = await run(host, line, tty=tty)
    assert (done.out, done.err) == (usual.out, b"")
    assert done.exited["exit_status"] == 7


async def test_environment_and_directory(host: Host, tmp_path: Path) -> None:
    (tmp_path / "home" / "sub").mkdir()
    done = await run(host, 'echo "$X $PWD $HOME"', env={"X": "y"}, cwd="sub")
    home = tmp_path / "home"
    assert done.out.decode().split() == ["y", str(home / "sub"), str(home)]


async def test_standard_input(host: Host) -> None:
    cat = await start(host, "cat; echo end", stdin=True)
    await cat.stream.write(b"one\n")
    await cat.until(b"one\n")
    await cat.stream.write(b"x" * 300_000)
    cat.stream.end()
    assert (await cat.end()).out == b"one\n" + b"x" * 300_000 + b"end\n"


async def test_without_input_there_is_none(host: Host) -> None:
    assert (await run(host, "cat; echo end")).out == b"end\n"


async def test_input_that_nobody_reads_is_dropped(host: Host) -> None:
    done = await start(host, "exec <&-; sleep 0.2; echo end", stdin=True)
    await done.stream.write(b"x" * 600_000)
    assert (await done.end()).out == b"end\n"


async def test_much_output_arrives_whole(host: Host) -> None:
    count = 8 * 1024 * 1024
    done = await run(host, f"head -c {count} /dev/zero | tr '\\0' x")
    assert (len(done.out), done.skipped) == (count, 0)


async def test_slow_reader_holds_the_command(host: Host, tmp_path: Path) -> None:
    writer = await start(host, "head -c 4000000 /dev/zero; touch done")
    await asyncio.sleep(0.5)  # nobody reads: nothing happens
    assert not (tmp_path / "home" / "done").exists()
    assert len((await writer.end()).out) == 4_000_000
    assert writer.skipped == 0


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"command": ["no-such-program"]}, "command_not_found"),
        ({"command": ["/etc"]}, "cannot_start"),
        ({"command": "true", "cwd": "nowhere"}, "bad_cwd"),
        ({"command": []}, "bad_params"),
        ({"command": ["a\0b"]}, "bad_params"),
        ({"command": "true", "env": {"A=B": "c"}}, "bad_params"),
        ({"command": "true", "timeout_s": 0}, "bad_params"),
        ({"command": "true", "tty": {"rows": 0, "columns": 1}}, "bad_params"),
        ({"command": "true", "stdin": "yes"}, "bad_params"),
    ],
)
async def test_refusals(host: Host, request_: dict[str, Any], code: str) -> None:
    with pytest.raises(StreamResetError) as refused:
        await run(host, **request_)
    assert refused.value.code == code
    assert await commands(host) == []


async def test_too_large_a_request_is_refused_unread(host: Host) -> None:
    assert host.link is not None
    stream = await host.link.open("exec.start")
    await stream.write(REQUEST_HEADER.pack(2**32 - 1))
    with pytest.raises(StreamResetError, match="too_large"):
        await stream.read()


async def test_timeout_ends_the_whole_session(host: Host) -> None:
    done = await run(host, "sleep 300 & echo $!; trap '' TERM; while :; do sleep 0.1; done", timeout_s=0.5)
    assert done.exited == {"exit_status": None, "signal": signal.SIGKILL, "timed_out": True, "out_of_memory": False}
    await wait_gone(int(done.out))


SERVER = "while :; do echo still here; echo x >> beats; sleep 0.05; done"


@pytest.mark.parametrize(
    "line", [f"({SERVER}) & echo $!", f"(({SERVER}) & echo $!)", f"nohup sh -c '{SERVER}' & echo $!"]
)
async def test_what_a_command_leaves_goes_on(host: Host, tmp_path: Path, line: str) -> None:
    """A server that was begun with `&` and prints: it gets no SIGPIPE, and what it prints holds nobody."""
    done = await run(host, line, cwd=str(tmp_path), background=True)
    assert done.exited["exit_status"] == 0
    pid = int(re.findall(rb"[0-9]+", done.out)[0])
    try:
        beats = tmp_path / "beats"
        async with asyncio.timeout(60):
            while not beats.exists() or beats.stat().st_size < 20:  # noqa: ASYNC110 (nothing tells)
                await asyncio.sleep(0.01)
        os.kill(pid, 0)
        [listed] = await commands(host)
        assert not listed["running"]
    finally:
        os.killpg(os.getpgid(pid), signal.SIGKILL)


async def test_few_that_ended_are_still_read(host: Host) -> None:
    pids = []
    for _ in range(OPEN_MAX + 2):
        done = await run(host, "sleep 300 & echo $!")
        pids.append(int(done.out))
    assert host.agent._commands is not None
    assert sum(command.is_open for command in host.agent._commands._open) <= OPEN_MAX + 1
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming root takes root")
async def test_root_and_home(host: Host) -> None:
    done = await run(host, "id -u; echo $HOME $USER; pwd", kind="root.exec.start", cwd="~")
    assert done.out.split() == [b"0", b"/root", b"root", b"/root"]
    done = await run(host, "pwd", cwd="~/..")
    assert Path(done.out.decode().strip()).samefile(host.paths.home / "..")  # noqa: ASYNC240


async def test_client_that_goes_takes_its_command(host: Host) -> None:
    command = await start(host, "sleep 300 & echo $!; wait")
    await command.until(b"\n")
    command.stream.reset()
    await wait_gone(int(command.out))
    await wait_gone(command.started["pid"])
    await wait_commands(host, lambda listed: not listed)


async def test_background_survives_its_client(host: Host) -> None:
    command = await start(host, "echo one; read line; echo $line", background=True, stdin=True)
    await command.until(b"one\n")
    command.stream.reset()
    [listed] = await commands(host)
    assert (listed["running"], listed["background"]) == (True, True)
    assert host.link is not None
    stream = await host.link.open("exec.attach", {"command_id": listed["command_id"], "stdin": True})
    assert stream.result["pid"] == command.started["pid"]
    await stream.write(b"two\n")
    again = await Followed(stream).end()
    assert (again.out, again.exited["exit_status"]) == (b"one\ntwo\n", 0)
    assert not (await commands(host))[0]["running"]
    await host.call("exec.kill", command_id=listed["command_id"])
    assert await commands(host) == []


async def test_new_session_keeps_commands_of_the_old_one(host: Host) -> None:
    command = await start(host, "echo one; sleep 300")
    await command.until(b"one\n")
    await host.hello(restored=True)
    [listed] = await commands(host)
    assert (listed["running"], listed["background"]) == (True, True)
    async with attached(host, command.started["command_id"]) as again:
        await again.until(b"one\n")
        await host.call("exec.signal", command_id=listed["command_id"], signal=int(signal.SIGTERM))
        assert (await again.end()).exited["signal"] == signal.SIGTERM


async def test_slow_attached_reader_misses_output_and_is_told(host: Host) -> None:
    command = await start(host, "head -c 3000000 /dev/zero; echo end", background=True)
    await wait_commands(host, lambda listed: not listed[0]["running"])
    async with attached(host, command.started["command_id"]) as late:
        await late.end()
    assert late.skipped + len(late.out) == 3_000_004
    assert late.out.endswith(b"end\n")
    assert len(late.out) <= LOG_BYTES_MAX


async def test_signal(host: Host) -> None:
    command = await start(host, "trap 'echo got; exit 7' INT; echo ready; while :; do sleep 0.05; done")
    await command.until(b"ready\n")
    await host.call("exec.signal", command_id=command.started["command_id"], signal=int(signal.SIGINT))
    done = await command.end()
    assert (done.out, done.exited["exit_status"]) == (b"ready\ngot\n", 7)


async def test_unknown_command(host: Host) -> None:
    with pytest.raises(OpenRejectedError, match="unknown_command"):
        await host.call("exec.kill", command_id="nothing")


async def test_terminal(host: Host) -> None:
    shell = await start(host, ["/bin/bash", "--norc", "-i"], tty={"rows": 30, "columns": 90}, env={"PS1": "> "})
    await shell.stream.write(b"stty size; tty; test -t 2 && echo th''ree\n")
    await shell.until(b"three\r\n")
    assert b"30 90\r\n" in shell.out
    await host.call("exec.resize", command_id=shell.started["command_id"], rows=10, columns=20)
    await shell.stream.write(b"stty size\n")
    await shell.until(b"10 20\r\n")
    # What prints has the terminal already, so that the interrupt is for it.
    await shell.stream.write(b"sh -c 'echo beg\"\"un; exec sleep 300'\n")
    await shell.until(b"begun\r\n")
    await shell.stream.write(b"\x03")
    await shell.stream.write(b"PS1=st''ill; echo\n")
    await shell.until(b"still")  # the prompt: a Ctrl-D that comes while the shell reads no line may be lost
    shell.stream.end()  # Ctrl-D
    assert (await shell.end()).exited["signal"] is None


async def test_jobs_of_an_interactive_shell_end_with_it(host: Host) -> None:
    shell = await start(host, ["/bin/bash", "--norc", "-i"], tty={"rows": 30, "columns": 90}, env={"PS1": "> "})
    await shell.stream.write(b"sleep 300 &\necho pid=$! don''e\n")
    await shell.until(b"done\r\n")
    pid = int(shell.out.rpartition(b"pid=")[2].split()[0])
    shell.stream.reset()
    await wait_gone(pid)
    await wait_gone(shell.started["pid"])


async def test_many_at_once(host: Host) -> None:
    done = await asyncio.gather(*(run(host, f"echo {number}") for number in range(40)))
    assert [int(each.out) for each in done] == list(range(40))
    running = [await start(host, "sleep 300") for _ in range(64)]
    with pytest.raises(StreamResetError, match="too_many_commands"):
        await start(host, "true")
    await asyncio.gather(*(host.call("exec.kill", command_id=each.started["command_id"]) for each in running))


def test_log_keeps_the_newest_and_says_what_is_missing() -> None:
    log = OutputLog()
    cursor = Cursor()
    assert log.read(cursor) is None
    log.append(1, b"a")
    log.append(1, b"b")
    log.append(2, b"c")
    assert [output.data for output in iter(lambda: log.read(cursor), None)] == [b"ab", b"c"]
    log.append(2, b"d")
    assert not log.is_far_ahead(cursor)
    for _ in range(40):
        log.append(1, b"x" * 32768)
    assert log.is_far_ahead(cursor)
    outputs = list(iter(lambda: log.read(cursor), None))
    assert outputs[0].skipped_bytes + sum(len(output.data) for output in outputs) == 1 + 40 * 32768
    assert not log.is_far_ahead(cursor)


def test_log_of_tiny_pieces_is_bounded() -> None:
    log = OutputLog()
    cursor = Cursor()
    for number in range(20_000):
        log.append(1 + number % 2, b"x")
    assert log.is_far_ahead(cursor)
    first = log.read(cursor)
    assert first is not None
    assert first.skipped_bytes > 0
    assert AHEAD_BYTES_MAX < LOG_BYTES_MAX


async def test_what_a_machine_uses_is_measured(host: Host) -> None:
    before = await host.call("machine.usage")
    assert before["memory_total_bytes"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    spin = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
    try:
        async with asyncio.timeout(60):
            while (now := await host.call("machine.usage"))["cpu_used_ms"] < before["cpu_used_ms"] + 500:
                pass
    finally:
        spin.kill()
        await spin.wait()
    assert 0 < now["cpu_percent"] <= 100
    assert 0 < now["disk_used_bytes"] <= now["disk_total_bytes"]
