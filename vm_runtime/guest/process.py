"""Starts the process of a command, with pipes or a terminal, and finds the processes of its session. It blocks."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vm_runtime.guest.kernel_manager import User
from vm_runtime.guest.limits import Group
from vm_runtime.wire.command_frames import CommandFrame

# The most that one argument may have, with its final zero: MAX_ARG_STRLEN in linux/binfmts.h.
ARGUMENT_BYTES_MAX = 32 * 4096

# As the kernel's (zygote.KERNEL_OOM_SCORE_ADJ): where memory is short it is the larger of the two that ends.
COMMAND_OOM_SCORE_ADJ = 500


@dataclass(frozen=True, kw_only=True)
class CommandSpec:
    """A command line for /bin/bash (else /bin/sh), or a program and its arguments.

    cwd: from the home directory, which it is where None.
    size: (rows, columns) of its terminal, None for pipes.
    stdin: whether there is any (a terminal always has it).
    timeout_s: None for no limit.
    """

    command: str | tuple[str, ...]
    cwd: str | None
    env: Mapping[str, str]
    size: tuple[int, int] | None
    stdin: bool
    background: bool
    timeout_s: float | None

    @property
    def program(self) -> str:
        return _shell() if isinstance(self.command, str) else self.command[0]


@dataclass(frozen=True, kw_only=True)
class Started:
    """A process and our ends, all non-blocking. outputs: the kind of frame by descriptor. With a terminal, all of them
    are tty_fd."""

    process: subprocess.Popen[bytes]
    stdin_fd: int | None
    outputs: Mapping[int, int]
    tty_fd: int | None


def start(spec: CommandSpec, *, cwd: str, env: Mapping[str, str], user: User | None, group: Group) -> Started:
    """Raises OSError, and ValueError for what no process can be given."""
    with ExitStack() as theirs:
        # preexec_fn, since some of it is root's alone and must hold for all that the command forks: some system calls,
        # of which none waits.
        how: dict[str, Any] = {
            "args": _arguments(spec), "cwd": cwd, "env": dict(env), "start_new_session": True,
            "preexec_fn": partial(_become, user, group),
        }  # fmt: skip
        if isinstance(spec.command, str) and len(script := os.fsencode(spec.command)) >= ARGUMENT_BYTES_MAX:
            fd = os.memfd_create("command")
            theirs.callback(os.close, fd)
            os.pwrite(fd, script, 0)
            how |= {"args": (_shell(), "-c", f'eval "$(cat /dev/fd/{fd})" {fd}<&-'), "pass_fds": [fd]}
        if spec.size is not None:
            return _start_on_terminal(spec.size, owner=user, how=how)
        return _start_on_pipes(spec, how=how)


def _arguments(spec: CommandSpec) -> tuple[str, ...]:
    return (_shell(), "-c", spec.command) if isinstance(spec.command, str) else tuple(spec.command)


def _start_on_pipes(spec: CommandSpec, *, how: Mapping[str, Any]) -> Started:
    with ExitStack() as theirs, ExitStack() as ours:
        stdin_fd: int | None = None
        child_stdin = subprocess.DEVNULL
        if spec.stdin:
            child_stdin, stdin_fd = _pipe(theirs, ours)
        stdout_fd, child_stdout = _pipe(ours, theirs)
        stderr_fd, child_stderr = _pipe(ours, theirs)
        process = subprocess.Popen(stdin=child_stdin, stdout=child_stdout, stderr=child_stderr, **how)
        for fd in (stdout_fd, stderr_fd, *((stdin_fd,) if stdin_fd is not None else ())):
            os.set_blocking(fd, False)
        ours.pop_all()
        outputs = {stdout_fd: int(CommandFrame.STDOUT), stderr_fd: int(CommandFrame.STDERR)}
        return Started(process=process, stdin_fd=stdin_fd, outputs=outputs, tty_fd=None)


def _start_on_terminal(size: tuple[int, int], *, owner: User | None, how: Mapping[str, Any]) -> Started:
    with ExitStack() as theirs, ExitStack() as ours:
        master, slave = pty.openpty()
        ours.callback(os.close, master)
        theirs.callback(os.close, slave)
        set_size(master, rows=size[0], columns=size[1])
        if owner is not None:
            os.fchown(slave, owner.uid, owner.gid)
        prepare = how["preexec_fn"]

        def take_terminal() -> None:
            prepare()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        process = subprocess.Popen(stdin=slave, stdout=slave, stderr=slave, **{**how, "preexec_fn": take_terminal})
        os.set_blocking(master, False)
        ours.pop_all()
        return Started(process=process, stdin_fd=master, outputs={master: int(CommandFrame.STDOUT)}, tty_fd=master)


def _become(user: User | None, group: Group) -> None:
    """In the child. The agent's own place in the order of who dies when memory is short (init.OOM_SCORE_ADJ) is not for
    commands."""
    group.add(os.getpid())
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    os.write(fd, b"%d" % COMMAND_OOM_SCORE_ADJ)
    os.close(fd)
    if user is not None:
        os.setgroups([])
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)


def _pipe(read_owner: ExitStack, write_owner: ExitStack) -> tuple[int, int]:
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    read_owner.callback(os.close, read_fd)
    write_owner.callback(os.close, write_fd)
    return read_fd, write_fd


def _shell() -> str:
    return "/bin/bash" if Path("/bin/bash").exists() else "/bin/sh"


def set_size(tty_fd: int, *, rows: int, columns: int) -> None:
    """A terminal's size; its foreground processes get SIGWINCH."""
    fcntl.ioctl(tty_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def session_members(session: int) -> list[int]:
    """The pids of all processes of a session, its leader included, even as a zombie."""
    members = []
    for entry in os.listdir("/proc"):  # noqa: PTH208 (a Path per process takes time in an emulated guest)
        if not entry.isdigit():
            continue
        try:
            # pid (name, which may hold anything) state ppid pgrp session ...: man proc_pid_stat
            fields = Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split(None, 4)
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[3]) == session and (fields[0] not in b"ZX" or int(entry) == session):
            members.append(int(entry))
    return members
