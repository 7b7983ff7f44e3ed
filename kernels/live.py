"""A sandbox's machine while it has one: the session with its guest, and what happens when one of them fails.

It writes down in the registry what becomes of the kernel; what else follows is its observer's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from kernels.background import Background
from kernels.channels import KernelClients
from kernels.connected import ConnectedMachine
from kernels.errors import MachineFailedError, MachineUnresponsiveError
from kernels.models import EventKind
from kernels.registry import Registry
from kernels.session import CallHandler, GuestEvent, KernelExited, KernelStatus, PendingRequests
from vm_runtime.saving.threads import gather_all
from vm_runtime.states import RunState

log = logging.getLogger(__name__)

RESTART_TIMEOUT_S = 60.0
# Of a guest that hangs: what waits for it here (a snapshot that is to be stored) waits no longer than this.
RELEASE_TIMEOUT_S = 2.0
CATCH_UP_S = 2.0
# A kernel ends once, and the one after it when that was started: what comes beyond that is made up by the guest.
MAX_EXITS = 8
# Of a kernel that keeps its output for want of subscribers only: until its last has arrived here.
QUIET_S = 0.1
# From a cell's reply to its end.
ENDING_S = 0.1
# Between the wire's end and the VMM process's own end when both come from the same death.
DYING_S = 1.0
# An agent answers a ping within milliseconds, in an emulated machine on a busy host within a second or two. It is asked
# so rarely that a machine at rest is at rest.
PING_INTERVAL_S = 10.0
# Looks, of a second each, at a ping without an answer. Counted, since a host that is itself late is so with these, too.
UNRESPONSIVE_LOOKS = 10
LOOK_S = 1.0


class SandboxObserver(Protocol):
    """Acts on what happens to sandboxes. Called from the event loop, must not block."""

    def cell_ended(self, sandbox_id: str) -> None:
        """The kernel may wait with the next one (`LiveSandbox.next_waits`)."""

    def client_asks(self, sandbox_id: str) -> None:
        """A client sends a request to a sandbox that has no machine, or is losing it just now."""

    def machine_lost(self, sandbox_id: str, reason: str) -> None:
        """Called within the sandbox's lock; the machine is down."""

    def calls_of(self, sandbox_id: str) -> CallHandler:
        """The handler of the guest's own calls."""


