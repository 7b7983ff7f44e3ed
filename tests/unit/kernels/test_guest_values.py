"""What a guest sends is taken as a value only where it can be one."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kernels.errors import MachineFailedError
from kernels.exec import CommandExited, CommandInfo
from kernels.files import FileInfo
from kernels.session import LastCell, PendingRequests, parse_event

FILE = {
    "name": "a", "path": "/a", "kind": "file", "size_bytes": 1, "mode": 0o100644, "uid": 0, "gid": 0, "modified_at": 5,
    "target": None,
}  # fmt: skip


def test_a_file_is_what_its_guest_says_within_bounds() -> None:
    found = FileInfo.parse({**FILE, "name": "a\udcff", "modified_at": math.nan, "of a newer agent": 1})
    assert (found.name, found.mode, found.modified_at, found.target) == ("a\ufffd", 0o644, 0.0, None)
    assert FileInfo.parse({**FILE, "modified_at": 10**400}).modified_at == 253402300799.0
    assert FileInfo.parse({**FILE, "modified_at": -1}).modified_at == 0.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 1),
        ("name", None),
        ("kind", "disk"),
        ("size_bytes", -1),
        ("size_bytes", 2**63),
        ("size_bytes", True),
        ("size_bytes", "1"),
        ("size_bytes", 1.0),
        ("modified_at", "now"),
    ],
)
def test_what_cannot_be_a_value_is_the_guests_failure(field: str, value: object) -> None:
    with pytest.raises(MachineFailedError, match=field):
        FileInfo.parse({**FILE, field: value})


@pytest.mark.parametrize("value", [None, [], "file", 1])
def test_what_is_no_object_is_the_guests_failure(value: object) -> None:
    with pytest.raises(MachineFailedError):
        FileInfo.parse(value)


def test_a_failure_does_not_quote_the_guest() -> None:
    with pytest.raises(MachineFailedError) as raised:
        FileInfo.parse({**FILE, "kind": "x" * 10_000})
    assert len(str(raised.value)) < 200


def test_the_names_on_the_wire_are_the_agents() -> None:
    ended = {"exit_status": None, "signal": 9, "timed_out": False}
    assert CommandExited.parse(ended) == CommandExited(signal=9, timed_out=False)
    told: dict[str, Any] = {
        "command_id": "c", "pid": 1, "command": "true", "background": False, "tty": False, "started_at": 1.0,
        "output_bytes": 0, "running": False,
    }  # fmt: skip
    info = CommandInfo.parse({**told, **ended})
    assert (info.exit_code, info.signal, info.out_of_memory, info.cwd) == (None, 9, False, None)


def test_requests_that_a_guest_names_are_bounded() -> None:
    one = {"idents": [], "header": {"msg_id": "m"}}
    last = LastCell.parse({"held": True, "execution_count": 3, "unanswered": [one, "nonsense"]})
    assert (last.held, last.cell, last.pending_requests) == (True, 3, (one,))
    assert PendingRequests.parse({"unanswered": 2, "cells": [one] * 10_000}) == PendingRequests(count=2)
    assert PendingRequests(count=1, cells=(one,)).cells_but([one, None]) == []


@pytest.mark.parametrize(
    "line",
    [b"", b"nonsense", b"[]", b'{"event": "kernel.status"}', b'{"event": "kernel.exited", "pid": "7"}', b"[" * 10_000],
)
def test_an_event_that_is_none_is_left_out(line: bytes) -> None:
    assert parse_event(line) is None
