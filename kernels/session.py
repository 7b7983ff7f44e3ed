"""One session with the agent in a machine: greeting, remote calls, kernel events.

Everything that comes through it is hostile: sizes are the wire's, values are checked here. Knows nothing of sandboxes,
pools or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kernels.deadlines import CALL_TIMEOUT_S, Deadlines
from kernels.errors import GuestRefusedError, MachineFailedError, MachineUnresponsiveError
from kernels.guest_values import Count, GuestValue
from kernels.models import GuestUsage
from vm_runtime.wire.carriers import Carrier
from vm_runtime.wire.errors import LinkClosedError, OpenRejectedError, WireError
from vm_runtime.wire.generations import host_stream_since
from vm_runtime.wire.greeting import Hello
from vm_runtime.wire.link import Link
from vm_runtime.wire.stream import Incoming, Stream

log = logging.getLogger(__name__)

# A greeting takes 10 to 200 ms; a guest that sends nothing for this long hangs (a cold boot has its own limit).
GREETING_TIMEOUT_S = 30.0
# Whoever asks what a sandbox uses is not kept waiting by one that has no time to answer.
USAGE_TIMEOUT_S = 5.0
# The time that is sent to the guest is as old as its way there; on a host with many guests that can be seconds. It is
# sent again while that took longer than this, a few times.
CLOCK_LATE_S = 0.25
CLOCK_TRIES = 5
CLOCK_TIMEOUT_S = 10.0
# Of requests that are passed to another state: with the rest of its HELLO it has 32 KiB. A guest names 16 KiB of them.
MAX_PENDING_REQUESTS_BYTES = 20 << 10
# A kernel that is asked to be quiet answers within milliseconds, unless its threads get no turn.
QUIESCE_TIMEOUT_S = 2.0
# One line of the guest's event stream; ours are under 200 bytes.
MAX_EVENT_BYTES = 4096
# A cell has two events, and a kernel runs up to some hundred cells a second. A guest that sends more is read no faster;
# it keeps the newest (guest/events.py). What is read at once costs by its length, too.
READS_PER_S = 100.0
READS_AT_ONCE = 200.0
EVENTS_PER_READ = 20


def _requests(value: Any) -> tuple[Mapping[str, Any], ...]:
    requests = tuple(each for each in value if isinstance(each, dict)) if isinstance(value, list | tuple) else ()
    return requests if len(json.dumps(requests)) <= MAX_PENDING_REQUESTS_BYTES else ()


# Requests for cells: {"idents": [base64], "header": {...}}.
Requests = Annotated[tuple[Mapping[str, Any], ...], BeforeValidator(_requests)]


class KernelStatus(GuestValue):
    """The guest's kernel changed its state. cell: the number of the last cell that ended, if the guest names it.
    next_waits: whether the next one waits until the host lets it begin."""

    state: Literal["busy", "idle", "starting"]
    cell: Count | None = Field(None, validation_alias="execution_count")
    next_waits: bool = False


class LastCell(GuestValue):
    """The guest's answer to `hold_cells`.

    held: no cell runs, and none begins.
    cell: the last that ended, if named.
    pending_requests: the requests of cells that run or wait, if asked for.
    """

    held: bool
    cell: Count | None = Field(None, validation_alias="execution_count")
    pending_requests: Requests = Field((), validation_alias="unanswered")


class PendingRequests(GuestValue):
    """What a kernel has not answered. count: requests of all kinds. cells: those for cells, as far as it names them."""

    count: Count = Field(validation_alias="unanswered")
    cells: Requests = ()

    def cells_but(self, others: Iterable[Mapping[str, Any] | None]) -> list[Mapping[str, Any]]:
        """Those for cells that are none of these."""
        known = {_message_id(each) for each in others}
        return [each for each in self.cells if _message_id(each) not in known]


class KernelExited(GuestValue):
    """The guest's kernel process `pid` ended. shut_down: as a client had asked. out_of_memory: for lack of memory."""

    pid: int
    shut_down: bool = False
    out_of_memory: bool = False
    signal: int | None = None
    exit_code: int | None = Field(None, validation_alias="exit_status")

    @property
    def reason(self) -> str:
        """A sentence for people."""
        if self.shut_down:
            return "The kernel was shut down by a client."
        if self.out_of_memory:
            return "The kernel ran out of memory."
        if self.signal is not None:
            return f"The kernel was killed by signal {self.signal}."
        return "The kernel ended." if self.exit_code is None else f"The kernel exited with status {self.exit_code}."


