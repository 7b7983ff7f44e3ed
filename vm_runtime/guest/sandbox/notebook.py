"""What forks mean for the IPython kernel that they happen in: its client, input, history and errors."""

from __future__ import annotations

import base64
import builtins
import contextlib
import getpass
import json
import sqlite3
import sys
import threading
import traceback
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

# What a parent is shown of a child's traceback: its end says what happened.
TRACEBACK_CHARACTERS_MAX = 20_000


# What watches the running cell of this child, if it was forked in it.
_cell_ran: Callable[[Any], None] | None = None


class CellEnd(BaseException):
    """Ends a cell without output. No Exception, so that the user's `except Exception` lets it pass."""


def shell() -> Any | None:
    """The IPython shell of this process, or None."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_ipython() if get_ipython is not None else None


def _kernel() -> Any | None:
    return getattr(shell(), "kernel", None)


def load(ip: Any) -> None:
    """Give a kernel the module and the magics. Called at its start, so in every template."""
    sys.modules.setdefault("sandbox", sys.modules["vm_runtime.guest.sandbox"])
    from vm_runtime.guest.sandbox.magics import register

    register(ip)


def reply_to() -> dict[str, Any] | None:
    """Who is to be answered once this state has ended: the running cell's request. None outside of cells."""
    kernel = _kernel()
    parent = kernel.get_parent("shell") if kernel is not None else {}
    if kernel is None or not parent:
        return None
    idents = kernel._get_shell_context_var(kernel._shell_parent_ident)
    header = json.loads(json.dumps(parent["header"], default=_iso))
    return {"idents": [base64.b64encode(ident).decode() for ident in idents], "header": header}


def flush() -> None:
    """What was printed before a fork is the parent's alone: send it now."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def become_child() -> None:
    """This process continues in a fork. Its kernel has no client, so nobody is asked, and a history of its own."""
    ip, kernel = shell(), _kernel()
    if ip is None or kernel is None:
        return
    kernel.iopub_thread.outbox.clear()  # the parent's output, which the parent sends
    kernel.shell_stream.drop()
    kernel._allow_stdin = False
    builtins.input = getpass.getpass = _no_input
    history = ip.history_manager
    if history is not None and history.enabled:
        with contextlib.suppress(sqlite3.Error):  # a full disk: the history is not worth the fork
            history.end_session()
            history.new_session()


def become_parent() -> None:
    """This process continues as its parent: whoever ran the parent's cell can be asked again."""
    kernel = _kernel()
    if kernel is not None and kernel.get_parent("shell"):
        kernel._allow_stdin = bool(kernel.get_parent("shell")["content"].get("allow_stdin", False))
        builtins.input, getpass.getpass = kernel.raw_input, kernel.getpass


def at_failure(end: Callable[[BaseException, str], object]) -> None:
    """If the running cell fails, call `end` with the exception and its text: so a forked process would end, too.

    An interrupt is no failure: there is someone who watches.
    """
    global _cell_ran
    ip = shell()
    if ip is None or threading.current_thread() is not threading.main_thread():
        return
    if _cell_ran is not None:  # this child's parent is a child of the same cell
        ip.events.unregister("post_run_cell", _cell_ran)

    def cell_ran(result: Any) -> None:
        global _cell_ran
        _cell_ran = None
        ip.events.unregister("post_run_cell", cell_ran)
        error = result.error_before_exec or result.error_in_exec
        if error is not None and not isinstance(error, KeyboardInterrupt | CellEnd):
            end(error, traceback_text(error))

    ip.events.register("post_run_cell", cell_ran)
    _cell_ran = cell_ran


def traceback_text(error: BaseException) -> str:
    """The end of a traceback, without colours; frames of IPython itself left out."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame for frame in frames if "/IPython/" not in frame.filename and "/vm_runtime/guest/" not in frame.filename
    ]
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(ours)] if ours else []
    return "".join([*lines, *traceback.format_exception_only(error)])[-TRACEBACK_CHARACTERS_MAX:]


def end_cell() -> NoReturn:
    """End the running cell without a traceback; in a process that runs no cells, the process."""
    ip = shell()
    if ip is None:
        raise SystemExit(0)
    ip.set_custom_exc((CellEnd,), lambda *_args, **_options: None)
    raise CellEnd


def _no_input(*_: object, **__: object) -> NoReturn:
    raise EOFError("A forked child has no notebook that it could ask: input() works in the parent only.")


def _iso(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
