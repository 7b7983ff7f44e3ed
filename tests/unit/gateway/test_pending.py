"""What a client gets to its requests when the kernel dies that has not answered them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.frames import KernelMessage
from gateway.own_messages import make_message
from gateway.pending import HEADER_BYTES_MAX, REQUESTS_MAX, PendingRequests


def request(msg_id: str, msg_type: str = "execute_request", channel: str = "shell") -> KernelMessage:
    header = {"msg_id": msg_id, "msg_type": msg_type}
    return KernelMessage(channel, json.dumps(header).encode(), b"{}", b"{}", b"{}")


def shown(messages: list[KernelMessage]) -> list[tuple[str, str, str | None, Any]]:
    """Of each message: channel, type, the request that it belongs to, and what it says."""
    found = []
    for message in messages:
        header, parent, content = (
            json.loads(bytes(each)) for each in (message.header, message.parent, message.content)
        )
        said = content.get("status") or content.get("execution_state") or content.get("text")
        found.append((message.channel, header["msg_type"], parent.get("msg_id"), said))
    return found


def test_each_request_ends_in_the_order_in_which_it_came() -> None:
    pending, begun = PendingRequests(), request("begun")
    for each in (request("done"), begun, request("waits"), request("info", "kernel_info_request")):
        pending.sent(each)
    pending.sent(request("debug", "debug_request", "control"))
    pending.sent(request("comm", "comm_msg"))  # nobody replies to these
    pending.received(make_message("shell", "execute_reply", {"status": "ok"}, request("done").header))
    pending.received(make_message("iopub", "status", {"execution_state": "busy"}, begun.header))
    messages = pending.last_words("restarting", "It fell over.")
    assert shown(messages) == [
        ("iopub", "stream", "begun", "[It fell over.]\n"),
        ("shell", "execute_reply", "begun", "error"),
        ("iopub", "status", "begun", "idle"),
        ("shell", "execute_reply", "waits", "aborted"),
        ("iopub", "status", "waits", "idle"),
        ("control", "debug_reply", "debug", "aborted"),
        ("iopub", "status", "debug", "idle"),
        ("iopub", "status", None, "restarting"),
    ]
    content = json.loads(bytes(messages[1].content))
    assert (content["ename"], content["evalue"]) == ("KernelDied", "It fell over.")
    assert shown(pending.last_words("dead", None)) == [("iopub", "status", None, "dead")], "each is answered once"


@pytest.mark.parametrize(
    "header", [b"", b"junk", b"[]", b'{"msg_id": 1}', b" " * HEADER_BYTES_MAX + b"{}", b"[" * 4096]
)
def test_what_is_no_header_is_passed_over(header: bytes) -> None:
    pending = PendingRequests()
    pending.sent(request("a"))
    for channel in ("shell", "iopub"):
        message = KernelMessage(channel, b'{"msg_type": "status"}', header, b"{}", b"{}")
        pending.received(message)
        pending.sent(KernelMessage("shell", header, b"{}", b"{}", b"{}"))
    assert len(pending.answers("")) == 2


def test_so_many_are_remembered() -> None:
    pending = PendingRequests()
    for number in range(2 * REQUESTS_MAX):
        pending.sent(request(str(number)))
    assert len(pending.answers("")) == 2 * REQUESTS_MAX
