"""Environment and directory for one cell: they are the process's own, and put back when the cell has ended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Where they stand in the content of an execute_request, and where its reply says that they were heeded.
CONTENT_KEY = "hypercell"


class CellSettingsError(Exception):
    """There is no such directory, or no process can have such variables; its cause says which."""


@contextlib.contextmanager
def cell_settings(content: dict[str, Any]) -> Iterator[None]:
    """What the request asks for while the block runs. What the cell changes beside it stays. Raises
    CellSettingsError."""
    given = content.get(CONTENT_KEY)
    env, cwd = (given.get("env") or {}, given.get("cwd")) if isinstance(given, dict) else ({}, None)
    before, before_cwd = {name: os.environ.get(name) for name in env}, Path.cwd() if cwd else None
    try:
        try:
            if cwd:
                os.chdir(Path(cwd).expanduser())
            os.environ.update(env)
        except (OSError, ValueError, TypeError) as error:
            raise CellSettingsError(str(error)) from error
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if before_cwd is not None:
            with contextlib.suppress(OSError):  # the cell has removed it
                os.chdir(before_cwd)
