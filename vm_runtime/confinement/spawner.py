"""The helper process that starts VMMs: single-threaded, small, so that cloning it is quick and safe.

Runs as `python -I -S`, standard library only; imports nothing of this project but `namespaces`. It knows no VMM: it
gets an argument vector. The gateway talks to it over a SOCK_SEQPACKET socket pair, one JSON object per packet:

    -> {"id", "argv", "env", "confinement": {...}, "namespaces": CLONE_* flags, "cgroups": [files], "stdio"}
       + descriptors: the first becomes stdout and stderr (stdio 1), or three do stdin, stdout and stderr (stdio 3); the
       others 3, 4, ... of the VMM
    <- {"id", "pid", "problems": [...]}  + a pidfd     the program has been executed
    <- {"id", "error"}                                 it has not; nothing is left
    -> {"id", "watch": pid}                            a process that such a program has left when it ended is a VMM
    <- {"id", "pid"}  + a pidfd
    -> {"keep": pid}                                   its record is written: it may outlive us from now on
    <- {"exited": pid, "exit_status"|"signal"}         a VMM has ended

    -> {"id", "probe": true}      <- {"id", "namespaces": [[name, errno]...], "root_error", "proc_error"}

VMMs outlive it: when the gateway's end closes it exits, and init adopts them. Those that were not kept yet are ended
then, since no later gateway could find them, and so are those that nobody has asked to watch.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

from vm_runtime.confinement.namespaces import (
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    NAMESPACES,
    Confinement,
    arrange_descriptors,
    clone,
    confine,
)

# One packet holds an argument vector (about 4 KiB) with room to spare; the socket's default buffer holds 200 KiB.
MAX_PACKET_BYTES = 65536
# The kernel's own limit for one message (SCM_MAX_FD, unix(7)).
MAX_DESCRIPTORS = 253
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


@dataclass
class _Starting:
    """A child that has not executed its program yet."""

    request_id: int
    pid: int
    pidfd: int
    problems: list[str]


class SpawnerLoop:
    """The helper's loop; `run()` returns when the gateway has closed its end."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._starting: dict[int, _Starting] = {}  # by the pipe on which it would tell an error
        self._children: set[int] = set()
        self._kept: set[int] = set()
        self._poll = select.poll()
        self._wakeup, wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def run(self) -> None:
        try:
            self._serve()
        except ConnectionError:
            pass  # the gateway was killed just before it was told something
        finally:
            self._end_unkept()

    def _serve(self) -> None:
        for fd in (self._channel.fileno(), self._wakeup):
            self._poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._channel.fileno():
                    if not self._receive():
                        return
                elif fd == self._wakeup:
                    os.read(fd, 4096)
                else:
                    self._started(fd)
            self._reap()

    def _receive(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._channel, MAX_PACKET_BYTES, MAX_DESCRIPTORS)
        if not data:
            return False
        request = json.loads(data)
        if "keep" in request:
            self._kept.add(request["keep"])
            return True
        try:
            if request.get("probe"):
                self._send(_probe(request))
            elif "watch" in request:
                self._watch(request["id"], request["watch"])
            else:
                self._spawn(request, descriptors)
        except OSError as error:
            self._send({"id": request["id"], "error": str(error)})
        finally:
            for fd in descriptors:
                os.close(fd)
        return True

    def _spawn(self, request: dict, descriptors: list[int]) -> None:  # type: ignore[type-arg]  # parsed JSON
        pid, status = _start_child(request["namespaces"], lambda status: _become(request, descriptors, status))
        pidfd = os.pidfd_open(pid)
        problems: list[str] = []
        # While the child confines itself, since moving a process waits for the host's other CPUs (some ms each).
        for path in request["cgroups"]:
            try:
                _write(path, str(pid))
            except OSError as error:
                problems.append(f"{path}: {error.strerror}")
        self._children.add(pid)
        self._starting[status] = _Starting(request["id"], pid, pidfd, problems)
        self._poll.register(status, select.POLLIN)

    def _watch(self, request_id: int, pid: int) -> None:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # an error if it is no child of ours
        pidfd = os.pidfd_open(pid)
        try:
            self._children.add(pid)
            self._send({"id": request_id, "pid": pid}, pidfd)
        finally:
            os.close(pidfd)

    def _started(self, fd: int) -> None:
        """A status pipe ended: without a word when exec closed it, with the error's text otherwise."""
        child = self._starting.pop(fd)
        self._poll.unregister(fd)
        error = os.read(fd, 4096)
        os.close(fd)
        if error:
            self._send({"id": child.request_id, "error": error.decode(errors="replace")})
        else:
            self._send({"id": child.request_id, "pid": child.pid, "problems": child.problems}, child.pidfd)
        os.close(child.pidfd)

    def _reap(self) -> None:
        for pid in list(self._children):
            # A child that still has to be reported as started stays a zombie until then: its pid must not be reused.
            if any(child.pid == pid for child in self._starting.values()):
                continue
            found, status = os.waitpid(pid, os.WNOHANG)
            if found == 0:
                continue
            self._children.discard(pid)
            self._kept.discard(pid)
            if os.WIFSIGNALED(status):
                self._send({"exited": pid, "signal": os.WTERMSIG(status)})
            else:
                self._send({"exited": pid, "exit_status": os.WEXITSTATUS(status)})

    def _end_unkept(self) -> None:
        # A program that was ended while it started a VMM leaves one that is known to nobody.
        while ended := (self._children | _children()) - self._kept:
            for pid in ended:
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            for pid in ended:
                os.waitpid(pid, 0)
            self._children -= ended

    def _send(self, message: dict[str, object], *descriptors: int) -> None:
        socket.send_fds(self._channel, [json.dumps(message).encode()], list(descriptors))


