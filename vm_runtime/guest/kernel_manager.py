"""The agent's view of zygote and kernel: start, restart, stop, interrupt, new keys and random numbers after a restore.

Knows nothing of the wire. One kernel at a time; it is a child of the zygote, which reports its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vm_runtime.guest.interpreter import python_command
from vm_runtime.guest.limits import UserLimits
from vm_runtime.guest.paths import Paths
from vm_runtime.guest.rpc_client import PeerError, PeerGoneError, RpcClient
from vm_runtime.wire.greeting import KernelStatus

# Under emulation the imports take tens of seconds; beyond this something is wrong.
ZYGOTE_START_LIMIT_S = 300.0
KERNEL_START_LIMIT_S = 120.0
PREPARE_LIMIT_S = 600.0

# After a restore a kernel's new key is waited for this long: immediate unless a cell holds the interpreter lock.
RENEW_LIMIT_S = 5.0

# How long a kernel has for its orderly end at a restart: for its running cell to take an interrupt, for exit handlers
# and finalizers. jupyter_client gives a local one as much. Then SIGTERM, and SIGKILL after TERMINATION_S.
GRACE_S = 5.0
TERMINATION_S = 1.0

# Between SIGKILL and the report of the end: vmlinux has to free the memory first.
KILL_LIMIT_S = 30.0

# No longer pause before SIGKILL than this, whatever is asked for: a stop must end.
GRACE_MAX_S = 60.0

# Where scripts find the module `sandbox`.
_SANDBOX_PATH = str(Path(__file__).parent / "sandbox/path")

# A throwaway key for a kernel that is started before anyone gave one (template.prepare).
KEY_BYTES = 32


class KernelError(Exception):
    """The kernel could not be started or asked; `code` is for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class User:
    """Whom zygote and kernel run as."""

    uid: int
    gid: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Answers:
    """To cells of another state. reply_to: the one that asked for this state, which is answered with `text`; None if
    none did.
    aborted: those that are not run. Each is {"idents": [base64], "header": {...}} of its request."""

    reply_to: Mapping[str, Any] | None = None
    text: str = ""
    aborted: Sequence[Mapping[str, Any]] = ()


@dataclass(kw_only=True)
class _Kernel:
    pid: int
    rpc: RpcClient
    ready: asyncio.Future[None]
    exited: asyncio.Future[None]
    idle: asyncio.Event
    ending: bool = False  # its end was asked for, so it is no news
    shut_down: bool = False  # by a client, with a shutdown_request
    oom_kills: int = 0  # of its group, when it or its last cell began
    refused_forks: int = 0


