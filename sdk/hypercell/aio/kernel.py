"""The WebSocket to one sandbox's kernel: many executions over it, resumed after a loss, each with its own messages.

Knows messages, not what they mean to a user (hypercell/execution.py does).

How a lost connection is resumed: the same `session_id` connects again, and the gateway sends what it kept. Behind
that a probe (kernel_info_request) is sent, which the kernel answers in its turn: what has no answer when the probe has
one was lost for good, and is told as ConnectionLostError instead of waited for.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from hypercell.aio.transport import RETRY_FIRST_S, RETRY_LONGEST_S, START_TIMEOUT_S, Transport
from hypercell.errors import (
    CapacityError,
    ClosedError,
    CodeTimeoutError,
    ConnectionLostError,
    GatewayRefusedError,
    HypercellError,
    KernelDiedError,
    MachineFailedError,
    NoGatewayError,
    StateError,
    UnsupportedError,
)
from hypercell.identifiers import in_path
from hypercell.kernel_messages import SUBPROTOCOL, KernelMessage, decode, encode_request

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

# Messages of one execution that wait for a slow callback; then the kernel is made to wait.
MAX_WAITING_MESSAGES = 256
# A connection is tried again for so long, as far as the gateway could be restarting or the network be down.
RESUME_WINDOW_S = 60.0
# An interrupted cell gets so long to end: `except KeyboardInterrupt` and `finally` may have work to do. The interrupt
# of a subshell, which runs code itself, gets as long to be made.
INTERRUPT_GRACE_S = 10.0
# A kernel that has been silent for so long may have been paused, which is looked up before code is sent to it, and
# again at growing intervals while it has not begun.
QUIET_S = 1.0
LONGEST_QUIET_S = 30.0

# Raises KeyboardInterrupt in the thread of a subshell, which the kernel's own interrupt does not reach. The user's
# variables stay untouched.
_INTERRUPT_SUBSHELL = """exec('''
import ctypes, threading
for thread in threading.enumerate():
    if thread.name == "subshell-" + {id!r}:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
''', {{}})"""

T = TypeVar("T")

Take = Callable[[KernelMessage], Awaitable[None]]


class _Pending:
    """A request that has not come to its end: that is its reply and `status: idle`, in whichever order."""

    def __init__(self, *, context_id: str | None, is_probe: bool = False) -> None:
        self.context_id = context_id
        self.is_probe = is_probe
        self.messages: asyncio.Queue[KernelMessage | HypercellError] = asyncio.Queue(MAX_WAITING_MESSAGES)
        self.covers: list[str] = []
        self.replied = False
        self.idle = False
        # What the reader saw, which callbacks may be far behind: the kernel works on it (or did), and is done with it.
        self.began: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.has_ended = False

    @property
    def is_running(self) -> bool:
        """The kernel works on it, so that an interrupt reaches it and not what another client runs there."""
        return self.began.done() and not self.has_ended

    def notice(self, message: KernelMessage) -> None:
        """Called by the reader for each message, before it waits for callbacks."""
        if not self.began.done():
            self.began.set_result(None)
        if message.msg_type == "status" and message.content.get("execution_state") == "idle":
            self.has_ended = True


class _Limit:
    """Of a whole call, from its beginning on. timeout_s: None for none."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._began = time.monotonic()

    @property
    def left_s(self) -> float | None:
        return None if self.timeout_s is None else max(0.0, self._began + self.timeout_s - time.monotonic())

    async def within(self, step: Awaitable[T]) -> T:
        """What `step` gives. Raises CodeTimeoutError if it takes too long."""
        try:
            return await asyncio.wait_for(step, self.left_s)
        except asyncio.TimeoutError:
            raise self.error() from None

    def error(self) -> CodeTimeoutError:
        return CodeTimeoutError(
            f"The kernel did not begin with the code within {self.timeout_s:g} s, since it runs other code or does not "
            "answer. It may still run it in its turn.",
            interrupted=False,
        )