def _start_child(flags: int, run: Callable[[int], None]) -> tuple[int, int]:
    """A clone with these namespaces that runs `run(status)` and ends; its pid, and what reads from `status`."""
    read, status = os.pipe2(os.O_CLOEXEC)
    go_read, go_write = os.pipe2(os.O_CLOEXEC)
    pid = 0
    try:
        pid = clone(flags)
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                os.close(go_write)
                os.read(go_read, 1)  # ends when the parent has mapped our user
                run(status)
            finally:
                os._exit(127)
        if flags & CLONE_NEWUSER:
            _map_user(pid)
    except OSError:
        os.close(read)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
    finally:
        for fd in (status, go_read, go_write):
            os.close(fd)
    return pid, read


def _children() -> set[int]:
    """All processes whose parent this is."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:  # noqa: PTH123 - pathlib is slow to import
            return set(map(int, file.read().split()))
    except FileNotFoundError:  # a host without CONFIG_PROC_CHILDREN
        return set()


def _become(request: dict, descriptors: list[int], status: int) -> None:  # type: ignore[type-arg]  # parsed JSON
    """The child: never returns."""
    try:
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        stdio, passed = descriptors[: request["stdio"]], descriptors[request["stdio"] :]
        confine(Confinement(**request["confinement"]))
        status = arrange_descriptors(passed, status=status, stdio=stdio)
        os.execve(request["argv"][0], request["argv"], request["env"])
    except OSError as error:
        os.write(status, f"{error.strerror or error} ({error.filename or request['argv'][0]})".encode())
    except BaseException as error:
        os.write(status, repr(error).encode())


def _probe(request: dict) -> dict[str, object]:  # type: ignore[type-arg]  # parsed JSON
    """Try each namespace, and a root of its own, in children that exit at once."""
    user = CLONE_NEWUSER if request["user_namespace"] else 0
    namespaces: list[tuple[str, int]] = []
    allowed = user
    for name, flag in {**({"user namespace": 0} if user else {}), **NAMESPACES}.items():
        error = _try_child(user | flag, None)
        namespaces.append((name, 0 if error is None else error[0]))
        if error is None:
            allowed |= flag
    answer: dict[str, object] = {"id": request["id"], "namespaces": namespaces, "root_error": None, "proc_error": None}
    if allowed & CLONE_NEWNS:
        for key, new_proc in (("proc_error", True), ("root_error", False)):
            confinement = Confinement(
                uid=None, new_root=True, new_proc=new_proc, read_only=(), devices=tuple(request["devices"]), rlimits=()
            )
            error = _try_child(allowed if new_proc else allowed & ~CLONE_NEWPID, confinement)
            answer[key] = None if error is None else error[1]
    return answer


def _try_child(flags: int, confinement: Confinement | None) -> tuple[int, str] | None:
    """(errno, text) of what went wrong in a child with these namespaces, or None."""

    def run(status: int) -> None:
        try:
            if confinement is not None:
                confine(confinement)
        except OSError as error:
            os.write(status, f"{error.errno} {error}".encode())

    try:
        pid, status = _start_child(flags, run)
    except OSError as error:
        return error.errno or 1, str(error)
    failed = os.read(status, 4096)
    os.close(status)
    os.waitpid(pid, 0)
    if not failed:
        return None
    number, _, text = failed.decode().partition(" ")
    return int(number), text


def _map_user(pid: int) -> None:
    """Our own ids, unchanged: inside, the child has all capabilities until it executes a program, and none after."""
    _write(f"/proc/{pid}/setgroups", "deny")
    _write(f"/proc/{pid}/uid_map", f"{os.geteuid()} {os.geteuid()} 1")
    _write(f"/proc/{pid}/gid_map", f"{os.getegid()} {os.getegid()} 1")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def main() -> None:
    """`argv[1]` is the descriptor of the socket pair's end."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the gateway's terminal is for the gateway
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    SpawnerLoop(channel).run()