GuestEvent = KernelStatus | KernelExited
# Serves a call of the guest's `sandbox` module (docs/sandbox_calls.md): answers or refuses the incoming stream.
CallHandler = Callable[[Incoming], Awaitable[None]]
# Connects to the agent of a machine (`Machine.open_wire`).
OpenWire = Callable[[], Awaitable[Carrier]]


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """What the host sends at the start of a session (docs/wire.md, HELLO).

    marker: what opens this session (hex; the last session's `next_marker`, or the boot marker).
    restored: the machine comes from a snapshot: the guest renews clock, random pool, identity and key.
    keep_random: leave the user-level generators as they were in the snapshot.
    extra: what docs/sandbox_calls.md lists (answers to calls that wait).
    """

    marker: str
    identity: Mapping[str, str]
    key: str | None
    restored: bool
    keep_random: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


class GuestSession:
    """Use `await GuestSession.open(...)`, then `call`, `open_channel`; `await close()` when done (twice is harmless).

    generation: of the agent, which is as old as the snapshot that the machine comes from (docs/wire.md).
    next_marker: opens the session after this one; the caller must keep it with the machine.
    kernel_busy: whether a cell runs, as the guest reported last.
    kernel_pid: of the kernel that runs, in the guest; kernel_exited: how the last one ended, if none runs.
    deadlines: of all that is asked in it.

    Set `on_event` to be called with each event; the guest's own calls wait until `serve_calls`. `wait_closed` answers
    why the session ended.
    """

    def __init__(self, link: Link, next_marker: str) -> None:
        self._link = link
        self.on_event: Callable[[GuestEvent], None] = lambda event: None
        self._call_handler: asyncio.Future[CallHandler | None] = asyncio.get_running_loop().create_future()
        self.next_marker = next_marker
        self._has_events = False
        self.deadlines = Deadlines()
        assert link.welcome is not None
        self.generation = link.welcome.generation
        kernel, extra = link.welcome.kernel, link.welcome.extra
        self.kernel_busy = kernel is not None and kernel.busy
        self.kernel_pid: int | None = kernel.pid if kernel is not None else None
        self.kernel_exited: KernelExited | None = None
        if kernel is None:
            found = _event_in(extra.get("kernel_exited"))
            self.kernel_exited = found if isinstance(found, KernelExited) else KernelExited(pid=0)
        link.on_open = self._accept

    @classmethod
    async def open(
        cls, open_wire: OpenWire, greeting: Greeting, *, timeout_s: float = GREETING_TIMEOUT_S
    ) -> GuestSession:
        """Connects and greets. Errors: MachineFailedError when the guest does not answer or answers wrongly."""
        try:
            marker = bytes.fromhex(greeting.marker)
            hello = Hello(
                identity=greeting.identity,
                kernel_key=greeting.key,
                restored=greeting.restored,
                keep_random=greeting.keep_random,
                extra=greeting.extra,
            )
            carrier = await open_wire()
            greeted_at = time.monotonic()
            link = await Link.connect(carrier, hello, marker=marker, timeout_s=timeout_s)
        except TimeoutError as error:
            raise MachineFailedError(f"The guest did not greet within {timeout_s:.0f} s.") from error
        except (WireError, OSError) as error:
            raise MachineFailedError(f"The guest could not be greeted: {error}") from error
        if link.welcome is not None and (problems := link.welcome.extra.get("problems")):
            log.warning("A guest could not renew all of itself: %.1000s", problems)
        session = cls(link, hello.next_marker)
        try:
            await session.correct_clock(time.monotonic() - greeted_at)
        except BaseException:
            await session.close()
            raise
        return session

    async def correct_clock(self, late_s: float) -> None:
        """Sets the guest's clock if it may be `late_s` behind. A guest that does not answer soon keeps its own."""
        tries = 0
        while late_s > CLOCK_LATE_S and tries < CLOCK_TRIES:
            sent_at = time.monotonic()
            try:
                await self._link.call("machine.clock", {"wall_clock_ns": time.time_ns()}, timeout_s=CLOCK_TIMEOUT_S)
            except (WireError, TimeoutError) as error:
                log.info("A guest's clock could not be set again and is %.1f s late: %s", late_s, error)
                return
            late_s = time.monotonic() - sent_at
            tries += 1

    async def identify(self, identity: Mapping[str, str]) -> None:
        """Sends a machine that was made for no one its identity from now on, and the time. Errors: as `call`."""
        await self.call("sandbox.identify", {"identity": dict(identity), "wall_clock_ns": time.time_ns()})

    async def call(
        self, kind: str, params: Mapping[str, Any] | None = None, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Mapping[str, Any]:
        """A remote call to the agent; its result. Errors: MachineFailedError with the agent's sentence,
        GuestRefusedError if the agent is older than this kind of call."""
        self._check_generation(kind)
        try:
            async with self.deadlines.within(timeout_s, kind):
                return await self._link.call(kind, params)
        except OpenRejectedError as error:
            failed = MachineUnresponsiveError if error.code == "kernel_stuck" else MachineFailedError
            raise failed(f"{kind} failed in the guest: {error}") from error
        except WireError as error:
            raise MachineFailedError(f"{kind} failed in the guest: {error}") from error

    async def ping(self) -> None:
        """Waits until the agent has answered, or the session has ended."""
        with contextlib.suppress(LinkClosedError):
            await self._link.ping()

    async def hold_cells(
        self, *, limit_s: float, pending_requests: bool = False, timeout_s: float = CALL_TIMEOUT_S
    ) -> LastCell:
        """Asks the kernel to let no cell begin until `kernel.release`, at most for `limit_s` (0: it is only asked what
        it does). Errors: as `call`."""
        answer = await self.call(
            "kernel.hold", {"limit_s": limit_s, "unanswered": pending_requests}, timeout_s=timeout_s
        )
        return LastCell.parse(answer)

    async def quiesce(self, *, quiet: bool) -> PendingRequests | None:
        """What the kernel has and has not answered, now that it has looked at all that its sockets have. None from an
        agent that is older than this question: nothing is done.

        quiet: it keeps what it has for its clients until it is asked again without, or greeted. Errors: as `call`.
        """
        if not self.knows("kernel.quiesce"):
            return None
        if self.kernel_exited is not None:
            return PendingRequests(count=0)
        return PendingRequests.parse(await self.call("kernel.quiesce", {"quiet": quiet}, timeout_s=QUIESCE_TIMEOUT_S))

    async def usage(self) -> GuestUsage | None:
        """What the guest uses of its machine; None from one that does not answer, or is older than this question."""
        if not self.knows("machine.usage"):
            return None
        try:
            return GuestUsage.parse(await self.call("machine.usage", timeout_s=USAGE_TIMEOUT_S))
        except MachineFailedError as error:
            log.debug("A guest did not tell what it uses: %s", error)
            return None

    async def open_channel(self, name: str) -> Stream:
        """A stream to one of the kernel's ZMQ sockets. Errors: WireError."""
        return await self._link.open("kernel.channel", {"channel": name})

    async def open_stream(self, kind: str, params: Mapping[str, Any]) -> Stream:
        """A stream of any kind. Errors: WireError, MachineUnresponsiveError, GuestRefusedError if the agent is older
        than the kind."""
        self._check_generation(kind)
        async with self.deadlines.within(CALL_TIMEOUT_S, kind):
            return await self._link.open(kind, params)

    def knows(self, kind: str) -> bool:
        """Whether the agent is not older than this kind of stream."""
        return host_stream_since(kind) <= self.generation

    def _check_generation(self, kind: str) -> None:
        if not self.knows(kind):
            raise GuestRefusedError(
                "unknown_kind",
                f"The sandbox was made by an earlier version: its agent is of generation {self.generation}, and {kind} "
                f"came with generation {host_stream_since(kind)}. Make a new sandbox for this.",
            )

    def serve_calls(self, handler: CallHandler | None) -> None:
        """The guest's calls go to `handler` from now on, those that came before included. None: they are refused."""
        self._call_handler.set_result(handler)

    async def wait_closed(self) -> str:
        """Waits until the session has ended; why."""
        await self._link.wait_closed()
        return str(self._link.error)

    async def close(self, why: str = "closed") -> None:
        """Sends GOODBYE; twice is harmless. why: a key of `kernels.errors.LEFT` for those who use its streams."""
        await self._link.close(why)

    async def _accept(self, incoming: Incoming) -> None:
        if incoming.kind == "sandbox.call":
            # A fork calls as soon as it is greeted, which is before the host knows it as a sandbox.
            handler = await self._call_handler
            if handler is not None:
                await handler(incoming)
                return
        if incoming.kind != "events" or self._has_events:
            incoming.reject("unknown_kind", f"The host knows no stream of the kind {incoming.kind!r}")
            return
        self._has_events = True
        stream = await incoming.accept()
        pending = b""
        pace = _Pace()
        while data := await stream.read():
            *lines, pending = (pending + data).split(b"\n")
            if len(pending) > MAX_EVENT_BYTES:
                stream.reset("too_long", f"An event has at most {MAX_EVENT_BYTES} bytes")
                return
            for event in condensed([event for line in lines if (event := parse_event(line)) is not None]):
                if isinstance(event, KernelStatus):
                    self.kernel_busy = event.state == "busy"
                self.on_event(event)
            await pace.spend(1 + len(lines) / EVENTS_PER_READ)


class _Pace:
    """READS_PER_S in the long run, READS_AT_ONCE before that counts."""

    def __init__(self) -> None:
        self._left = READS_AT_ONCE
        self._looked_at = time.monotonic()

    async def spend(self, reads: float) -> None:
        """Waits until so many more may follow."""
        now = time.monotonic()
        self._left = min(READS_AT_ONCE, self._left + (now - self._looked_at) * READS_PER_S) - reads
        self._looked_at = now
        if self._left < 0:
            await asyncio.sleep(-self._left / READS_PER_S)


def condensed(events: Sequence[GuestEvent]) -> list[GuestEvent]:
    """Of changes of state that came together only the last two: how a cell began and ended, or ended and the next
    began."""
    states = [event for event in events if isinstance(event, KernelStatus)][-2:]
    return [event for event in events if isinstance(event, KernelExited) or any(event is state for state in states)]


def parse_event(line: bytes) -> GuestEvent | None:
    """One line of the event stream. None for kinds this host does not know (a newer guest) and for malformed ones:
    a guest that lies about its own kernel harms no one else."""
    try:
        return _event_in(json.loads(line))
    except (ValueError, RecursionError):
        return None


def _event_in(value: Any) -> GuestEvent | None:
    with contextlib.suppress(MachineFailedError):
        match value:
            case {"event": "kernel.status"}:
                return KernelStatus.parse(value)
            case {"event": "kernel.exited"}:
                return KernelExited.parse(value)
    return None


def _message_id(request: Mapping[str, Any] | None) -> str:
    """As far as what a guest sends is what it should be."""
    match request:
        case {"header": {"msg_id": str(message_id)}}:
            return message_id
        case _:
            return ""
