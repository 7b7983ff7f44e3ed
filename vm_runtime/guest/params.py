"""Checks of what the host sends with a request. Pure; each refuses with OpenRejectedError, code `bad_params`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vm_runtime.wire.errors import OpenRejectedError

_REQUIRED: Any = object()

# Linux's PATH_MAX.
PATH_BYTES_MAX = 4096


def param(params: Mapping[str, Any], name: str, kind: Any, default: Any = _REQUIRED) -> Any:
    """A parameter of that type (bool is no number); without a default it must be there."""
    value = params.get(name, default)
    if value is _REQUIRED:
        raise OpenRejectedError("bad_params", f"{name} is missing.")
    if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise OpenRejectedError("bad_params", f"{name} has the wrong type ({type(value).__name__}).")
    return value


def whole_number(params: Mapping[str, Any], name: str, low: int, high: int, default: Any = _REQUIRED) -> Any:
    """An int from low to high."""
    value = param(params, name, int, default)
    if value is not default and not low <= value <= high:
        raise OpenRejectedError("bad_params", f"{name} must be from {low} to {high}.")
    return value


def environment(params: Mapping[str, Any]) -> dict[str, str]:
    """The variables under `env`; {} without."""
    env = param(params, "env", dict, None) or {}
    for name, value in env.items():
        if not isinstance(value, str) or "\0" in name + value or "=" in name or not name:
            raise OpenRejectedError("bad_params", f"env has an entry that no process can have: {name!r}.")
    return env


def from_home(path: str, home: str) -> str:
    """`~` and `~/...` as shells have them; a file of that name is `./~`."""
    return home + path[1:] if path == "~" or path.startswith("~/") else path


def path_text(params: Mapping[str, Any], name: str) -> str:
    """A path as a person wrote it. Raises with the code `bad_path` for one that no file can have."""
    value: str = param(params, name, str)
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise OpenRejectedError("bad_path", f"{name} is not UTF-8.") from error
    if not value or "\0" in value or size >= PATH_BYTES_MAX:
        raise OpenRejectedError("bad_path", f"{name} has 1 to {PATH_BYTES_MAX - 1} bytes, none of them zero.")
    return value
