"""One client of one kernel: its link to the kernel and its way out, joined. Knows no Tornado."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gateway.frames import KernelMessage
from gateway.kernel_link import KernelLink, status_message, stderr_message
from gateway.metrics import Metrics
from gateway.outgoing import Outgoing, Write


@dataclass(frozen=True, kw_only=True)
class Client:
    """What a WebSocket offers: how to write to it, how to close it (code, reason), and which form it speaks."""

    write: Write
    close: Callable[[int, str], None]
    legacy: bool


class Connection:
    """Made by `KernelHub.attach`; ends with `release`. on_waiting: called when a message of the client has to wait.
    settling: the hub's task that will admit the client's messages; cancelled by `hold`, `unlink` and `release`."""

    def __init__(
        self, client: Client, session_id: str, metrics: Metrics, *, on_waiting: Callable[[], None] = lambda: None
    ) -> None:
        self.session_id = session_id
        self.client = client
        self.settling: asyncio.Task[None] | None = None
        self._on_waiting = on_waiting
        self._last_cell: bytes = b"{}"
        self._metrics = metrics
        self._link: KernelLink | None = None
        self._linked = asyncio.Event()
        self._waiting = 0
        self._closed = False
        self._has_failed = False
        self._failure: str | None = None
        self.outgoing = Outgoing(
            client.write, legacy=client.legacy, on_full=self._pause, on_drained=self._resume, metrics=metrics
        )

    def use(self, link: KernelLink, backlog: Iterable[KernelMessage] = ()) -> None:
        """Begins to pass the kernel's messages, after those of the backlog. The client's wait for `admit`."""
        self._link = link
        for message in backlog:
            self.outgoing.put(message)
        link.start(self.outgoing.put)

    @property
    def link(self) -> KernelLink | None:
        return self._link

    @property
    def admitted(self) -> bool:
        """Whether the client's messages pass."""
        return self._linked.is_set() and not self._has_failed

    def admit(self) -> None:
        """Lets the client's messages pass, now that no answer can be missed."""
        self._has_failed = False
        self._linked.set()

    def fail(self, reason: str | None) -> None:
        """The machine is gone for good: to each message the client hears that again, until `admit`."""
        self._stop_settling()
        if self._link is not None:
            self._link.expect_subscription()
        self._has_failed, self._failure = True, reason
        self._linked.set()

    def hold(self) -> None:
        """The kernel sleeps: messages from the client wait for `admit`; the sockets stay and connect again."""
        self._stop_settling()
        if self._link is not None:
            self._link.expect_subscription()
        if not self._closed:
            self._linked.clear()
        if self._waiting:
            self._on_waiting()  # it fell asleep again before they could pass

    def _stop_settling(self) -> None:
        settling, self.settling = self.settling, None
        if settling is not None:
            settling.cancel()

    async def from_client(self, message: KernelMessage) -> None:
        """Passes one message to the kernel. Waits while the kernel sleeps, restarts or takes no more."""
        if not self._linked.is_set():
            self._waiting += 1
            try:
                self._on_waiting()
                await self._linked.wait()
            finally:
                self._waiting -= 1
        if message.channel == "shell" and b'"execute_request"' in bytes(message.header[:1024]):
            self._last_cell = bytes(message.header)
        if self._has_failed:
            self.announce("dead", self._failure)
        if self._link is None or self._has_failed:
            return
        self._metrics.count_message("to_kernel", message.channel, message.size)
        await self._link.send(message)

    def announce(self, state: str, reason: str | None) -> None:
        """Tells the client that the kernel is `restarting` or `dead`, after all that the kernel still said. The reason
        appears in the output of its last cell, too, if that has not ended."""
        if self._link is not None:
            self._link.drain_iopub()
        if reason is not None:
            self.outgoing.put(stderr_message(f"[{reason}]\n", self._last_cell))
        self.outgoing.put(status_message(state, reason))

    def unlink(self) -> None:
        """The old kernel is gone: ends its sockets; messages from the client wait for `admit`."""
        self._stop_settling()
        if not self._closed:
            self._linked.clear()
        link, self._link = self._link, None
        if link is not None:
            link.drain_iopub()
            link.close()

    def release(self) -> tuple[KernelLink | None, list[KernelMessage]]:
        """Ends the connection: its link, for someone to take over or close, and what its client has not been sent."""
        self._closed = True
        self._stop_settling()
        link, self._link = self._link, None
        self._linked.set()
        return link, self.outgoing.close()

    def _pause(self) -> None:
        if self._link is not None:
            self._link.pause()

    def _resume(self) -> None:
        if self._link is not None:
            self._link.resume()
