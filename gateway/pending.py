"""What a client has asked of a kernel and has no reply to yet, and what it gets when that kernel dies. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gateway.frames import KernelMessage, Part
from gateway.own_messages import make_message

# Of one client, as many as the kernel itself remembers (vm_runtime/guest/pending_requests.py): a notebook that is run
# as a whole. What is beyond is not answered here.
REQUESTS_MAX = 500
# Headers of Jupyter's clients have some 200 bytes. A longer one is not read, and its request not remembered.
HEADER_BYTES_MAX = 4096
# What JupyterLab shows and nbclient raises as the name of the cell's error.
ERROR_NAME = "KernelDied"
# To what a user's restart did not let the kernel answer.
RESTARTED = "The kernel was restarted."
# Whoever waits for kernel_info asks again, and takes an error for a kernel that cannot be talked to.
NEVER_ANSWERED = frozenset({"kernel_info_request"})


@dataclass
class _Request:
    channel: str
    msg_type: str
    header: bytes
    has_begun: bool = False


class PendingRequests:
    """Give it each message that passes to the kernel (`sent`) and from it (`received`)."""

    def __init__(self) -> None:
        self._requests: dict[str, _Request] = {}

    def sent(self, message: KernelMessage) -> None:
        header = _parsed(message.header)
        msg_id, msg_type = header.get("msg_id"), header.get("msg_type")
        if not isinstance(msg_id, str) or not isinstance(msg_type, str) or len(self._requests) >= REQUESTS_MAX:
            return
        if msg_type.endswith("_request") and msg_type not in NEVER_ANSWERED:
            self._requests[msg_id] = _Request(message.channel, msg_type, bytes(message.header))

    def received(self, message: KernelMessage) -> None:
        if not self._requests:
            return
        if message.channel in ("shell", "control"):
            self._requests.pop(str(_parsed(message.parent).get("msg_id")), None)
        elif message.channel == "iopub" and b'"status"' in bytes(message.header[:HEADER_BYTES_MAX]):
            request = self._requests.get(str(_parsed(message.parent).get("msg_id")))
            if request is not None:
                request.has_begun = True

    def answers(self, reason: str) -> list[KernelMessage]:
        """A reply and `idle` for each, and nothing is pending any more. What the kernel had begun with gets an error,
        what waited behind it is aborted, as after any error."""
        requests, self._requests = list(self._requests.values()), {}
        messages = []
        for request in requests:
            content: dict[str, Any] = {
                "status": "error" if request.has_begun else "aborted",
                "ename": ERROR_NAME,
                "evalue": reason,
                "traceback": [f"{ERROR_NAME}: {reason}"],
            }
            if request.msg_type == "execute_request":
                content |= {"execution_count": 0, "user_expressions": {}, "payload": []}
            reply_type = request.msg_type.removesuffix("_request") + "_reply"
            messages += [
                make_message(request.channel, reply_type, content, request.header),
                make_message("iopub", "status", {"execution_state": "idle"}, request.header),
            ]
        return messages

    def last_words(self, state: str, reason: str | None) -> list[KernelMessage]:
        """Of a kernel that is `restarting` or `dead`. The reason is shown in the output of the cell that ran, too.
        The state comes last, since clients take each `idle` for the kernel's state."""
        cells = [each.header for each in self._requests.values() if each.has_begun and each.channel == "shell"]
        answers = self.answers(reason or "The kernel has died.")
        if reason is None:
            return [*answers, make_message("iopub", "status", {"execution_state": state})]
        output = {"name": "stderr", "text": f"[{reason}]\n"}
        return [
            make_message("iopub", "stream", output, cells[0] if cells else b"{}"),
            *answers,
            make_message("iopub", "status", {"execution_state": state, "reason": reason}),
        ]


def _parsed(part: Part) -> dict[str, Any]:
    """Empty where it is no header of a usual size."""
    if len(part) > HEADER_BYTES_MAX:
        return {}
    try:
        value = json.loads(bytes(part))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