class AsyncKernel:
    """The kernel of one sandbox. `close()` ends the connection, not the kernel. pid: the process that may use it."""

    def __init__(self, transport: Transport, kernel_id: str) -> None:
        self.pid = os.getpid()
        self._transport = transport
        self._sandbox_path = f"/api/sandboxes/{in_path(kernel_id, 'sandbox')}"
        self._heard_at = -math.inf
        self._path = f"/api/kernels/{in_path(kernel_id, 'sandbox')}"
        self._session_id = uuid.uuid4().hex
        self._websocket: ClientConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()
        self._pending: dict[str, _Pending] = {}
        # A context runs one piece of code at a time; waiting here keeps what has not begun withdrawable.
        self._turns: dict[str | None, asyncio.Lock] = {}
        self._closed = False
        # A restart is known of; the new kernel's `starting` is no news then.
        self._is_restarting = False

    async def close(self) -> None:
        """Ends the connection; executions that run get ClosedError. Twice is harmless."""
        self._closed = True
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        await self._disconnect()
        self._fail_all(ClosedError("This connection to the sandbox was closed."))

    async def interrupt(self) -> None:
        """Raises KeyboardInterrupt in what runs in the main context."""
        await self._transport.call("POST", f"{self._path}/interrupt")

    async def restart(self) -> None:
        """A new kernel; what runs in the old one ends with KernelDiedError."""
        self._is_restarting = self._websocket is not None
        await self._transport.call("POST", f"{self._path}/restart", timeout_s=START_TIMEOUT_S)
        self._fail_all(KernelDiedError("The kernel was restarted while this ran; its variables are gone."))

    async def execute(
        self,
        code: str,
        *,
        take: Take,
        timeout_s: float | None = None,
        total_timeout_s: float | None = None,
        context_id: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> None:
        """Runs code; `take` gets every message that belongs to it, in order, up to its end.

        timeout_s: from when the kernel begins with it (its `status: busy`), since other clients' code may run before;
        total_timeout_s: from now on; then it is interrupted. Cancelled, or where `take` fails, it is interrupted as
        well, unless the kernel has not begun with it: it runs in its turn then, because an interrupt would hit another
        client's code.
        Raises CodeTimeoutError, KernelDiedError, ConnectionLostError, GatewayRefusedError.
        """
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": False,
            "stop_on_error": False,
        }
        if env or cwd:
            content["hypercell"] = {"env": dict(env or {}), "cwd": cwd}
        limit = _Limit(total_timeout_s)
        turn = self._turns.setdefault(context_id, asyncio.Lock())
        await limit.within(turn.acquire())
        try:
            if time.monotonic() - self._heard_at > QUIET_S:
                await limit.within(self._check_not_paused())
            pending = await limit.within(self._send("shell", "execute_request", content, context_id=context_id))
            following = asyncio.create_task(self._follow(pending, take))
            try:
                await self._wait_begun(following, pending, limit)
                allowed_s = min((each for each in (timeout_s, limit.left_s) if each is not None), default=None)
                await asyncio.wait({following}, timeout=allowed_s)
                if not following.done() and pending.is_running:
                    await self._stop(following, context_id, limit.timeout_s if allowed_s != timeout_s else timeout_s)
                await following
            except CodeTimeoutError:
                raise
            except BaseException:
                # Cancelled, or a callback failed: nobody wants the rest.
                if pending.is_running:
                    # First, so that the reader waits for no callback: it has to hear how the interrupt went.
                    self._forget(pending)
                    with suppress(HypercellError, asyncio.TimeoutError):
                        await asyncio.shield(self._interrupt_context(context_id))
                raise
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
                self._forget(pending)
        finally:
            turn.release()

    async def _wait_begun(self, following: asyncio.Task[None], pending: _Pending, limit: _Limit) -> None:
        pause_s = QUIET_S
        while not (following.done() or pending.began.done()):
            left_s = limit.left_s
            if left_s == 0:
                raise limit.error()
            wait_s = pause_s if left_s is None else min(pause_s, left_s)
            await asyncio.wait({following, pending.began}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if not (following.done() or pending.began.done()):
                # Where there is no gateway the reader finds that out.
                with suppress(NoGatewayError):
                    await self._check_not_paused()
                pause_s = min(2 * pause_s, LONGEST_QUIET_S)

    async def _check_not_paused(self) -> None:
        """What is sent to a paused kernel waits until somebody resumes it."""
        state = (await self._transport.call("GET", self._sandbox_path))["state"]
        if state == "paused":
            raise StateError("The sandbox is paused; `resume()` it first.", status=409, code="wrong_state")

    async def _stop(self, following: asyncio.Task[None], context_id: str | None, timeout_s: float | None) -> None:
        with suppress(asyncio.TimeoutError):
            await self._interrupt_context(context_id)
        done, _ = await asyncio.wait({following}, timeout=INTERRUPT_GRACE_S)
        if done:
            following.result()
            raise CodeTimeoutError(f"The code ran longer than {timeout_s:g} s and was interrupted.", interrupted=True)
        raise CodeTimeoutError(
            f"The code ran longer than {timeout_s:g} s. It was interrupted, but did not stop within "
            f"{INTERRUPT_GRACE_S:g} s; `restart()` or `kill()` ends it.",
            interrupted=False,
        )

    async def _interrupt_context(self, context_id: str | None) -> None:
        """Raises asyncio.TimeoutError if a kernel whose threads get no turn (a C extension holds the GIL) does not."""
        if context_id is None:
            await self.interrupt()
            return
        await asyncio.wait_for(self._interrupt_subshell(context_id), INTERRUPT_GRACE_S)

    async def _interrupt_subshell(self, context_id: str) -> None:
        helper = await self.create_context()
        try:
            code = _INTERRUPT_SUBSHELL.format(id=context_id)
            content = {"code": code, "silent": True, "store_history": False, "stop_on_error": False}
            await self._ask("shell", "execute_request", content, context_id=helper)
        finally:
            # A limit of its own, since the outer one may be over.
            await asyncio.wait_for(self.delete_context(helper), INTERRUPT_GRACE_S)

    async def create_context(self) -> str:
        """A subshell: runs code beside the main one, on the same variables. Its id."""
        reply = await self._ask("control", "create_subshell_request", {})
        if "subshell_id" not in reply:
            raise UnsupportedError("This sandbox's kernel has no subshells; its template needs ipykernel 7 or newer.")
        return str(reply["subshell_id"])

    async def delete_context(self, context_id: str) -> None:
        """Ends a subshell."""
        await self._ask("control", "delete_subshell_request", {"subshell_id": context_id})
        self._turns.pop(context_id, None)

    async def _ask(
        self, channel: str, msg_type: str, content: dict[str, Any], *, context_id: str | None = None
    ) -> dict[str, Any]:
        reply: dict[str, Any] = {}

        async def take(message: KernelMessage) -> None:
            if message.channel == channel:
                reply.update(message.content)

        pending = await self._send(channel, msg_type, content, context_id=context_id)
        try:
            await self._follow(pending, take)
        finally:
            self._forget(pending)
        return reply

    async def _follow(self, pending: _Pending, take: Take) -> None:
        while not (pending.replied and pending.idle):
            message = await pending.messages.get()
            if isinstance(message, HypercellError):
                raise message
            if message.channel != "iopub":
                pending.replied = True
            elif message.msg_type == "status":
                pending.idle = pending.idle or message.content.get("execution_state") == "idle"
                continue
            await take(message)

    def _forget(self, pending: _Pending) -> None:
        for msg_id in [msg_id for msg_id, known in self._pending.items() if known is pending]:
            del self._pending[msg_id]
        # The reader may wait for room in this queue, and everything else waits for the reader. What comes from now on
        # finds no entry above and is dropped.
        while not pending.messages.empty():
            pending.messages.get_nowait()

    async def _send(
        self, channel: str, msg_type: str, content: dict[str, Any], *, context_id: str | None = None
    ) -> _Pending:
        """A request that was given to the connection; the caller forgets it in the end."""
        from websockets.exceptions import ConnectionClosed

        websocket = await self._connected()
        pending = _Pending(context_id=context_id)
        msg_id, frame = encode_request(
            channel=channel, msg_type=msg_type, content=content, session_id=self._session_id, subshell_id=context_id
        )
        self._pending[msg_id] = pending
        try:
            # A connection that breaks here is the reader's business: the probe finds out whether this arrived.
            with suppress(ConnectionClosed):
                await websocket.send(frame)
        except BaseException:
            self._forget(pending)
            raise
        return pending

    async def _connected(self) -> ClientConnection:
        async with self._connecting:
            if self._closed:
                raise ClosedError("This connection was closed. `connect(id)` makes a new one.")
            if self._reader is not None and self._reader.done():
                self._reader = None
                await self._disconnect()
            if self._websocket is None:
                self._websocket = await self._connect()
                self._reader = asyncio.create_task(self._read())
            return self._websocket

    async def _connect(self) -> ClientConnection:
        return await self._transport.connect(
            f"{self._path}/channels",
            query={"session_id": self._session_id},
            subprotocol=SUBPROTOCOL,
            timeout_s=START_TIMEOUT_S,
        )

    async def _disconnect(self) -> None:
        websocket, self._websocket = self._websocket, None
        if websocket is not None:
            await websocket.close()

    async def _read(self) -> None:
        """Delivers messages until the connection ends and nothing is waited for, or it cannot be resumed."""
        from websockets.exceptions import ConnectionClosed

        try:
            while True:
                assert self._websocket is not None
                with suppress(ConnectionClosed):
                    while True:
                        data = await self._websocket.recv()
                        self._heard_at = time.monotonic()
                        if isinstance(data, bytes):
                            await self._deliver(decode(data))
                if not self._pending:
                    return
                # Else a call in another context would find no connection meanwhile, and open a second one. `close`
                # does not take the lock; it cancels this task, which gives it back.
                async with self._connecting:
                    self._websocket = await self._reconnect()
                await self._probe()
        except HypercellError as error:
            self._fail_all(error)
        except ValueError as error:
            self._fail_all(ConnectionLostError(f"The gateway sent something that is no kernel message: {error}"))

    async def _reconnect(self) -> ClientConnection:
        await self._disconnect()
        deadline = time.monotonic() + RESUME_WINDOW_S
        pause_s = RETRY_FIRST_S
        while True:
            try:
                return await self._connect()
            except (MachineFailedError, CapacityError, NoGatewayError) as error:
                if time.monotonic() + pause_s > deadline:
                    raise ConnectionLostError(
                        f"The connection to the sandbox broke and could not be resumed within {RESUME_WINDOW_S:.0f} s: "
                        f"{error} What ran may go on; its output is lost."
                    ) from error
            except GatewayRefusedError as error:
                if error.status < 500:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_LONGEST_S)

    async def _probe(self) -> None:
        from websockets.exceptions import ConnectionClosed

        waiting = {msg_id: pending for msg_id, pending in self._pending.items() if not pending.is_probe}
        for context_id in {pending.context_id for pending in waiting.values()}:
            probe = _Pending(context_id=context_id, is_probe=True)
            probe.covers = [msg_id for msg_id, pending in waiting.items() if pending.context_id == context_id]
            msg_id, frame = encode_request(
                channel="shell",
                msg_type="kernel_info_request",
                content={},
                session_id=self._session_id,
                subshell_id=context_id,
            )
            self._pending[msg_id] = probe
            with suppress(ConnectionClosed):
                assert self._websocket is not None
                await self._websocket.send(frame)

    async def _deliver(self, message: KernelMessage) -> None:
        if message.msg_type == "status" and not message.parent_id:
            self._on_state(str(message.content.get("execution_state")), str(message.content.get("reason") or ""))
            return
        pending = self._pending.get(message.parent_id)
        if pending is None:
            return
        if message.from_gateway and message.channel != "iopub":
            # The kernel has died. Its state comes behind this, and ends all that waits: also requests that only an
            # earlier gateway knew. Were this the end, what its caller sends next would be taken for one of them.
            return
        if not pending.is_probe:
            pending.notice(message)
            await pending.messages.put(message)
            return
        pending.replied = pending.replied or message.channel != "iopub"
        pending.idle = pending.idle or message.content.get("execution_state") == "idle"
        if pending.replied and pending.idle:
            self._forget(pending)
            for msg_id in pending.covers:
                lost = self._pending.get(msg_id)
                if lost is not None:
                    self._fail(
                        lost,
                        ConnectionLostError(
                            "The connection to the sandbox was lost and resumed, but the gateway had not kept how this "
                            "ended: it was run to its end, or never."
                        ),
                    )

    def _on_state(self, state: str, reason: str) -> None:
        """`restarting` and `dead` tell of crashes. `starting` alone tells that someone asked for a restart."""
        if state == "starting" and self._is_restarting:
            self._is_restarting = False
        elif state in {"restarting", "starting", "dead"}:
            self._is_restarting = state == "restarting"
            how = "and does not come back" if state == "dead" else "and was started anew: its variables are gone"
            self._fail_all(KernelDiedError(f"The kernel ended while this ran, {how}. {reason}".strip()))

    def _fail_all(self, error: HypercellError) -> None:
        for pending in list(self._pending.values()):
            self._fail(pending, error)
        self._pending = {msg_id: pending for msg_id, pending in self._pending.items() if not pending.is_probe}

    def _fail(self, pending: _Pending, error: HypercellError) -> None:
        pending.has_ended = True
        if pending.messages.full():
            # Whoever takes the messages is far behind; the end is what it must not miss.
            pending.messages.get_nowait()
        pending.messages.put_nowait(error)
