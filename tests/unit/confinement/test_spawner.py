"""The helper that starts VMMs: none outlives it that no later gateway could find; if it hangs it is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

import vm_runtime
from vm_runtime.confinement import process as process_module
from vm_runtime.confinement.namespaces import Confinement
from vm_runtime.confinement.process import Spawner, SpawnRequest
from vm_runtime.errors import SpawnError

_ROOT = str(Path(vm_runtime.__path__[0]).parent)
_HELPER = f"import sys; sys.path.insert(0, {_ROOT!r}); from vm_runtime.confinement.spawner import main; main()"
_CONFINEMENT = Confinement(uid=None, new_root=False, new_proc=False, read_only=(), devices=(), rlimits=())


@contextlib.contextmanager
def helper() -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-I", "-S", "-c", _HELPER, str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=(theirs.fileno(),)) as process:
        theirs.close()
        yield ours, process


def new_marker(number: int = 0) -> str:
    """How long a program sleeps: no other process of this host sleeps for just as long."""
    return f"300.{os.getpid()}{number:04}"


def spawn(channel: socket.socket, marker: str) -> None:
    request = {
        "id": 1,
        "argv": ["/bin/sleep", marker],
        "env": {},
        "confinement": asdict(_CONFINEMENT),
        "namespaces": 0,
        "cgroups": [],
        "stdio": 1,
    }
    null = os.open(os.devnull, os.O_WRONLY)
    socket.send_fds(channel, [json.dumps(request).encode()], [null])
    os.close(null)


def living(marker: str) -> list[int]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker.encode() in (directory / "cmdline").read_bytes() and int(directory.name) != os.getpid():
                found.append(int(directory.name))
    return found


@pytest.mark.parametrize("delay_ms", [0, 1, 2, 3, 4, 6, 8, 12, 20, 50])
def test_a_gateway_that_is_killed_while_a_program_starts_leaves_none(delay_ms: int) -> None:
    for attempt in range(5):
        marker = new_marker(10 * delay_ms + attempt)
        with helper() as (channel, process):
            spawn(channel, marker)
            time.sleep(delay_ms / 1000)
            channel.close()  # as a kill does
            process.wait(timeout=30)
        assert living(marker) == []


def test_what_it_can_no_longer_tell_does_not_keep_it_from_ending_the_program() -> None:
    """The program is being started when the gateway dies, in the order in which its end is seen last."""
    marker = new_marker()
    with helper() as (channel, process):
        process.send_signal(signal.SIGSTOP)
        spawn(channel, marker)
        channel.shutdown(socket.SHUT_RD)
        process.send_signal(signal.SIGCONT)
        process.wait(timeout=30)
    assert living(marker) == []


def test_a_program_that_is_kept_goes_on() -> None:
    marker = new_marker()
    with helper() as (channel, process):
        spawn(channel, marker)
        assert select.select([channel], [], [], 30)[0]
        data, fds, _, _ = socket.recv_fds(channel, 65536, 1)
        pid = json.loads(data)["pid"]
        channel.send(json.dumps({"keep": pid}).encode())
        channel.close()
        process.wait(timeout=30)
    assert pid in living(marker)
    for each in living(marker):
        os.kill(each, signal.SIGKILL)
    os.close(fds[0])


async def test_one_that_hangs_is_replaced_and_what_runs_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def request(marker: str) -> SpawnRequest:
        return SpawnRequest(
            argv=["/bin/sleep", marker], env={}, descriptors=[null], confinement=_CONFINEMENT, namespaces=0,
            cgroups=[],
        )  # fmt: skip

    spawner, markers = Spawner(), [new_marker(number) for number in range(4)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        before, _ = await spawner.spawn(request(markers[0]))
        helper = spawner._helper
        assert helper is not None
        helper.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(process_module, "_START_TIMEOUT_S", 0.5)
        starts = [asyncio.create_task(spawner.spawn(request(marker))) for marker in markers[1:3]]
        for start in starts:
            with pytest.raises(SpawnError):
                await start
        monkeypatch.undo()
        after, _ = await spawner.spawn(request(markers[3]))
        assert [len(living(marker)) for marker in markers] == [1, 0, 0, 1]
        assert spawner._helper is not None
        spawner._helper.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(process_module, "_END_TIMEOUT_S", 0.5)
    finally:
        await spawner.close()  # which does not wait for one that hangs
        os.close(null)
    for program in (before, after):
        program.send_signal(signal.SIGKILL)
        await program.wait()
        program.close()


@pytest.mark.parametrize("kept", [False, True])
async def test_what_a_program_has_left_is_watched_and_ends_with_the_helper_unless_it_is_kept(kept: bool) -> None:
    spawner, marker = Spawner(), new_marker(5000 + kept)
    reading, writing = os.pipe()
    request = SpawnRequest(
        argv=["/bin/sh", "-c", f"/bin/sleep {marker} <&- >&- 2>&- & echo $!"], env={}, descriptors=[writing],
        confinement=_CONFINEMENT, namespaces=0, cgroups=[],
    )  # fmt: skip
    try:
        program, _ = await spawner.spawn(request)
        assert (await program.wait()).exit_status == 0
        program.close()
        left = await spawner.watch(int(os.read(reading, 100)))
        assert left.pid in living(marker)
        with pytest.raises(SpawnError, match="not there"):
            await spawner.watch(os.getpid())
        if kept:
            await spawner.keep(left)
        else:
            other = await spawner.watch(left.pid)
            other.send_signal(signal.SIGKILL)
            assert (await left.wait()).signal == signal.SIGKILL
            other.close()
    finally:
        await spawner.close()
        os.close(reading)
        os.close(writing)
    assert (left.pid in living(marker)) == kept
    left.send_signal(signal.SIGKILL)
    await left.wait()
    left.close()


async def test_what_nobody_has_asked_to_watch_ends_with_the_helper() -> None:
    spawner, marker = Spawner(), new_marker(6000)
    null = os.open(os.devnull, os.O_WRONLY)
    request = SpawnRequest(
        argv=["/bin/sh", "-c", f"/bin/sleep {marker} &"], env={}, descriptors=[null],
        confinement=_CONFINEMENT, namespaces=0, cgroups=[],
    )  # fmt: skip
    try:
        program, _ = await spawner.spawn(request)
        await program.wait()
        program.close()
        assert living(marker)
    finally:
        await spawner.close()
        os.close(null)
    assert living(marker) == []


async def test_a_program_gets_all_three_of_its_standard_files() -> None:
    spawner = Spawner()
    ours, theirs = zip(*(os.pipe() for _ in range(2)), strict=True)
    stdin_read, stdin_write = os.pipe()
    request = SpawnRequest(
        argv=["/bin/sh", "-c", "read line; echo out $line; echo err >&2"], env={},
        descriptors=[stdin_read, *theirs], confinement=_CONFINEMENT, namespaces=0, cgroups=[],
        stdio=3,
    )  # fmt: skip
    try:
        os.write(stdin_write, b"word\n")
        program, _ = await spawner.spawn(request)
        assert (await program.wait()).exit_status == 0
        program.close()
        assert [os.read(fd, 100) for fd in ours] == [b"out word\n", b"err\n"]
    finally:
        await spawner.close()
        for fd in (*ours, *theirs, stdin_read, stdin_write):
            os.close(fd)