class LiveSandbox:
    """Owns a machine and the session with its guest from construction on, until `close()` or `detach()`.

    `await run()` supervises.

    clients: the sandbox's own, which outlive the machine; attached by `start`.
    cell: the number of the last cell that ended, None while that is unknown.
    kernel_started_at: when this kernel took the place of another one in this machine, None where it did not.
    next_waits: whether the kernel waits with the next one for `release_cells`.
    holds_clients: its clients wait (`hold_clients`); unanswered: what it had not answered then.
    restart_limit: automatic restarts within `restart_window_s` before the kernel is dead; one that is dead when this
        begins stays so. Only `restart` changes that.
    """

    def __init__(
        self,
        sandbox_id: str,
        connected: ConnectedMachine,
        *,
        clients: KernelClients,
        registry: Registry,
        observer: SandboxObserver,
        restart_limit: int,
        restart_window_s: float,
    ) -> None:
        self.id = sandbox_id
        self.saved = connected.saved
        self.session = connected.session
        self.key = connected.key
        self.cell: int | None = None
        self.kernel_started_at: datetime | None = None
        self.next_waits = False
        self.holds_clients = False
        self.pending_requests = PendingRequests(count=0)
        self._cell_ended = asyncio.Event()
        self._clients = clients
        self._identity = connected.identity
        self._greeted = connected.greeted
        self._registry = registry
        self._observer = observer
        self._restart_limit = restart_limit
        self._restart_window_s = restart_window_s
        self._crashes: deque[float] = deque()
        self._exits: asyncio.Queue[KernelExited] = asyncio.Queue(MAX_EXITS)
        self._kernel_lock = asyncio.Lock()
        self._kernel_pid = self.session.kernel_pid
        was_dead = registry.get(sandbox_id).execution_state == "dead"
        self._is_dead = was_dead and self.session.kernel_exited is not None
        if self.session.kernel_exited is not None:
            self._exits.put_nowait(self.session.kernel_exited)
        self.session.on_event = self.on_event

    def start(self) -> None:
        """From now on clients reach this machine's kernel."""
        self.holds_clients = False
        greeted, self._greeted = self._greeted, {}
        self._clients.attach(self.session.open_channel, greeted)

    @property
    def asked_at(self) -> float:
        """When a client last asked something (event loop time)."""
        return self._clients.asked_at

    async def has_unanswered(self) -> bool:
        """Whether the kernel reports that it has not answered something."""
        try:
            pending_requests = await self.session.quiesce(quiet=False)
            if pending_requests is None:
                return not (await self.session.hold_cells(limit_s=0.0)).held
        except MachineFailedError:
            return False
        return pending_requests.count > 0

    async def hold_clients(self) -> PendingRequests | None:
        """Before the machine stands still: its clients wait from now on, and nothing that is under way between them and
        its kernel is lost. What the kernel has not answered, None if it does not report it; also in
        `pending_requests`."""
        self.holds_clients, self.pending_requests = True, PendingRequests(count=0)
        try:
            self.pending_requests = await self._clients.quiesce(self._quiet)
            return self.pending_requests
        except MachineFailedError as error:
            log.info("A kernel does not say what it has not answered: %s", error)
            return None
        finally:
            await self._clients.detach()

    async def _quiet(self) -> PendingRequests:
        if self._is_dead:
            return PendingRequests(count=0)
        pending_requests = await self.session.quiesce(quiet=True)
        if pending_requests is None:
            await self._clients.unsubscribe()
            await asyncio.sleep(QUIET_S)
            last = await self.session.hold_cells(limit_s=0.0, pending_requests=True)
            pending_requests = PendingRequests(
                count=len(last.pending_requests) or int(not last.held), cells=last.pending_requests
            )
        return pending_requests

    async def take_back(self) -> None:
        """Ends what `hold_clients` began: clients reach the kernel again, each as soon as all that were there are
        back."""
        self.start()
        await self._clients.rejoined()
        try:
            await self.session.quiesce(quiet=False)
        except MachineFailedError as error:
            log.info("A kernel was not told that its clients are back: %s", error)

    async def configure(self, *, env: Mapping[str, str], cwd: str | None, identity: Mapping[str, str]) -> None:
        """Gives a kernel that runs already its environment, directory and identity, as far as it has them not yet."""
        news = []
        if identity != self._identity:
            news.append(self.session.identify(identity))
        if env or cwd is not None:
            news.append(self._start(env, cwd))
        await gather_all(*news)

    async def _start(self, env: Mapping[str, str], cwd: str | None) -> None:
        answer = await self.session.call("kernel.start", {"env": dict(env), "cwd": cwd})
        self._kernel_pid = _pid_in(answer)
        if answer.get("replaces") is True:  # the environment needs a new process; greetings went to the old one
            greeted, self._greeted = self._greeted, {}
            for each in greeted.values():
                each.stream.reset()

    async def release_cells(self, *, waits: bool) -> None:
        """The next cell may begin. waits: whether the kernel pauses after it again. One that does not receive this
        continues by itself after a moment."""
        try:
            await self.session.call("kernel.release", {"waits": waits}, timeout_s=RELEASE_TIMEOUT_S)
            self.next_waits = waits
        except MachineFailedError as error:
            log.info("A kernel was not told that its next cell may begin: %s", error)

    async def resume(self) -> None:
        """Resumes the machine, if it was stopped to save its state, its cells, and its clients' way to it."""
        if self.saved.machine.is_dead:
            return
        if self.saved.machine.state is RunState.PAUSED:
            await self.saved.machine.resume()
            await self.release_cells(waits=self.next_waits)
        await self.take_back()

    async def catch_up(self, *, inside: bool) -> None:
        """Waits for the guest's event of the last cell that has ended by now: clients may receive its end before we do.
        What follows from it has begun then.

        inside: it is a cell that asks for this. Else one that runs may be about to end: a reply comes before that.
        """
        try:
            async with asyncio.timeout(CATCH_UP_S):
                self._cell_ended.clear()
                last = await self.session.hold_cells(limit_s=0.0)
                if not last.held and not inside:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(ENDING_S):
                            await self._cell_ended.wait()
                    last = await self.session.hold_cells(limit_s=0.0)
                while last.held and last.cell != self.cell:
                    self._cell_ended.clear()
                    await self._cell_ended.wait()
        except (TimeoutError, MachineFailedError) as error:
            log.info("A kernel does not say which cell ended last: %s", error or "timed out")

    @property
    def execution_state(self) -> str:
        """Jupyter's word for the kernel, as the guest reported last."""
        if self._is_dead:
            return "dead"
        if self.session.kernel_exited is not None:
            return "restarting"
        return "busy" if self.session.kernel_busy else "idle"

    async def restart(self) -> None:
        """A new kernel process in the same machine: files stay, variables go. Errors: MachineUnresponsiveError (only
        the machine's end can help), MachineFailedError (the kernel does not start, and is dead)."""
        async with self._kernel_lock:
            self._registry.execution_state(self.id, "restarting")
            self._crashes.clear()
            try:
                await self._start_anew()
            except MachineUnresponsiveError:
                raise
            except MachineFailedError as error:
                self._die(str(error))
                raise
        self._registry.notify(self.id, EventKind.KERNEL_RESTARTED)

    async def _start_anew(self) -> None:
        result = await self.session.call("kernel.restart", timeout_s=RESTART_TIMEOUT_S)
        self._kernel_pid = _pid_in(result)
        self._is_dead = False
        self.session.kernel_exited = None
        self.cell, self.kernel_started_at = 0, datetime.now(UTC)
        await self._clients.reconnect()
        self._registry.execution_state(self.id, "idle")

    def on_event(self, event: GuestEvent) -> None:
        """The guest's events come in here."""
        match event:
            case KernelStatus():
                self.next_waits = event.next_waits
                if event.state == "idle" and event.cell is not None:
                    self.cell = event.cell
                if not self._is_dead:  # late, of one that did not start
                    before = self._registry.execution_state(self.id, event.state)
                    if (before, event.state) == ("busy", "idle"):
                        self._observer.cell_ended(self.id)
                if event.state == "idle":
                    self._cell_ended.set()
            case KernelExited():
                if not self._exits.full():
                    self._exits.put_nowait(event)

    async def run(self) -> str:
        """Supervises kernel, session and machine until the machine is lost; why."""
        watches = Background()
        watches.spawn(self._watch_kernel())
        watches.spawn(self._watch_agent())
        try:
            async with asyncio.TaskGroup() as group:
                ends = [group.create_task(self._machine_end()), group.create_task(self._session_end())]
                done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for end in ends:
                    end.cancel()
        finally:
            await watches.end()
        return done.pop().result()

    async def _machine_end(self) -> str:
        death = await self.saved.machine.wait_dead()
        log = f"\n--- end of the serial log ---\n{death.serial_tail}" if death.serial_tail else ""
        return f"The machine ended: {death.reason}{log}"

    async def _session_end(self) -> str:
        reason = await self.session.wait_closed()
        # A machine that is dying closes its wire first: its own reason is the better one.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DYING_S):
                return await self._machine_end()
        # Without its agent a machine is of no use, and a guest that broke the protocol is not to be trusted further.
        return f"The guest's agent was lost: {reason}"

    async def _watch_kernel(self) -> None:
        while True:
            event = await self._exits.get()
            async with self._kernel_lock:
                # Of one that a restart replaced, or that did not start: whoever started it knows.
                is_news = self._kernel_pid is None or event.pid == self._kernel_pid
                if is_news and not self._is_dead:
                    await self._recover(self._reason(event), is_crash=not event.shut_down)

    async def _recover(self, reason: str, *, is_crash: bool) -> None:
        """Starts the kernel again, and again if it ends while it starts, as often as it may be."""
        while self._may_restart(is_crash=is_crash):
            self._registry.execution_state(self.id, "restarting")
            self._registry.crash(self.id, reason)
            try:
                await self._start_anew()
            except MachineUnresponsiveError as error:
                self._die(str(error))
                return
            except MachineFailedError as error:
                reason, is_crash = str(error), True
                continue
            self._registry.notify(self.id, EventKind.KERNEL_RESTARTED)
            return
        self._die(f"{reason} It was restarted {self._restart_limit} times already.")

    def _may_restart(self, *, is_crash: bool) -> bool:
        now = time.monotonic()
        if is_crash:
            self._crashes.append(now)
        while self._crashes and now - self._crashes[0] > self._restart_window_s:
            self._crashes.popleft()
        return len(self._crashes) <= self._restart_limit

    def _die(self, reason: str) -> None:
        self._is_dead = True
        self._registry.execution_state(self.id, "dead")
        self._registry.notify(self.id, EventKind.KERNEL_DEAD, reason)

    def _reason(self, event: KernelExited) -> str:
        reason = event.reason
        if event.out_of_memory:
            memory_mib = self.saved.machine.spec.shape.memory_mib
            reason = (
                f"The kernel ran out of memory ({memory_mib} MiB); ask for more with memory_mib when a sandbox is "
                "created, with KERNEL_MEMORY_MIB in the env of a Jupyter kernel."
            )
        return f"{reason} Files are kept; `%sandbox undo` brings its last checkpoint's variables back, if it has one."

    async def _watch_agent(self) -> None:
        """Reports a machine that runs and whose agent does not answer, and when it does again."""
        while True:
            await asyncio.sleep(PING_INTERVAL_S)
            asked_at = datetime.now(UTC)
            ping = asyncio.create_task(self.session.ping())
            looks = 0
            try:
                while not (await asyncio.wait([ping], timeout=LOOK_S))[0]:
                    # One that is paused owes no answer.
                    looks = looks + 1 if self.saved.machine.state is RunState.RUNNING else 0
                    if looks == UNRESPONSIVE_LOOKS:
                        self._responds(unless_since=asked_at)
            finally:
                ping.cancel()
            if self.session.deadlines.unresponsive_since is not None:
                self._responds(unless_since=None)

    def _responds(self, *, unless_since: datetime | None) -> None:
        self.session.deadlines.unresponsive_since = unless_since
        self._registry.unresponsive(self.id, unless_since)
        if unless_since is None:
            self._registry.execution_state(self.id, self.execution_state)

    async def detach(self) -> None:
        """Lets go of the session and leaves the machine running, for the next gateway to adopt."""
        if not self.holds_clients:  # a paused machine was let go before, and would answer nothing now
            await self.hold_clients()
        await self.session.close("stopping")
        await self.saved.detach()

    async def close(self, why: str) -> None:
        """Ends session and machine; twice is harmless. why: a key of `kernels.errors.LEFT`."""
        await self._clients.detach()
        await self.session.close(why)
        await self.saved.kill()


def _pid_in(answer: Mapping[str, Any]) -> int | None:
    pid = answer.get("pid")
    return pid if isinstance(pid, int) else None
