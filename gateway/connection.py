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
    """WAITING: the client's messages wait, for a kernel that is started anew. PASSING: both ways, also to a kernel that
    sleeps. DEAD: the kernel does not come back by itself; each message is answered with that. CLOSED: the client has
    disconnected."""

    WAITING = "waiting"
    PASSING = "passing"
    DEAD = "dead"
    CLOSED = "closed"


# What may follow what; the same state may always follow itself.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.PASSING, State.DEAD, State.CLOSED}),
    State.PASSING: frozenset({State.WAITING, State.DEAD, State.CLOSED}),
    State.DEAD: frozenset({State.WAITING, State.PASSING, State.CLOSED}),
    State.CLOSED: frozenset(),
}


@dataclass(frozen=True, kw_only=True)
class Client:
    """What a WebSocket offers: how to write to it, how to close it (code, reason), and which form it speaks."""

    write: Write
    close: Callable[[int, str], None]
    legacy: bool


class Connection:
    """Made by `ClientRegistry.attach`; owns the link until `release`. Begins to pass what the kernel sends, after the
    backlog. Each method moves it along TRANSITIONS."""

    def __init__(
        self,
        client: Client,
        session_id: str,
        link: KernelLink,
        *,
        backlog: Iterable[KernelMessage] = (),
        metrics: Metrics,
    ) -> None:
        self.session_id = session_id
        self.client = client
        self.link = link
        self.state = State.PASSING
        self._left_waiting = asyncio.Event()
        self._left_waiting.set()
        self._death: str | None = None
        self._metrics = metrics
        self.outgoing = Outgoing(client.write, legacy=client.legacy, metrics=metrics)
        self._put(backlog)
        self._delivering = asyncio.create_task(self._deliver())

    async def _deliver(self) -> None:
        async for message in self.link:
            self.outgoing.put(message)
            await self.outgoing.wait_room()

    def _move(self, state: State) -> None:
        if state is not self.state and state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"A client's connection is {self.state.value} and cannot be {state.value}")
        self.state = state
        if state is State.WAITING:
            self._left_waiting.clear()
        else:
            self._left_waiting.set()

    def hold(self) -> None:
        """The client's messages wait: its kernel is started anew, or the gateway stops (what it sends from then on, it
        has not sent)."""
        self._move(State.WAITING)

    def admit(self) -> None:
        """Lets the client's messages pass."""
        self._move(State.PASSING)

    def lose(self, state: str, reason: str | None) -> None:
        """The kernel has ended, and is `restarting` or `dead`: its client gets the last that it sent, and an answer to
        what it has not answered."""
        if state == "dead":
            self.die(reason)
        else:
            self.hold()
        self._put(self.link.arrived())
        self._put(self.link.lose_kernel().last_words(state, reason))

    def restarted(self) -> None:
        """Another kernel is there. What the one before has not answered, since someone asked for a restart, is answered
        here."""
        if self.state is State.PASSING:
            self._put(self.link.arrived())
            self._put(self.link.lose_kernel().answers(RESTARTED))
        self.admit()

    def die(self, reason: str | None) -> None:
        """The kernel does not come back by itself."""
        self._move(State.DEAD)
        self._death = reason

    def _put(self, messages: Iterable[KernelMessage]) -> None:
        for message in messages:
            self.outgoing.put(message)

    def release(self) -> tuple[KernelLink, list[KernelMessage]]:
        """Ends the connection: its link, for someone to take over or close, and what its client has not been sent."""
        self._move(State.CLOSED)
        self._delivering.cancel()
        return self.link, self.outgoing.close()

    async def from_client(self, message: KernelMessage) -> None:
        """Passes one message to the kernel. Waits while the kernel restarts or takes no more."""
        while self.state is State.WAITING:
            await self._left_waiting.wait()
        if self.state is State.DEAD:
            pending = PendingRequests()
            pending.sent(message)
            self._put(pending.last_words("dead", self._death))
        elif self.state is State.PASSING:
            self._metrics.count_message("to_kernel", message.channel, message.size)
            await self.link.send(message)

    def announce(self, state: str, reason: str | None) -> None:
        """Sends the client that the kernel is `restarting` or `dead`, though requests may still be answered."""
        self._put(PendingRequests().last_words(state, reason))
