"""The zygote: a process with ipykernel and the recipe's modules imported, from which kernels are forked.

It has no ZMQ context, no event loop and no threads of its own, so that a fork of it is a whole process.
Commands come as JSON datagrams from the agent over the socket whose descriptor number is the first argument.
A kernel that cannot be a copy of this process (its environment, packages installed since) gets a new interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import site
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vm_runtime.guest.environment import adopt, needs_new_process
from vm_runtime.guest.interpreter import python_command
from vm_runtime.guest.kernel import KernelSettings, reseed, run_kernel, trim_memory
from vm_runtime.guest.rpc_server import DATAGRAM_BYTES_MAX, TRACEBACK_CHARS_MAX

# Memory exhaustion ends the kernel, then the zygote, never the agent (-1000). See man proc_pid_oom_score_adj.
ZYGOTE_OOM_SCORE_ADJ = 0
KERNEL_OOM_SCORE_ADJ = 500

_PR_SET_PDEATHSIG = 1  # man PR_SET_PDEATHSIG


class Zygote:
    """Serves the agent until it goes away. `serve` returns a job in a forked child and None in the zygote itself."""

    def __init__(self, agent: socket.socket) -> None:
        self._agent = agent
        self._wakeup, wakeup_writer = socket.socketpair()
        self._wakeup.setblocking(False)
        wakeup_writer.setblocking(False)
        self._wakeup_writer = wakeup_writer
        signal.set_wakeup_fd(wakeup_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # A Ctrl-C meant for the kernel must not end what kernels are made from.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._own_modules = _top_level(sys.modules)
        self._path_files = _path_files()

    def serve(self) -> Callable[[], None] | None:
        poll = select.poll()
        poll.register(self._agent, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wakeup.fileno() in ready:
                self._wakeup.recv(4096)
                self._reap()
            if self._agent.fileno() in ready:
                try:
                    data, fds, _, _ = socket.recv_fds(self._agent, DATAGRAM_BYTES_MAX, 1)
                except ConnectionResetError:
                    return None
                if not data:
                    return None
                request = json.loads(data)
                if request["op"] == "fork":
                    job = self._fork(request, socket.socket(fileno=fds[0]))
                    if job is not None:
                        return job
                elif request["op"] == "prepare":
                    self._answer(request, self._prepare(request["code"]))
                else:
                    self._answer(request, self._preload(request["modules"]))

    def _prepare(self, code: str) -> dict[str, Any]:
        """Run the recipe's warm-up here, so that every kernel has its modules. Returns {"error": str | None}."""
        error = None
        # For a first completion jedi reads the types of all builtins: 3 s, and 30 s emulated.
        with contextlib.suppress(ImportError):  # IPython does without it, too
            jedi = importlib.import_module("jedi")
            for text in ("pri", "str."):
                jedi.Interpreter(text, [{}]).complete()
        try:
            exec(compile(code, "<warm-up>", "exec"), {"__name__": "__main__"})
        except BaseException:
            error = traceback.format_exc()[-TRACEBACK_CHARS_MAX:]
        trim_memory()
        gc.freeze()  # what lives now is never collected, so that a collection in a kernel does not copy its pages
        return {"error": error}

    def _preload(self, modules: list[str]) -> dict[str, Any]:
        """Import what a warmed kernel has imported, so that a new one does not do it again. Returns {"loaded": int}."""
        loaded = 0
        for name in modules:
            if name not in sys.modules:
                with contextlib.suppress(Exception):  # modules that only exist once made (__mp_main__ and its like)
                    importlib.import_module(name)
                    loaded += 1
        trim_memory()
        gc.freeze()
        return {"loaded": loaded}

    def _fork(self, request: dict[str, Any], rpc_socket: socket.socket) -> Callable[[], None] | None:
        pid = os.fork()
        if pid:
            rpc_socket.close()
            self._answer(request, {"pid": pid})
            return None
        self._become_kernel()
        settings = KernelSettings(**request["settings"])
        env = request["env"]
        if needs_new_process(os.environ, env) or self._has_outdated_modules(env):
            _start_anew(settings, rpc_socket, env)
        adopt(env)
        reseed()
        return lambda: run_kernel(settings, rpc_socket)

    def _become_kernel(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for sock in (self._agent, self._wakeup, self._wakeup_writer):
            sock.close()
        os.setsid()  # its own process group: what an interrupt is sent to
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        set_oom_score_adj(KERNEL_OOM_SCORE_ADJ)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)

    def _has_outdated_modules(self, env: Mapping[str, str]) -> bool:
        """Whether a new interpreter would find another version of what is imported here (pip has installed one since),
        or more of the files that add to sys.path."""
        if _path_files() - self._path_files:
            return True
        preloaded = _top_level(sys.modules) - self._own_modules
        for directory in (site.getusersitepackages(), *env.get("PYTHONPATH", "").split(os.pathsep)):
            for name in preloaded & {entry.partition(".")[0] for entry in _entries(directory)}:
                if not (getattr(sys.modules[name], "__file__", None) or "").startswith(directory):
                    return True
        return False

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            how = {"exit_status": code} if code >= 0 else {"signal": -code}
            self._agent.send(json.dumps({"event": "exited", "pid": pid, **how}).encode())

    def _answer(self, request: dict[str, Any], result: dict[str, Any]) -> None:
        self._agent.send(json.dumps({"answer": request["id"], "result": result}).encode())


def _top_level(modules: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208
    except OSError:
        return []


def _path_files() -> set[tuple[str, int]]:
    """The files that add to sys.path (module `site`) where pip installs to, and when each was changed."""
    found = set()
    for path in Path(site.getusersitepackages()).glob("*.pth"):
        with contextlib.suppress(OSError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def _start_anew(settings: KernelSettings, rpc_socket: socket.socket, env: Mapping[str, str]) -> None:
    """Replace this process by a new interpreter with `env` that runs the kernel."""
    reader, writer = os.pipe()
    os.write(writer, json.dumps(asdict(settings)).encode())  # a pipe has room for it
    os.close(writer)
    rpc_socket.set_inheritable(True)
    os.set_inheritable(reader, True)
    command = python_command("zygote", "main_kernel", str(rpc_socket.fileno()), str(reader))
    os.execve(command[0], command, env)


def set_oom_score_adj(value: int) -> None:
    Path("/proc/self/oom_score_adj").write_text(str(value))


def main() -> None:
    set_oom_score_adj(ZYGOTE_OOM_SCORE_ADJ)
    agent = socket.socket(fileno=int(sys.argv[1]))
    agent.send(json.dumps({"event": "ready"}).encode())
    job = Zygote(agent).serve()
    if job is not None:
        job()


def main_kernel() -> None:
    """A kernel with an interpreter of its own."""
    rpc_socket, reader = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(reader, "rb") as pipe:
        settings = KernelSettings(**json.loads(pipe.read()))
    run_kernel(settings, socket.socket(fileno=rpc_socket))
