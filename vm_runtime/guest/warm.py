"""The first requests of a template's kernel, sent through its own sockets, so that every clone has run that code.

Leaves no trace: namespace, last results and errors, execution count, history and spool are as new afterwards.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import zmq
from jupyter_client.session import Session

# Under emulation the recipe's own warm-up (imports, a first plot) takes tens of seconds.
WARM_UP_LIMIT_S = 300.0

_REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("kernel_info_request", {}),
    ("is_complete_request", {"code": "for i in range(3):"}),
    ("complete_request", {"code": "import o", "cursor_pos": 8}),
    ("complete_request", {"code": "pri", "cursor_pos": 3}),
    ("complete_request", {"code": "str.", "cursor_pos": 4}),
    ("inspect_request", {"code": "print", "cursor_pos": 5, "detail_level": 0}),
    ("comm_info_request", {}),
)

# Output, a result, and a traceback: what nearly every first cell needs.
_CELLS = ("print('warm')", "1 + 1", "def warm():\n    return 1 / 0\nwarm()")


def warm_up(app: Any, code: str) -> str | None:
    """Run `code` (the recipe's warm-up) and typical requests in the kernel of `app`. On the RPC server's thread.

    Returns what the recipe's code raised, or None. Raises TimeoutError if the kernel does not answer.
    """
    session = Session(key=app.session.key)
    context = zmq.Context()
    try:
        shell = context.socket(zmq.DEALER)
        shell.connect(f"ipc://{app.ip}-{app.shell_port}")
        iopub = context.socket(zmq.SUB)
        iopub.subscribe(b"")
        iopub.connect(f"ipc://{app.ip}-{app.iopub_port}")
        deadline_s = time.monotonic() + WARM_UP_LIMIT_S
        with _nothing_left(app.shell):
            recipe = _ask(session, shell, iopub, "execute_request", _cell(code), deadline_s=deadline_s)
            for message_type, content in _REQUESTS:
                _ask(session, shell, iopub, message_type, content, deadline_s=deadline_s)
            for cell in _CELLS:
                _ask(session, shell, iopub, "execute_request", _cell(cell), deadline_s=deadline_s)
    finally:
        context.destroy(linger=0)
    _forget_subscriber(app, deadline_s)
    app.session.digest_history = set()
    return f"{recipe['ename']}: {recipe['evalue']}" if recipe["status"] == "error" else None


@contextlib.contextmanager
def _nothing_left(ip: Any) -> Iterator[None]:
    """Put back what cells change in IPython and in `sys`. (Its own `reset` takes __spec__ and more from __main__.)"""
    namespace, hidden = dict(ip.user_ns), dict(ip.user_ns_hidden)
    yield
    ip.displayhook.flush()  # Out, _ and what they refer to
    for now, before in ((ip.user_ns, namespace), (ip.user_ns_hidden, hidden)):
        now.clear()
        now.update(before)
    ip.last_execution_result = ip._last_traceback = ip.InteractiveTB.tb = None
    ip.last_execution_succeeded = True
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):  # what %debug goes by
        vars(sys).pop(name, None)


def _cell(code: str) -> dict[str, Any]:
    return {"code": code, "silent": False, "store_history": False, "allow_stdin": False, "stop_on_error": False}


def _ask(
    session: Session,
    shell: zmq.Socket[bytes],
    iopub: zmq.Socket[bytes],
    message_type: str,
    content: dict[str, Any],
    *,
    deadline_s: float,
) -> dict[str, Any]:
    """Send one request; return its reply's content once its idle status has come too."""
    request = session.send(shell, message_type, content)
    assert request is not None
    request_id = request["header"]["msg_id"]
    reply: dict[str, Any] | None = None
    idle = False
    poller = zmq.Poller()
    poller.register(shell, zmq.POLLIN)
    poller.register(iopub, zmq.POLLIN)
    while reply is None or not idle:
        left_s = deadline_s - time.monotonic()
        ready = dict(poller.poll(max(0, int(left_s * 1000))))
        if not ready:
            raise TimeoutError(f"The kernel did not answer a {message_type} within {WARM_UP_LIMIT_S:.0f} s of warm-up.")
        for sock in ready:
            _, message = session.recv(sock, mode=zmq.NOBLOCK)
            if message is None or message["parent_header"].get("msg_id") != request_id:
                continue
            if sock is shell:
                reply = message["content"]
            elif message["msg_type"] == "status":
                idle = message["content"]["execution_state"] == "idle"
    return reply


def _forget_subscriber(app: Any, deadline_s: float) -> None:
    """Wait until the iopub thread has seen that the subscriber left, and drop what was published meanwhile."""
    outbox = app.iopub_thread.outbox
    while outbox.listening and time.monotonic() < deadline_s:
        time.sleep(0.01)
    outbox.clear()
