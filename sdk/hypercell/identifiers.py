"""Ids as parts of URLs: each is checked here before it becomes one. Often a model has written them."""

from __future__ import annotations

import re
from typing import Literal

from hypercell.errors import NotFoundError

# What the gateway routes (gateway/app.py). Quoting would not do instead: `..` needs none, and proxies undo it.
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")

_CODES = {"sandbox": "sandbox_not_found", "snapshot": "snapshot_not_found", "command": "unknown_command"}


def in_path(identifier: object, kind: Literal["sandbox", "snapshot", "command"]) -> str:
    """An id, for an f-string that makes a URL's path. Raises NotFoundError: nothing has an id of another form."""
    text = str(identifier)
    if not _ID.fullmatch(text):
        raise NotFoundError(f"No {kind} has the id {text[:64]!r}.", status=404, code=_CODES[kind])
    return text