class KernelManager:
    """`notify(event)` is called with JSON objects: kernel.status and kernel.exited. Use as an async context manager.

    last_exit: the last kernel.exited, None while a kernel runs or none has.
    """

    def __init__(
        self, *, paths: Paths, user: User | None, limits: UserLimits, notify: Callable[[dict[str, Any]], None]
    ) -> None:
        self.last_exit: dict[str, Any] | None = None
        self._paths = paths
        self._user = user
        self._limits = limits
        self._notify = notify
        self._changing = asyncio.Lock()
        self._zygote: RpcClient | None = None
        self._zygote_process: subprocess.Popen[bytes] | None = None
        self._zygote_ready: asyncio.Future[None] | None = None
        self._kernel: _Kernel | None = None
        self._key = secrets.token_hex(KEY_BYTES)
        self._env: dict[str, str] = {}
        self._recipe_env: dict[str, str] = {}
        self._cwd: str | None = None

    async def __aenter__(self) -> KernelManager:
        self._start_zygote()
        return self

    async def __aexit__(self, *_: object) -> None:
        kernel = self._kernel
        if kernel is not None:
            kernel.ending = True
            _kill_group(kernel.pid, signal.SIGKILL)
            kernel.rpc.close()
        self._end_zygote()

    def environment(self) -> dict[str, str]:
        """What a kernel that started now would get; commands get it, too."""
        return self._with(self._env)

    def _with(self, env: Mapping[str, str]) -> dict[str, str]:
        """What a login gives, and `env`."""
        base = self._base_env()
        return {**base, **env, "PYTHONPATH": os.pathsep.join(filter(None, (env.get("PYTHONPATH"), base["PYTHONPATH"])))}

    def describe(self) -> KernelStatus | None:
        """The kernel for WELCOME, or None without one. Its state is Jupyter's word: starting, idle or busy."""
        kernel = self._kernel
        if kernel is None:
            return None
        busy = not kernel.idle.is_set()
        state = "starting" if not kernel.ready.done() else "busy" if busy else "idle"
        return KernelStatus(state=state, pid=kernel.pid, busy=busy)

    async def start(self, *, key: str | None, env: Mapping[str, str], cwd: str | None) -> tuple[int, bool]:
        """Start the kernel; its pid, and whether it took another one's place. If one runs already (a template's), it
        adopts key, env and cwd. It cannot adopt some variables (`environment`): if it is new, it is replaced; in one
        that has a state they have no effect before a restart."""
        async with self._changing:
            self._env.update(env)
            self._cwd = cwd if cwd is not None else self._cwd
            if key is not None and key != self._key:
                await self.renew(key=key)
            if self._kernel is None:
                return await self._fork_within_limits(is_restart=False), False
            now = self.environment()
            answer = await self._ask_kernel("configure", env={name: now[name] for name in env}, cwd=cwd)
            if answer["adopted"]:
                return self._kernel.pid, False
            await self._end_kernel(grace_s=0.0)
            return await self._fork_within_limits(is_restart=False), True

    async def restart(self, *, env: Mapping[str, str]) -> int:
        """A new kernel with the same sockets and key, forked from the zygote. Returns its pid. The old one ends in
        order: its cell is interrupted, exit handlers run, files are written."""
        async with self._changing:
            self._env.update(env)
            await self._end_kernel(grace_s=GRACE_S)
            return await self._fork_within_limits(is_restart=True)

    async def stop(self, *, grace_s: float) -> None:
        """End it in order within `grace_s`, or else with signals. Without a kernel nothing happens."""
        async with self._changing:
            await self._end_kernel(grace_s=min(grace_s, GRACE_MAX_S))

    def interrupt(self) -> None:
        """SIGINT to the kernel's process group. Raises KernelError if there is no kernel."""
        _kill_group(self._running().pid, signal.SIGINT)

    async def renew(
        self,
        *,
        key: str | None,
        restored: bool = False,
        keep_random: bool = False,
        drop_requests: bool = False,
        quiet: bool = False,
    ) -> None:
        """With each greeting: a new key for the kernel (None keeps the old one), and cells that were held may begin.
        After a restore new random numbers in its process. drop_requests: cells that wait in it are aborted. quiet: it
        keeps what it has for clients until `quiesce`."""
        if key is not None:
            self._key = key
        if self._kernel is not None:
            await self._ask_kernel(
                "renew",
                key=key,
                restored=restored,
                keep_random=keep_random,
                drop_requests=drop_requests,
                quiet=quiet,
            )

    async def hold(self, *, limit_s: float, unanswered: bool) -> dict[str, Any]:
        """Let no cell begin until `release`, or for `limit_s`. The answer says whether one runs, so that nothing was
        done (`held`: false), how many have ended (`execution_count`) and, if asked, which requests are `unanswered`."""
        return await self._ask_kernel("hold", hold_s=limit_s, unanswered=unanswered)

    async def release(self, *, waits: bool) -> None:
        """Let cells begin. waits: whether there is to be a pause after each from now on."""
        await self._ask_kernel("release", waits=waits)

    async def quiesce(self, *, quiet: bool) -> dict[str, Any]:
        """How many requests the kernel has not answered (`unanswered`), after a look at all that its sockets have.
        quiet: it keeps what it has for clients until it is asked again with false, or greeted."""
        return await self._ask_kernel("quiesce", quiet=quiet)

    async def prepare(self, *, warmup: str, env: Mapping[str, str]) -> int:
        """Run the recipe's warm-up in the zygote, start a kernel if none runs, warm it. Returns its pid. env: the
        recipe's, for the zygote and all kernels."""
        async with self._changing, asyncio.timeout(PREPARE_LIMIT_S):
            if env:
                self._env.update(env)
                self._recipe_env = dict(env)
                self._end_zygote()
            zygote = await self._running_zygote()
            try:
                answer = await zygote.ask("prepare", code=warmup)
            except PeerGoneError as error:
                raise KernelError("warmup_failed", f"The warm-up ended the process that ran it: {error}") from error
            if answer["error"]:
                raise KernelError("warmup_failed", f"The warm-up failed: {answer['error']}")
            pid = self._kernel.pid if self._kernel else await self._fork(is_restart=False)
            kernel = self._running()
            try:
                answer = await self._ask_kernel("warm", limit_s=PREPARE_LIMIT_S, code=warmup)
            except KernelError as error:
                if isinstance(error.__cause__, PeerGoneError):
                    await kernel.exited
                if self.last_exit is not None and "out_of_memory" in self.last_exit:
                    message = "The machine has too little memory for the recipe's warm-up."
                    raise KernelError("warmup_failed", message) from error
                raise
            if answer["error"]:
                raise KernelError("warmup_failed", f"The warm-up failed in the kernel: {answer['error']}")
            await zygote.ask("preload", modules=answer["modules"])
            self._limits.fit()
            os.sync()
            return pid

    async def answer(self, answers: Answers) -> None:
        """Have the kernel answer cells that another state of it was asked to run (docs/sandbox_calls.md)."""
        await self._ask_kernel("answer", reply_to=answers.reply_to, text=answers.text, aborted=answers.aborted)

    def _running(self) -> _Kernel:
        if self._kernel is None:
            raise KernelError("no_kernel", "No kernel runs in this machine; start one with kernel.start.")
        return self._kernel

    async def _ask_kernel(self, op: str, *, limit_s: float = RENEW_LIMIT_S, **fields: Any) -> dict[str, Any]:
        try:
            async with asyncio.timeout(limit_s):
                return await self._running().rpc.ask(op, **fields)
        except TimeoutError as error:
            raise KernelError("kernel_stuck", f"The kernel did not answer {op} within {limit_s:.0f} s.") from error
        except (PeerError, PeerGoneError) as error:
            raise KernelError("kernel_failed", f"The kernel could not {op}: {error}") from error

    async def _fork_within_limits(self, *, is_restart: bool) -> int:
        pid = await self._fork(is_restart=is_restart)
        self._limits.fit()
        return pid

    async def _fork(self, *, is_restart: bool) -> int:
        zygote = await self._running_zygote()
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        exited: asyncio.Future[None] = loop.create_future()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        rpc = RpcClient(ours, on_event=self._kernel_event, on_gone=lambda: None)
        try:
            with theirs:
                answer = await zygote.ask(
                    "fork",
                    fds=[theirs.fileno()],
                    env=self.environment(),
                    settings={
                        "directory": str(self._paths.kernel_dir),
                        "key": self._key,
                        "cwd": self._cwd or str(self._paths.home),
                        "fallback_cwd": str(self._paths.home),
                        "is_restart": is_restart,
                    },
                )
        except (PeerError, PeerGoneError) as error:
            rpc.close()
            raise KernelError("zygote_failed", f"The kernel could not be forked: {error}") from error
        group = self._limits.kernel
        kernel = _Kernel(
            pid=answer["pid"], rpc=rpc, ready=ready, exited=exited, idle=asyncio.Event(),
            oom_kills=group.oom_kills(), refused_forks=group.refused_forks(),
        )  # fmt: skip
        kernel.idle.set()
        self._kernel, self.last_exit = kernel, None
        group.add(kernel.pid)
        self._notify({"event": "kernel.status", "state": "starting"})
        try:
            async with asyncio.timeout(KERNEL_START_LIMIT_S):
                await ready
        except BaseException as error:
            await self._end_kernel(grace_s=0.0)
            if isinstance(error, TimeoutError):
                message = f"The kernel was not ready within {KERNEL_START_LIMIT_S:.0f} s."
                raise KernelError("kernel_failed", message) from error
            raise
        self._notify({"event": "kernel.status", "state": "idle", "execution_count": 0})
        return kernel.pid

    async def _end_kernel(self, *, grace_s: float) -> None:
        kernel = self._kernel
        if kernel is None:
            return
        kernel.ending = True
        if grace_s > 0:
            with contextlib.suppress(KernelError, TimeoutError):
                async with asyncio.timeout(grace_s):
                    if not kernel.idle.is_set():
                        _kill_group(kernel.pid, signal.SIGINT)
                        await kernel.idle.wait()
                    await self._ask_kernel("shut_down")
                    await asyncio.shield(kernel.exited)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TERMINATION_S):
                    _kill_group(kernel.pid, signal.SIGTERM)
                    await asyncio.shield(kernel.exited)
        _kill_group(kernel.pid, signal.SIGKILL)
        if self._has_hit_limits(kernel):
            self._limits.kernel.kill()
        try:
            async with asyncio.timeout(KILL_LIMIT_S):
                await asyncio.shield(kernel.exited)
        except TimeoutError as error:
            message = f"The kernel {kernel.pid} has not ended {KILL_LIMIT_S:.0f} s after SIGKILL."
            raise KernelError("kernel_stuck", message) from error

    def _has_hit_limits(self, kernel: _Kernel) -> bool:
        """Then what it started ends with it, also in sessions of their own: the next kernel needs the room."""
        group = self._limits.kernel
        return group.oom_kills() > kernel.oom_kills or group.refused_forks() > kernel.refused_forks

    def _kernel_event(self, event: dict[str, Any]) -> None:
        kernel = self._kernel
        if kernel is None:
            return
        if event["event"] == "ready" and not kernel.ready.done():
            kernel.ready.set_result(None)
        elif event["event"] == "failed" and not kernel.ready.done():
            kernel.ready.set_exception(KernelError("kernel_failed", f"The kernel did not start: {event['reason']}"))
        elif event["event"] == "status":
            if event["state"] == "busy":
                kernel.idle.clear()
                kernel.oom_kills = self._limits.kernel.oom_kills()
            else:
                kernel.idle.set()
            self._notify({**event, "event": "kernel.status"})
        elif event["event"] == "shutdown":
            kernel.shut_down = True

    def _kernel_exited(self, pid: int, how: dict[str, int]) -> None:
        kernel = self._kernel
        if kernel is None or kernel.pid != pid:
            return
        _kill_group(pid, signal.SIGKILL)  # what it started and left behind in its process group
        group = self._limits.kernel
        out_of_memory = how.get("signal") == signal.SIGKILL and group.oom_kills() > kernel.oom_kills
        if self._has_hit_limits(kernel):
            group.kill()
        self._kernel = None
        kernel.rpc.close()
        kernel.exited.set_result(None)
        if not kernel.ready.done():
            # Whoever starts it gets this error, and nobody else.
            kernel.ready.set_exception(KernelError("kernel_failed", f"The kernel ended while it started: {how}"))
        elif not kernel.ending:
            self.last_exit = {"event": "kernel.exited", "pid": pid, "shut_down": kernel.shut_down, **how}
            if out_of_memory:
                self.last_exit["out_of_memory"] = True
            self._notify(self.last_exit)

    def _start_zygote(self) -> None:
        directory = self._paths.kernel_dir
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, mode=0o700, exist_ok=True)
        if self._user is not None:
            os.chown(directory, self._user.uid, self._user.gid)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._zygote_process = subprocess.Popen(
                python_command("zygote", "main", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd=self._paths.home,
                env=self._with(self._recipe_env),  # not the user's: what it breaks ends a kernel, not what makes them
                start_new_session=True,
                **_run_as(self._user),
            )
        self._zygote_ready = asyncio.get_running_loop().create_future()
        self._zygote = RpcClient(ours, on_event=self._zygote_event, on_gone=self._zygote_gone)

    async def _running_zygote(self) -> RpcClient:
        """The zygote, started anew if it has ended."""
        if self._zygote is None:
            self._start_zygote()
        zygote, ready = self._zygote, self._zygote_ready
        assert zygote is not None
        assert ready is not None
        try:
            async with asyncio.timeout(ZYGOTE_START_LIMIT_S):
                await asyncio.shield(ready)
        except TimeoutError as error:
            self._end_zygote()
            message = f"The zygote was not ready within {ZYGOTE_START_LIMIT_S:.0f} s."
            raise KernelError("zygote_failed", message) from error
        return zygote

    def _zygote_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "ready" and self._zygote_ready is not None:
            self._zygote_ready.set_result(None)
        elif event["event"] == "exited":
            self._kernel_exited(event["pid"], {k: event[k] for k in ("exit_status", "signal") if k in event})

    def _zygote_gone(self) -> None:
        """The zygote ended (out of memory, most likely). Its kernel ends with it; the next start makes a new one."""
        if self._zygote_ready is not None and not self._zygote_ready.done():
            message = (
                "The zygote ended while it started; the image's Python packages may be broken (see the serial log)."
            )
            self._zygote_ready.set_exception(KernelError("zygote_failed", message))
            self._zygote_ready.exception()  # seen, even if nobody waits for it
        self._end_zygote()
        if self._kernel is not None:
            self._kernel_exited(self._kernel.pid, {"signal": int(signal.SIGKILL)})

    def _end_zygote(self) -> None:
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None
        if self._zygote_process is not None:
            self._zygote_process.kill()
            self._zygote_process.wait()
            self._zygote_process = None

    def _base_env(self) -> dict[str, str]:
        """What every kernel gets, as from a login. BLAS runs as many threads as there are CPUs, and no more."""
        name = self._user.name if self._user is not None else os.environ.get("USER", "root")
        home = self._paths.home
        return {
            "HOME": str(home),
            "USER": name,
            "LOGNAME": name,
            "SHELL": "/bin/bash",
            "PATH": f"{home}/.local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "TERM": "xterm-color",
            "OPENBLAS_NUM_THREADS": str(os.cpu_count() or 1),
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            # The machine is the user's own: pip may install (into ~/.local) despite Debian's EXTERNALLY-MANAGED mark.
            "PIP_BREAK_SYSTEM_PACKAGES": "1",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else debugpy warns about frozen modules in the first traceback
            # So that scripts can `import sandbox` too, and find the agent.
            "PYTHONPATH": _SANDBOX_PATH,
            "HYPERCELL_RUN": str(self._paths.run),
            "CLICOLOR": "1",
            "PAGER": "cat",
            "GIT_PAGER": "cat",
        }


def _run_as(user: User | None) -> dict[str, Any]:
    return {} if user is None else {"user": user.uid, "group": user.gid, "extra_groups": []}


def _kill_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
