"""Callbacks of users, which may be plain functions or coroutine functions."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar

from hypercell.execution import ExecutionError, Result

T = TypeVar("T")

OnText = Callable[[str], Awaitable[None] | None]
OnBytes = Callable[[bytes], Awaitable[None] | None]
OnResult = Callable[[Result], Awaitable[None] | None]
OnError = Callable[[ExecutionError], Awaitable[None] | None]


async def call_back(function: Callable[[T], Awaitable[None] | None] | None, value: T) -> None:
    """Calls a user's function, if there is one, and awaits it if it is to be awaited. What it raises is passed on."""
    if function is not None:
        waiting = function(value)
        if inspect.isawaitable(waiting):
            await waiting
