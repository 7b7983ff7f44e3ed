"""Processes as the gateway sees them: the client of the spawner, and a VMM's life and death through its pidfd.

Knows no VMM. One that this process did not start can be watched too; only its exit status is then unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import vm_runtime
from vm_runtime.confinement.namespaces import Confinement
from vm_runtime.confinement.spawner import MAX_PACKET_BYTES
from vm_runtime.errors import SpawnError

# The helper reaps a VMM in the moment its pidfd becomes readable; a busy host may take this long to run it.
_STATUS_WAIT_S = 2.0
# A start takes 20 ms, and some seconds of a host with ten times the work it has CPUs for.
_START_TIMEOUT_S = 10.0
# The helper ends by itself when its channel is closed.
_END_TIMEOUT_S = 5.0

_BOOTSTRAP = "import sys; sys.path.insert(0, {path!r}); from vm_runtime.confinement.spawner import main; main()"


@dataclass(frozen=True, kw_only=True)
class SpawnRequest:
    """A program to start confined. descriptors: the first becomes stdout and stderr, the others 3, 4, ...; with stdio=3
    the first three become stdin, stdout and stderr. namespaces: CLONE_* flags. cgroups: `cgroup.procs` files."""

    argv: Sequence[str]
    env: Mapping[str, str]
    descriptors: Sequence[int]
    confinement: Confinement
    namespaces: int
    cgroups: Sequence[str]
    stdio: Literal[1, 3] = 1


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a process ended; both None where nobody could see it."""

    exit_status: int | None = None
    signal: int | None = None


