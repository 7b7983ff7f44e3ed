"""One client of one kernel: its link to the kernel and its way out, joined. Knows no Tornado."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from gateway.frames import KernelMessage
from gateway.kernel_link import KernelLink
from gateway.metrics import Metrics
from gateway.outgoing import Outgoing, Write
from gateway.pending import RESTARTED, PendingRequests


class State(Enum):
    """WAITING: the client's messages wait, for sockets of a kernel that starts, or until no output can be missed.
    PASSING: both ways, also to a kernel that sleeps. DEAD: the kernel does not come back by itself; each message is
    answered with that. CLOSED: the client has disconnected."""

    WAITING = "waiting"
    PASSING = "passing"
    DEAD = "dead"
    CLOSED = "closed"


# What may follow what; the same state may always follow itself.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.PASSING, State.DEAD, State.CLOSED}),
    State.PASSING: frozenset({State.WAITING, State.DEAD, State.CLOSED}),
    State.DEAD: frozenset({State.WAITING, State.CLOSED}),
    State.CLOSED: frozenset(),
}


@dataclass(frozen=True, kw_only=True)
class Client:
    """What a WebSocket offers: how to write to it, how to close it (code, reason), and which form it speaks."""

    write: Write
    close: Callable[[int, str], None]
    legacy: bool


class Connection:
    """Made by `ClientRegistry.attach`; ends with `release`. Each method moves it along TRANSITIONS."""

    def __init__(self, client: Client, session_id: str, metrics: Metrics) -> None:
        self.session_id = session_id
        self.client = client
        self.state = State.WAITING
        self.link: KernelLink | None = None
        self._left_waiting = asyncio.Event()
        self._settling: asyncio.Task[None] | None = None
        self._death: str | None = None
        self._metrics = metrics
        self.outgoing = Outgoing(
            client.write, legacy=client.legacy, on_full=self._pause, on_drained=self._resume, metrics=metrics
        )

    def _move(self, state: State) -> None:
        if state is not self.state and state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"A client's connection is {self.state.value} and cannot be {state.value}")
        self.state = state
        settling, self._settling = self._settling, None
        if settling is not None and settling is not asyncio.current_task():
            settling.cancel()
        if state is State.WAITING:
            self._left_waiting.clear()
        else:
            self._left_waiting.set()

    def use(self, link: KernelLink, backlog: Iterable[KernelMessage] = ()) -> None:
        """Begins to pass the kernel's messages, after those of the backlog. The client's wait until `admit`."""
        self._move(State.WAITING)
        self.link = link
        self._put(backlog)
        link.start(self.outgoing.put)

    def settle(self, settling: asyncio.Task[None]) -> None:
        """The task that will `admit` the client's messages; it ends with the state."""
        self._settling = settling

    def admit(self) -> None:
        """Lets the client's messages pass."""
        self._move(State.PASSING)

    def hold(self) -> None:
        """The gateway stops: what the client sends from now on, it has not sent."""
        if self.state is not State.DEAD:
            self._move(State.WAITING)

    def die(self, reason: str | None) -> None:
        """The kernel does not come back by itself."""
        self._move(State.DEAD)
        self._death = reason

    def lose(self, state: str, reason: str | None) -> None:
        """The kernel has ended, and is `restarting` or `dead`: its client gets the last that it sent, and an answer to
        what it has not answered."""
        if state == "dead":
            self.die(reason)
        else:
            self._move(State.WAITING)
        self._put(self._end_link().last_words(state, reason))

    def unlink(self) -> None:
        """The kernel has ended, since someone asked for a restart; as with `lose`, but that this is no news."""
        self._move(State.WAITING)
        self._put(self._end_link().answers(RESTARTED))

    def _end_link(self) -> PendingRequests:
        link, self.link = self.link, None
        return PendingRequests() if link is None else link.end()

    def _put(self, messages: Iterable[KernelMessage]) -> None:
        for message in messages:
            self.outgoing.put(message)

    def release(self) -> tuple[KernelLink | None, list[KernelMessage]]:
        """Ends the connection: its link, for someone to take over or close, and what its client has not been sent."""
        self._move(State.CLOSED)
        link, self.link = self.link, None
        return link, self.outgoing.close()

    @property
    def has_unread(self) -> bool:
        """Whether the kernel has sent something that has not been read here."""
        return self.link is not None and self.link.has_unread

    async def from_client(self, message: KernelMessage) -> None:
        """Passes one message to the kernel. Waits while the kernel restarts or takes no more."""
        await self._left_waiting.wait()
        if self.state is State.DEAD:
            pending = PendingRequests()
            pending.sent(message)
            self._put(pending.last_words("dead", self._death))
        elif self.link is not None:
            self._metrics.count_message("to_kernel", message.channel, message.size)
            await self.link.send(message)

    def announce(self, state: str, reason: str | None) -> None:
        """Sends the client that the kernel is `restarting` or `dead`, though requests may still be answered."""
        self._put(PendingRequests().last_words(state, reason))

    def _pause(self) -> None:
        if self.link is not None:
            self.link.pause()

    def _resume(self) -> None:
        if self.link is not None:
            self.link.resume()
