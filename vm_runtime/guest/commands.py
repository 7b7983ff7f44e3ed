"""The commands that the agent runs for the host: a registry of them, and one object per command until it is forgotten.

Knows nothing of the wire. A command leads a session of its own. What it leaves running when it ends goes on, and what
that still prints is read; what is killed, or has used its time up, is killed with all that it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

from vm_runtime.guest.keeper import User
from vm_runtime.guest.limits import Group, UserLimits
from vm_runtime.guest.output import Cursor, OutputLog
from vm_runtime.guest.params import from_home
from vm_runtime.guest.process import CommandSpec, Started, session_members, set_size, start
from vm_runtime.guest.user_threads import UserThreads
from vm_runtime.wire.errors import OpenRejectedError

# More at a time than any machine here has CPUs for, and a bound of what their output takes (output.LOG_BYTES_MAX).
RUNNING_MAX = 64

# Ended ones whose exit and last output can still be fetched; then the oldest is forgotten.
ENDED_MAX = 32

# Ended ones whose processes still have their outputs open, as servers begun with `&` have. Of more, the oldest ones'
# are closed; what prints then gets a SIGPIPE. It bounds the agent's descriptors.
OPEN_MAX = 64

# Between the polite signal and SIGKILL, where a command's time is up or its client has gone.
GRACE_S = 2.0

# A session that forks as fast as it is killed is given up after so many rounds; each finds nearly all of them.
KILL_ROUNDS = 8

READ_BYTES = 64 * 1024

# The most that is in a pipe when its writer ends; others that write on must not hold us.
REST_BYTES = 64 * 1024

# What a shell ends with when what it ran was killed.
KILLED_STATUS = 128 + signal.SIGKILL

# How much of a command is shown in lists.
SHOWN_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a command ended: exit_status or signal is None. out_of_memory: vmlinux ended it, or for a shell what it ran,
    because memory ran out."""

    exit_status: int | None
    signal: int | None
    timed_out: bool
    out_of_memory: bool


