"""`timeout`, as other libraries call it, beside every public `timeout_s`: both in seconds, one of them may be given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def takes_timeout(function: Callable[P, R]) -> Callable[P, R]:
    """A function with `timeout_s` and `timeout` among its parameters: it gets what is given as `timeout` as
    `timeout_s`, and never sees the former. Calls raise TypeError where both are given."""

    def one_of(given: Any) -> Any:
        if "timeout" in given:
            if "timeout_s" in given:
                raise TypeError("timeout and timeout_s mean the same, a number of seconds: give one of them")
            given["timeout_s"] = given.pop("timeout")
        return given

    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
            return await function(*args, **one_of(kwargs))

        return awaited  # type: ignore[return-value]  # the same R: a coroutine

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **one_of(kwargs))

    return called
