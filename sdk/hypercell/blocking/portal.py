"""Runs the asynchronous core for blocking callers: one event loop in a background thread of this process.

Callbacks are called in the thread of the caller, who is waiting anyway.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, TypeVar

from hypercell.aio.transport import leave_to_parent
from hypercell.errors import ClosedError, HypercellError
from hypercell.execution import ExecutionError, Result

T = TypeVar("T")

OnText = Callable[[str], None]
OnBytes = Callable[[bytes], None]
OnResult = Callable[[Result], None]
OnError = Callable[[ExecutionError], None]

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None


def event_loop() -> asyncio.AbstractEventLoop:
    """The background loop; started by the first call, and anew in a process that was forked."""
    global _loop, _thread
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            # A daemon: a program ends without closing its sandboxes' connections.
            _thread = threading.Thread(target=_loop.run_forever, name="hypercell", daemon=True)
            _thread.start()
        return _loop


def _after_fork() -> None:
    """In the child: the loop runs in its parent, where another thread may have held the lock."""
    global _lock, _loop, _thread
    leave_to_parent(_loop)
    _lock, _loop, _thread = threading.Lock(), None, None


os.register_at_fork(after_in_child=_after_fork)


# The call on whose behalf a task runs; tasks inherit it from those that made them.
_current: ContextVar[BlockingCall] = ContextVar("hypercell_call")


def here(function: Callable[[T], None] | None) -> Callable[[T], Coroutine[Any, Any, None]] | None:
    """A callback that runs `function` in the thread of the caller who waits at that time. That need not be the call
    that was given it: `commands.start` takes callbacks, `wait` makes them."""
    if function is None:
        return None
    wanted = function

    async def relay(value: T) -> None:
        await _current.get().call_here(wanted, value)

    return relay


class BlockingCall:
    """One call: `run` a coroutine in the background, with its callbacks in this thread."""

    def __init__(self) -> None:
        # What is to be called here; None at the end. Each sender waits for its call, so there are few.
        self._calls: SimpleQueue[tuple[Callable[[Any], Any], Any, asyncio.Future[None]] | None] = SimpleQueue()
        self._has_ended = False

    async def call_here(self, function: Callable[[T], None], value: T) -> None:
        """Has the waiting caller call a function; if it waits no more (Ctrl-C), another thread does."""
        if self._has_ended:
            await asyncio.to_thread(function, value)
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._calls.put((function, value, done))
        await done

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result. Interrupted (Ctrl-C), it cancels the coroutine and waits for its end."""
        loop = event_loop()
        if threading.current_thread() is _thread:
            coroutine.close()
            raise HypercellError("The blocking API cannot be used in a coroutine of the SDK; use AsyncSandbox there.")
        tasks: list[asyncio.Task[T] | None] = []

        async def work() -> T:
            tasks.append(asyncio.current_task())
            _current.set(self)
            try:
                return await coroutine
            finally:
                self._has_ended = True

        future = asyncio.run_coroutine_threadsafe(work(), loop)
        future.add_done_callback(lambda _: self._calls.put(None))
        try:
            self._serve(loop)
        except BaseException:
            for task in tasks:
                if task is not None:
                    loop.call_soon_threadsafe(task.cancel)
            self._serve(loop)
            raise
        return future.result()

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        while (call := self._calls.get()) is not None:
            function, value, done = call
            try:
                function(value)
            except Exception as error:
                loop.call_soon_threadsafe(_settle, done, error)
            except BaseException:
                # Ctrl-C is for this thread, not for the loop's: there the callback just ends, or whoever follows the
                # same command next would wait for it forever.
                loop.call_soon_threadsafe(_settle, done, None)
                raise
            else:
                loop.call_soon_threadsafe(_settle, done, None)


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(None)


class Wrapper:
    """A blocking object over its asynchronous twin."""

    def __init__(self, inner: Any) -> None:
        self._async = inner

    def __repr__(self) -> str:
        return repr(self._async).replace("<Async", "<", 1)


_BLOCKING_OF: dict[type, type[Wrapper]] = {}


def register(asynchronous: type, blocking: type[Wrapper]) -> None:
    """From now on `wrap` makes `blocking` of an `asynchronous`."""
    _BLOCKING_OF[asynchronous] = blocking


def wrap(value: Any) -> Any:
    """The same value with blocking objects in place of asynchronous ones."""
    if isinstance(value, list):
        return [wrap(item) for item in value]
    blocking = _BLOCKING_OF.get(type(value))
    return value if blocking is None else blocking(value)


def iterate(generator: AsyncGenerator[T, None]) -> Iterator[T]:
    """What an asynchronous generator gives; it is closed when the iteration is."""

    event_loop()
    thread = _thread
    try:
        while True:
            if thread is not _thread:
                raise ClosedError("This iteration belongs to the process from which this one was forked.")
            try:
                value = following(generator)
            except StopIteration:
                return
            yield wrap(value)
    finally:
        # An iterator that was left unfinished is closed at the latest when the interpreter ends, or in a process that
        # was forked; the loop in which its generator lives runs no more then, and would be waited for forever.
        if not sys.is_finalizing() and thread is not None and thread.is_alive():
            BlockingCall().run(_close(generator))


def following(iterator: AsyncIterator[T]) -> T:
    """The next of an asynchronous iterator. Raises StopIteration at its end."""

    async def step() -> list[T]:
        try:
            return [await anext(iterator)]
        except StopAsyncIteration:
            return []

    found = BlockingCall().run(step())
    if not found:
        raise StopIteration
    return found[0]


async def _close(generator: AsyncGenerator[Any, None]) -> None:
    await generator.aclose()