class Command:
    """A command that runs or has ended. `log` has its output; `changed` is set whenever there is more, or its end.

    background: it stays when its client goes. owner: the cursor of a reader that must miss nothing. group: that of its
    process; `resources` are closed when it has ended.
    """

    def __init__(self, spec: CommandSpec, started: Started, *, group: Group, resources: ExitStack) -> None:
        self.id = secrets.token_hex(6)
        self.spec = spec
        self.pid = started.process.pid
        self.background = spec.background
        self.log = OutputLog()
        self.owner: Cursor | None = None
        self.exit: Exit | None = None
        self.started_at = time.time()
        self._group = group
        self._resources = resources
        self._oom_kills = group.oom_kills()
        self._process = started.process
        self._stdin_fd = started.stdin_fd
        self._tty_fd = started.tty_fd
        self._outputs = dict(started.outputs)  # kind by descriptor
        self._paused = False
        self._is_given_up = False
        self._watchers: set[asyncio.Event] = set()
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._ending: asyncio.Task[None] | None = None
        self._supervisor = asyncio.create_task(self._supervise(), name=f"command {self.id}")
        for fd in self._outputs:
            self._loop.add_reader(fd, self._read, fd)

    def describe(self) -> dict[str, Any]:
        """For lists, as JSON."""
        shown = self.spec.command if isinstance(self.spec.command, str) else " ".join(self.spec.command)
        return {
            "command_id": self.id,
            "pid": self.pid,
            "command": shown[:SHOWN_CHARACTERS],
            "cwd": self.spec.cwd,
            "background": self.background,
            "tty": self.spec.size is not None,
            "started_at": self.started_at,
            "output_bytes": self.log.total_bytes,
            "running": self.exit is None,
            "exit_status": self.exit.exit_status if self.exit else None,
            "signal": self.exit.signal if self.exit else None,
            "timed_out": self.exit.timed_out if self.exit else False,
            "out_of_memory": self.exit.out_of_memory if self.exit else False,
        }

    # Output

    @contextlib.contextmanager
    def watching(self) -> Any:
        """An event that is set when there is more output, or the end."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            yield event
        finally:
            self._watchers.discard(event)

    def resume(self) -> None:
        """The owner has read on, or there is none any more: read further if that was what stopped us."""
        if self._paused and not self._is_far_ahead():
            self._paused = False
            for fd in self._outputs:
                self._loop.add_reader(fd, self._read, fd)

    def _is_far_ahead(self) -> bool:
        return self.owner is not None and self.log.is_far_ahead(self.owner)

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:  # EIO: nobody has the terminal open any more
            data = b""
        if not data:
            self._close_output(fd)
            return
        self.log.append(self._outputs[fd], data)
        self._notify()
        if self._is_far_ahead() and not self._paused:
            self._paused = True
            for output in self._outputs:
                self._loop.remove_reader(output)

    def _read_rest(self) -> None:
        for fd, kind in list(self._outputs.items()):
            left = REST_BYTES
            with contextlib.suppress(BlockingIOError, OSError):
                while left > 0 and (data := os.read(fd, left)):
                    self.log.append(kind, data)
                    left -= len(data)

    @property
    def is_open(self) -> bool:
        """Whether there is someone who may still print."""
        return bool(self._outputs)

    def close_outputs(self) -> None:
        """Read no more. Twice is harmless."""
        for fd in list(self._outputs):
            self._close_output(fd)

    def _close_output(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        del self._outputs[fd]
        if fd != self._tty_fd:
            os.close(fd)

    def _notify(self) -> None:
        for event in self._watchers:
            event.set()

    # Input

    async def write(self, data: bytes) -> bool:
        """Write to its standard input, waiting for room. False when it takes no more. One writer at a time."""
        view = memoryview(data)
        while view:
            if self._stdin_fd is None:
                return False
            try:
                view = view[os.write(self._stdin_fd, view) :]
            except BlockingIOError:
                await self._writable()
            except OSError:
                self.close_stdin()
                return False
        return True

    async def _writable(self) -> None:
        assert self._stdin_fd is not None
        fd = self._stdin_fd
        ready = asyncio.Event()
        ended = asyncio.create_task(self._ended.wait())
        waiting = asyncio.create_task(ready.wait())
        self._loop.add_writer(fd, ready.set)
        try:
            await asyncio.wait({ended, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            waiting.cancel()
            if self._stdin_fd == fd:
                self._loop.remove_writer(fd)

    def close_stdin(self) -> None:
        """The end of its input; on a terminal, where there is no such thing, the character for it (Ctrl-D)."""
        fd = self._stdin_fd
        if fd is None:
            return
        self._stdin_fd = None
        self._loop.remove_writer(fd)
        if fd == self._tty_fd:
            with contextlib.suppress(OSError):
                os.write(fd, b"\x04")
        else:
            os.close(fd)

    def resize(self, *, rows: int, columns: int) -> None:
        """Raises OpenRejectedError without a terminal."""
        if self._tty_fd is None:
            raise OpenRejectedError("no_terminal", f"Command {self.id} has no terminal, or has ended.")
        set_size(self._tty_fd, rows=rows, columns=columns)

    # Its end

    async def signal(self, number: int) -> None:
        """SIGTERM, SIGHUP and SIGKILL go to all of its session, others to the process group in the foreground."""
        if self.exit is not None:
            return
        if number in (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
            await self._signal_session(number)
            return
        group = self.pid
        if self._tty_fd is not None:
            with contextlib.suppress(OSError):
                group = os.tcgetpgrp(self._tty_fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)

    def end_soon(self) -> None:
        """Begin to end it: politely, and after GRACE_S with SIGKILL. Calling it again is harmless."""
        if self._ending is None and self.exit is None:
            self._is_given_up = True
            self._ending = asyncio.create_task(self._end(), name=f"end of command {self.id}")

    async def kill(self) -> None:
        """SIGKILL to all that it has started, and wait until it has ended."""
        if self.exit is None:
            self._is_given_up = True
            await self._kill_all()
        await self._ended.wait()

    async def wait_ended(self) -> None:
        await self._ended.wait()

    async def _end(self) -> None:
        # An interactive shell ignores SIGTERM; what ends it is that its terminal hangs up.
        polite = signal.SIGTERM if self._tty_fd is None else signal.SIGHUP
        await self._signal_session(polite)
        await self._signal_session(signal.SIGCONT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await self._ended.wait()
        if self.exit is None:
            await self._kill_all()

    async def _kill_all(self) -> None:
        self._group.kill()
        await self._signal_session(signal.SIGKILL)

    async def _signal_session(self, number: int) -> None:
        for pid in await asyncio.to_thread(session_members, self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def _supervise(self) -> None:
        timed_out = False
        exited = asyncio.Event()
        with _watching(self.pid, exited.set):
            try:
                async with asyncio.timeout(self.spec.timeout_s):
                    await exited.wait()
            except TimeoutError:
                timed_out = True
                self.end_soon()
                await exited.wait()
        # Not reaped yet, so its pid cannot be another's, and neither can the session's number.
        for _ in range(KILL_ROUNDS if self._is_given_up else 0):
            if await asyncio.to_thread(session_members, self.pid) == [self.pid]:
                break
            await self._signal_session(signal.SIGKILL)
        code = self._process.wait()  # a zombie: this does not wait
        self._read_rest()
        out_of_memory = code in (-signal.SIGKILL, KILLED_STATUS) and self._group.oom_kills() > self._oom_kills
        if self._is_given_up:
            self.close_outputs()
        self._release()
        self.exit = Exit(
            exit_status=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            timed_out=timed_out,
            out_of_memory=out_of_memory,
        )
        self._ended.set()
        self._notify()

    def _release(self) -> None:
        if self._stdin_fd is not None and self._stdin_fd != self._tty_fd:
            self._loop.remove_writer(self._stdin_fd)
            os.close(self._stdin_fd)
        self._stdin_fd = None
        if self._tty_fd is not None:
            self.close_outputs()  # as a terminal that hangs up
            self._loop.remove_writer(self._tty_fd)
            os.close(self._tty_fd)
            self._tty_fd = None
        self._resources.close()


@dataclass(frozen=True, kw_only=True)
class Account:
    """Whom commands run as. user: None for the agent's own. threads: with the rights of that user. environment: what
    each gets beside its own variables."""

    user: User | None
    home: str
    threads: UserThreads
    environment: Callable[[], Mapping[str, str]]


class Commands:
    """All commands. An async context manager: its end kills them all."""

    def __init__(self, account: Account, *, root: Account, limits: UserLimits) -> None:
        self._account = account
        self._root = root
        self._limits = limits
        self._commands: dict[str, Command] = {}
        self._open: deque[Command] = deque()  # oldest first; those whose outputs nobody has open any more among them
        self._starting = 0

    async def __aenter__(self) -> Commands:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(command.kill() for command in self._commands.values()))
        for command in self._open:
            command.close_outputs()
        self._commands.clear()

    async def start(self, spec: CommandSpec, *, as_root: bool = False) -> Command:
        """Start it. Raises OpenRejectedError: too_many_commands, bad_cwd, command_not_found, cannot_start."""
        running = sum(command.exit is None for command in self._commands.values())
        if running + self._starting >= RUNNING_MAX:
            raise OpenRejectedError("too_many_commands", f"{RUNNING_MAX} commands run already; end one first.")
        account = self._root if as_root else self._account
        cwd = str(Path(account.home, from_home(spec.cwd or "", account.home)))
        try:
            # Only who may enter a directory can name an entry of it.
            await account.threads.run(os.stat, f"{cwd}/.")
        except OSError as error:
            raise OpenRejectedError("bad_cwd", f"It cannot start in {cwd}: {error.strerror}.") from error
        env = {**account.environment(), **({"TERM": "xterm-256color"} if spec.size else {}), **spec.env}
        self._starting += 1
        resources = ExitStack()
        try:
            group = resources.enter_context(self._limits.command())
            starting = asyncio.create_task(
                asyncio.to_thread(start, spec, cwd=cwd, env=env, user=account.user, group=group)
            )
            try:
                command = Command(spec, await asyncio.shield(starting), group=group, resources=resources.pop_all())
            except asyncio.CancelledError:
                # It may have started all the same.
                with contextlib.suppress(OSError):
                    await Command(spec, await starting, group=group, resources=resources.pop_all()).kill()
                raise
        except FileNotFoundError as error:
            raise OpenRejectedError("command_not_found", f"There is no program {spec.program!r}.") from error
        except (OSError, ValueError, SubprocessError) as error:
            raise OpenRejectedError("cannot_start", f"{spec.program!r} cannot be started: {error}") from error
        finally:
            self._starting -= 1
            resources.close()  # where none was started
        self._commands[command.id] = command
        self._open.append(command)
        self._forget_oldest()
        return command

    def get(self, command_id: str) -> Command:
        """Raises OpenRejectedError unknown_command."""
        command = self._commands.get(command_id)
        if command is None:
            raise OpenRejectedError(
                "unknown_command", f"There is no command with the id {command_id[:64]!r}, or it is forgotten."
            )
        return command

    def all(self) -> list[Command]:
        """Oldest first."""
        return list(self._commands.values())

    def forget(self, command: Command) -> None:
        """Drop an ended one with its output; twice is harmless."""
        self._commands.pop(command.id, None)

    def _forget_oldest(self) -> None:
        ended = [command for command in self._commands.values() if command.exit is not None]
        for command in ended[: max(0, len(ended) - ENDED_MAX)]:
            self.forget(command)
        self._open = deque(command for command in self._open if command.is_open)
        left = [command for command in self._open if command.exit is not None]
        for command in left[: max(0, len(left) - OPEN_MAX)]:
            command.close_outputs()


@contextlib.contextmanager
def _watching(pid: int, on_exit: Callable[[], None]) -> Iterator[None]:
    """Within it `on_exit` is called in the event loop when a child has ended; it is not reaped."""
    loop = asyncio.get_running_loop()
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # gVisor has none

        def wait() -> None:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(on_exit)

        threading.Thread(target=wait, name=f"end of {pid}", daemon=True).start()
        yield
        return
    loop.add_reader(pidfd, on_exit)
    try:
        yield
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