class Process:
    """A running program, held by a pidfd so that its number can never mean another one. `close()` when done."""

    def __init__(self, pid: int, pidfd: int, spawner: Spawner | None) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._spawner = spawner

    @classmethod
    def find(cls, pid: int, start_time: int) -> Process | None:
        """The process with this number and start time (see `start_time`), or None if it is gone."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        if start_time_ticks(pid) != start_time:
            os.close(pidfd)
            return None
        return cls(pid, pidfd, None)

    def send_signal(self, number: int) -> None:
        """Harmless if it has ended or was let go."""
        if self._pidfd < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> Exit:
        """Wait until it has ended."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        pidfd = os.dup(self._pidfd)  # so that several tasks can wait
        loop.add_reader(pidfd, _resolve, ended)
        try:
            await ended
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        return await self._spawner.exit_of(self.pid) if self._spawner is not None else Exit()

    def close(self) -> None:
        """Give the pidfd back; twice is harmless."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


class Spawner:
    """The gateway's end of the helper process. `await close()` at the end; VMMs go on running."""

    def __init__(self) -> None:
        self._channel: socket.socket | None = None
        self._helper: asyncio.subprocess.Process | None = None
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}
        self._exits: dict[int, asyncio.Future[Exit]] = {}
        self._answered: set[int] = set()  # programs of the present helper that somebody was given
        self._start_lock = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the helper if there is none (it is started anew if it was killed)."""
        async with self._start_lock:
            if self._channel is not None:
                return
            await self._forget_helper()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            package_parent = str(Path(vm_runtime.__path__[0]).parent)
            with theirs:
                self._helper = await asyncio.create_subprocess_exec(
                    sys.executable, "-I", "-S", "-c", _BOOTSTRAP.format(path=package_parent), str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            self._channel = ours
            self._answered.clear()
            self._reader = asyncio.create_task(self._read(ours), name="spawner reader")

    async def spawn(self, request: SpawnRequest) -> tuple[Process, list[str]]:
        """Start a program; answers it and what of its limits was not allowed. SpawnError if it was not executed."""
        message = {
            "argv": list(request.argv),
            "env": dict(request.env),
            "confinement": asdict(request.confinement),
            "namespaces": request.namespaces,
            "cgroups": list(request.cgroups),
            "stdio": request.stdio,
        }
        asking = asyncio.create_task(self._ask(message, request.descriptors))
        try:
            answer, descriptors = await asyncio.shield(asking)
        except asyncio.CancelledError:
            # It is being started; wait for it, so that nothing of it is left when the caller cleans up.
            with contextlib.suppress(SpawnError):
                answer, descriptors = await asking
                if "pid" in answer:
                    unwanted = Process(int(answer["pid"]), descriptors[0], self)
                    unwanted.send_signal(signal.SIGKILL)
                    await unwanted.wait()
                    unwanted.close()
            raise
        if "error" in answer:
            raise SpawnError(f"{request.argv[0]} could not be started: {answer['error']}")
        return Process(int(answer["pid"]), descriptors[0], self), list(answer["problems"])

    async def watch(self, pid: int) -> Process:
        """A process that a program of ours has left when it ended. SpawnError if there is none."""
        answer, descriptors = await self._ask({"watch": pid}, ())
        if "error" in answer:
            raise SpawnError(f"The process {pid} is not there: {answer['error']}")
        return Process(pid, descriptors[0], self)

    async def keep(self, process: Process) -> None:
        """Let a program outlive the helper: call it when a later gateway can find it. Harmless if it has ended."""
        if self._channel is None:
            raise SpawnError("The spawner has ended, and with it the program.")
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await self._send(self._channel, json.dumps({"keep": process.pid}).encode(), [])
        except OSError as error:  # TimeoutError is one
            raise SpawnError(f"The spawner cannot be reached: {error}") from error

    async def probe(self, *, user_namespace: bool, devices: Sequence[str]) -> dict[str, Any]:
        """Which namespaces and mounts this host allows; see the helper's module for the answer."""
        answer, _ = await self._ask({"probe": True, "user_namespace": user_namespace, "devices": list(devices)}, ())
        if "error" in answer:
            raise SpawnError(f"The host's namespaces could not be tried: {answer['error']}")
        return answer

    async def exit_of(self, pid: int) -> Exit:
        """Exit status of a program that has ended; unknown if the helper ended before it."""
        future = self._exits.get(pid)
        if future is None:
            return Exit()
        try:
            async with asyncio.timeout(_STATUS_WAIT_S):
                return await asyncio.shield(future)
        except TimeoutError:
            return Exit()

    async def close(self) -> None:
        """End the helper; twice is harmless."""
        if self._channel is not None:
            self._lost()
        await self._forget_helper()

    async def _forget_helper(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
            self._reader = None
        if self._helper is not None:
            for _ in range(2):
                try:
                    async with asyncio.timeout(_END_TIMEOUT_S):
                        await self._helper.wait()
                except TimeoutError:
                    self._end_helper(self._helper)
            self._helper = None

    def _end_helper(self, helper: asyncio.subprocess.Process) -> None:
        """One that hangs. What it has started and not answered yet ends with it: nobody knows of that."""
        children = Path(f"/proc/{helper.pid}/task/{helper.pid}/children")
        with contextlib.suppress(ProcessLookupError):
            helper.send_signal(signal.SIGSTOP)  # so that it neither starts more nor lets a number be used again
            for child in children.read_text().split() if children.exists() else ():
                if int(child) not in self._answered:
                    os.kill(int(child), signal.SIGKILL)
            helper.kill()

    async def _ask(self, message: Mapping[str, Any], descriptors: Sequence[int]) -> tuple[dict[str, Any], list[int]]:
        await self.start()
        assert self._channel is not None
        loop = asyncio.get_running_loop()
        request_id = next(self._ids)
        data = json.dumps({"id": request_id, **message}).encode()
        if len(data) > MAX_PACKET_BYTES:
            raise SpawnError(f"An argument vector of {len(data)} bytes is too long.")
        future: asyncio.Future[tuple[dict[str, Any], list[int]]] = loop.create_future()
        self._answers[request_id] = future
        channel, helper = self._channel, self._helper
        try:
            try:
                async with asyncio.timeout(_START_TIMEOUT_S):
                    await self._send(channel, data, descriptors)
                    return await asyncio.shield(future)
            finally:
                if not future.done():
                    # Its answer may still come; a program that nobody waits for is ended then.
                    future.add_done_callback(_end_unwanted)
        except TimeoutError as error:
            if helper is not None and channel is self._channel:
                self._end_helper(helper)
                self._lost()  # the next request starts another
            raise SpawnError(f"The spawner gave no answer within {_START_TIMEOUT_S:.0f} s.") from error
        except OSError as error:
            raise SpawnError(f"The spawner cannot be reached: {error}") from error

    async def _send(self, channel: socket.socket, data: bytes, descriptors: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                socket.send_fds(channel, [data], list(descriptors))
                return
            except BlockingIOError:
                writable: asyncio.Future[None] = loop.create_future()
                loop.add_writer(channel, _resolve, writable)
                try:
                    await writable
                finally:
                    loop.remove_writer(channel)

    async def _read(self, channel: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(channel, readable.set)
        try:
            while True:
                await readable.wait()
                readable.clear()
                while (packet := _receive(channel)) is not None:
                    message, descriptors = packet
                    if not message:
                        return
                    self._handle(json.loads(message), descriptors)
        finally:
            if self._channel is channel:
                self._lost()

    def _handle(self, message: dict[str, Any], descriptors: list[int]) -> None:
        if "exited" in message:
            pid = int(message["exited"])
            self._answered.discard(pid)
            future = self._exits.setdefault(pid, asyncio.get_running_loop().create_future())
            if not future.done():
                future.set_result(Exit(exit_status=message.get("exit_status"), signal=message.get("signal")))
            return
        if "pid" in message:
            # A number that was used before: what was known about it concerns an earlier process.
            self._exits[int(message["pid"])] = asyncio.get_running_loop().create_future()
            self._answered.add(int(message["pid"]))
        answer = self._answers.pop(int(message["id"]), None)
        if answer is not None and not answer.done():
            answer.set_result((message, descriptors))
        else:
            for fd in descriptors:
                os.close(fd)

    def _lost(self) -> None:
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel)
            self._channel.close()
            self._channel = None
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(SpawnError("The spawner ended before it answered."))
        self._answers.clear()
        for future in self._exits.values():
            if not future.done():
                future.set_result(Exit())
        self._exits.clear()


def start_time_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with the pid that names it for good. None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold blanks and parentheses (proc(5))
    return None if fields[0] in "ZX" else int(fields[19])


def boot_id() -> str:
    """Names this boot of the host: pids and start times mean nothing after the next one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _end_unwanted(future: asyncio.Future[tuple[dict[str, Any], list[int]]]) -> None:
    if future.cancelled() or future.exception() is not None:
        return
    for fd in future.result()[1]:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        os.close(fd)


def _receive(channel: socket.socket) -> tuple[bytes, list[int]] | None:
    """One packet, b"" at the end, None if there is none now."""
    try:
        data, descriptors, _, _ = socket.recv_fds(channel, MAX_PACKET_BYTES, 4)
    except BlockingIOError:
        return None
    except OSError:
        return b"", []
    return data, descriptors
