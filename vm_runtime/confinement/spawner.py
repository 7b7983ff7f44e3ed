"""The helper process that starts VMMs: single-threaded, small, so that cloning it is quick and safe.

Runs as `python -I -S`, standard library only; imports nothing of this project but `namespaces`. It knows no VMM: it
gets an argument vector. The gateway talks to it over a SOCK_SEQPACKET socket pair, one JSON object per packet:

    -> {"id", "argv", "env", "confinement": {...}, "namespaces", "user_namespace", "cgroups": [files]}   + descriptors:
       the first becomes stdout and stderr, the others 3, 4, ... of the VMM
    <- {"id", "pid", "problems": [...]}  + a pidfd     the program has been executed
    <- {"id", "error"}                                 it has not; nothing is left
    -> {"keep": pid}                                   its record is written: it may outlive us from now on
    <- {"exited": pid, "exit_status"|"signal"}         a VMM has ended

    -> {"id", "probe": true}      <- {"id", "namespaces": [[name, errno]...], "root_error", "proc_error"}

VMMs outlive it: when the gateway's end closes it exits, and init adopts them. Those that were not kept yet are ended
then, since no later gateway could find them.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import sys
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


@dataclass
class _Starting:
    """A child that has not executed its program yet: `status` is the pipe on which it would tell an error."""

    request_id: int
    pid: int
    pidfd: int
    status: int
    problems: list[str]


class SpawnerLoop:
    """The helper's loop; `run()` returns when the gateway has closed its end."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._starting: dict[int, _Starting] = {}
        self._children: set[int] = set()
        self._unkept: set[int] = set()
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
        data, ancillary, _, _ = self._channel.recvmsg(MAX_PACKET_BYTES, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS))
        if not data:
            return False
        descriptors = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(payload[: len(payload) - len(payload) % 4])
        request = json.loads(data)
        if "keep" in request:
            self._unkept.discard(request["keep"])
            return True
        try:
            if request.get("probe"):
                self._send(_probe(request))
            else:
                self._spawn(request, descriptors.tolist())
        except OSError as error:
            self._send({"id": request["id"], "error": str(error)})
        finally:
            for fd in descriptors:
                os.close(fd)
        return True

    def _spawn(self, request: dict, descriptors: list[int]) -> None:  # type: ignore[type-arg]  # parsed JSON
        confinement = _confinement(request["confinement"])
        status_read, status_write = os.pipe2(os.O_CLOEXEC)
        go_read, go_write = os.pipe2(os.O_CLOEXEC)
        try:
            pid = clone(request["namespaces"])
        except OSError:
            for fd in (status_read, status_write, go_read, go_write):
                os.close(fd)
            raise
        if pid == 0:
            os.close(go_write)
            _become(request, confinement, descriptors, status_write, go_read)
        os.close(status_write)
        os.close(go_read)
        problems: list[str] = []
        if request["user_namespace"]:
            _map_user(pid)
        pidfd = os.pidfd_open(pid)
        os.close(go_write)
        # While the child confines itself, since moving a process waits for the host's other CPUs (some ms each).
        for path in request["cgroups"]:
            try:
                _write(path, str(pid))
            except OSError as error:
                problems.append(f"{path}: {error.strerror}")
        self._children.add(pid)
        self._unkept.add(pid)
        self._starting[status_read] = _Starting(request["id"], pid, pidfd, status_read, problems)
        self._poll.register(status_read, select.POLLIN)

    def _started(self, fd: int) -> None:
        """A status pipe ended: without a word when exec closed it, with the error's text otherwise."""
        child = self._starting.pop(fd)
        self._poll.unregister(fd)
        error = os.read(fd, 4096)
        os.close(fd)
        if error:
            self._send({"id": child.request_id, "error": error.decode(errors="replace")})
        else:
            self._send({"id": child.request_id, "pid": child.pid, "problems": child.problems}, [child.pidfd])
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
            self._unkept.discard(pid)
            if os.WIFSIGNALED(status):
                self._send({"exited": pid, "signal": os.WTERMSIG(status)})
            else:
                self._send({"exited": pid, "exit_status": os.WEXITSTATUS(status)})

    def _end_unkept(self) -> None:
        for pid in self._unkept:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        for pid in self._unkept:
            os.waitpid(pid, 0)

    def _send(self, message: dict[str, object], descriptors: list[int] | None = None) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self._channel.sendmsg([json.dumps(message).encode()], ancillary)


def _confinement(values: dict) -> Confinement:  # type: ignore[type-arg]  # parsed JSON
    return Confinement(
        uid=values["uid"],
        new_root=values["new_root"],
        new_proc=values["new_proc"],
        read_only=tuple(values["read_only"]),
        devices=tuple(values["devices"]),
        rlimits=tuple((int(number), int(limit)) for number, limit in values["rlimits"]),
    )


def _become(request: dict, confinement: Confinement, descriptors: list[int], status: int, go: int) -> None:  # type: ignore[type-arg]
    """The child: never returns."""
    try:
        signal.set_wakeup_fd(-1)
        os.read(go, 1)  # ends when the parent has mapped our user
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        stdio, *passed = descriptors
        confine(confinement)
        status = arrange_descriptors(passed, status=status, stdio=stdio)
        os.execve(request["argv"][0], request["argv"], request["env"])
    except OSError as error:
        os.write(status, f"{error.strerror or error} ({error.filename or request['argv'][0]})".encode())
    except BaseException as error:
        os.write(status, repr(error).encode())
    os._exit(127)


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
    read, write = os.pipe2(os.O_CLOEXEC)
    go_read, go_write = os.pipe2(os.O_CLOEXEC)
    try:
        pid = clone(flags)
    except OSError as error:
        for fd in (read, write, go_read, go_write):
            os.close(fd)
        return error.errno or 1, str(error)
    if pid == 0:
        os.close(go_write)
        try:
            os.read(go_read, 1)
            if confinement is not None:
                confine(confinement)
        except OSError as error:
            os.write(write, f"{error.errno} {error}".encode())
        os._exit(0)
    os.close(write)
    os.close(go_read)
    failed = b""
    try:
        if flags & CLONE_NEWUSER:
            _map_user(pid)
    except OSError as error:
        failed = f"{error.errno} {error}".encode()
    os.close(go_write)
    failed = failed or os.read(read, 4096)
    os.close(read)
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
    SpawnerLoop(channel).run()
